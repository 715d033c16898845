"""The `cai` command: flags -> locked config -> mesh -> stages.

cai run --config=configs/miniworld.py --workdir=runs/a [--config.ppo.kl_coef=0.05 ...]
"""

import difflib
import importlib
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cai_jax import config as configs
from cai_jax import progress
from cai_jax.metrics import NotFinite
from cai_jax.progress import say, table
from cai_jax.workdir import InputError, Stopped, open_run, record_run, stop_on_sigterm

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file with get_config(); --config.key=value overrides", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run; the same command resumes it")

STAGE_MODULES = {name: f"cai_jax.stages.{name}" for name in configs.STAGES} | {"pretrain": "cai_jax.miniworld.pretrain"}
STOPPED_EXIT = 143  # what a launcher restarts on


def run(cfg: configs.Config, workdir: Path) -> None:
    """Every stage of `cfg.stages`, in order, under its mesh."""
    import jax

    from cai_jax.sharding import make_mesh

    open_run(workdir)
    if not (workdir / "config.json").exists():
        record_run(workdir, configs.as_dict(cfg))
    progress.watch_compiles()
    mesh = make_mesh(cfg.mesh)
    say(
        f"run {workdir}: {', '.join(cfg.stages)}; "
        f"{jax.device_count()} {jax.default_backend()} device(s), mesh {dict(mesh.shape)}"
    )
    rows = []
    with jax.set_mesh(mesh):
        for name in cfg.stages:
            began = time.monotonic()
            worked = importlib.import_module(STAGE_MODULES[name]).run(cfg, workdir, mesh)
            rows.append([name, f"{time.monotonic() - began:.1f} s" if worked else "done before"])
    record_run(workdir, configs.as_dict(cfg))  # only now: a stage that refuses today's configuration changes nothing
    table("time by stage", ["stage", "time"], rows)
    say(f"compiled {progress.compiled.total()} programs in {progress.compile_seconds:.0f} s; everything is in {workdir}")


def main(argv: list[str]) -> None:
    if argv[1:] != ["run"]:
        raise app.UsageError(f"wanted `cai run --config=FILE --workdir=DIR`, got arguments {argv[1:]}")
    if CONFIG.value is None or not WORKDIR.value:
        raise app.UsageError("--config=FILE and --workdir=DIR are both needed")
    logging.set_verbosity(logging.WARNING)  # orbax reports every file it writes
    stop_on_sigterm()
    try:
        run(configs.resolve(CONFIG.value), Path(WORKDIR.value))
    except Stopped as e:
        say(str(e))
        sys.exit(STOPPED_EXIT)
    except (InputError, configs.ConfigError, NotFinite) as e:
        say(f"error: {e}")
        sys.exit(2)


def parse(argv: list[str]) -> list[str]:
    """Flags of the command line; an unknown config key ends with its name and a suggestion."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as e:  # what a locked ConfigDict raises on a key or a section it does not have
        known = [flag for flag, _, _ in configs.walk(configs.Config())]
        given = [a.removeprefix("--config.").partition("=")[0] for a in argv if a.startswith("--config.")]
        for key in [g for g in given if g not in known] or [str(e)]:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.4)
            say(f"error: unknown configuration key {key!r}" + (f"; did you mean --config.{near[0]}?" if near else ""))
        sys.exit(2)


def cli() -> None:
    """Entry point of the console script."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
