"""The `cai` command: flags -> locked config -> mesh -> stages.

    cai run --config=configs/miniworld.py --workdir=runs/a [--config.ppo.kl_coef=0.05 ...]
"""

import importlib
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cai_jax import config as configs
from cai_jax.progress import say, table
from cai_jax.workdir import InputError, Stopped, begin_run, stop_on_sigterm

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(); override with --config.key=value", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run; the same command resumes it")

STAGE_MODULES = {name: f"cai_jax.stages.{name}" for name in configs.STAGES} | {"pretrain": "cai_jax.miniworld.pretrain"}
STOPPED_EXIT = 143  # what a launcher restarts on


def run(cfg: configs.Config, workdir: Path) -> None:
    """Every stage of `cfg.stages`, in order, under its mesh."""
    import jax

    from cai_jax.sharding import make_mesh

    begin_run(workdir, configs.as_dict(cfg))
    mesh = make_mesh(cfg.mesh)
    say(f"run {workdir}: stages {', '.join(cfg.stages)}; {jax.device_count()} {jax.default_backend()} device(s), mesh {dict(mesh.shape)}")
    rows = []
    with jax.set_mesh(mesh):
        for name in cfg.stages:
            began = time.monotonic()
            worked = importlib.import_module(STAGE_MODULES[name]).run(cfg, workdir, mesh)
            rows.append([name, f"{time.monotonic() - began:.1f} s" if worked else "done before"])
    table("time by stage", ["stage", "time"], rows)


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
    except (InputError, configs.ConfigError) as e:
        say(f"error: {e}")
        sys.exit(2)


def cli() -> None:
    """Entry point of the console script."""
    app.run(main)


if __name__ == "__main__":
    cli()
