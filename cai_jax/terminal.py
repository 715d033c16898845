"""What commands beside `cai run` print, and how they end."""

import argparse
import os
import sys
import unicodedata
from collections.abc import Callable

from cai_jax.errors import InputError, Stopped

INPUT_EXIT, STOPPED_EXIT, UNREAD_EXIT = 2, 143, 141  # `cai run` ends with the first two as well
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # what steers a terminal, or is not seen


def written_out(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or unicodedata.category(c) not in HIDDEN else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A text on standard output; what would steer a terminal, or hide, is written out."""
    print(written_out(text))


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: wanted a whole number from 0 on")
    return int(text)


def exit_code(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Of a command; what kept it from its work is a line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED_EXIT
    except InputError as error:
        why = str(error)
    except BrokenPipeError:  # who reads has seen enough, but not all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD_EXIT
    except OSError as error:
        why = f"{error.filename or ''}: {error.strerror or error}"
    print(written_out(f"error: {why}"), file=sys.stderr)
    return INPUT_EXIT
