"""`cai`, also as `python -m cai_jax`: main.py's commands, in a process with large pages, `cai constitution`, `cai audit`,
`cai compare` and `cai report`."""

import importlib
import os
import sys

APART = {"constitution": "commands", "audit": "audit", "compare": "compare", "report": "report"}  # word -> module
ONCE = "CAI_JAX_LARGE_PAGES"  # glibc takes its variable away from a program with more rights than its user


def with_large_pages() -> None:
    """Starts this program anew in its place where glibc has to be told: it reads GLIBC_TUNABLES before Python begins.

    Weights and activations then lie in pages of 2 MB where the kernel gives them on request, as most do. On a CPU a decoding
    step, which reads every weight once, takes a fifth less time. Where GLIBC_TUNABLES is set it stays as it is.
    """
    if sys.platform == "linux" and sys.executable and not {"GLIBC_TUNABLES", ONCE} & os.environ.keys():
        os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", ONCE: "1"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cli() -> None:
    """Entry point of the console script."""
    with_large_pages()
    if module := APART.get("".join(sys.argv[1:2])):
        sys.exit(importlib.import_module(f"cai_jax.{module}").main(sys.argv[2:]))
    from cai_jax import main

    sys.modules["__main__"].__doc__ = main.__doc__  # what absl prints as the usage
    main.cli()


if __name__ == "__main__":
    cli()
