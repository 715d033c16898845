"""The commands of `cai`: flags -> locked config -> mesh -> stages.

cai run --config=configs/miniworld.py --workdir=runs/a [--config.ppo.kl_coef=0.05 ...]
        [--coordinator=HOST:PORT --processes=N --process=I]
cai ablate --config=configs/miniworld.py --workdir=runs/b [--drop=each] [--corrupt=ID,...] [--seeds=3] [--config.KEY=VALUE ...]
cai compile --config=configs/llama3_8b.py --topology=v5e:16x16 [--slices=2] [--json]
cai export --workdir=runs/a --model=rl_cai --out=DIR [--dtype=float32] [--adapter] [--check]
cai constitution lint FILE ...                                         and more, see `cai constitution --help`
cai audit --constitution=FILE --judge=MODEL --input=FILE --out=DIR     see `cai audit --help`
cai compare --run=runs/a --models=sl_cai,rl_cai --out=FILE             see `cai compare --help`
cai report --run=runs/a --out=DIR                                      see `cai report --help`
"""

import dataclasses
import difflib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cai_jax import checks, hosts, maintenance, progress, sections
from cai_jax import config as configs
from cai_jax.constitution import log
from cai_jax.errors import InputError, Stopped
from cai_jax.files import folder_of, read_json
from cai_jax.metrics import NotFinite
from cai_jax.progress import cry, say, table
from cai_jax.prompts import TEMPLATES
from cai_jax.terminal import INPUT_EXIT, STOPPED_EXIT
from cai_jax.workdir import begin_run, hand_over, open_run, record_run, stop_before_maintenance, stop_on_sigterm, versions

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file with get_config(); --config.key=value overrides", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run; the same command resumes it")
DROP = flags.DEFINE_list("drop", [], "ablate: principles left out, one at a time: ids or categories, 'each', or 'categories'")
CORRUPT = flags.DEFINE_list("corrupt", [], "ablate: likewise, of those whose words are put in an order without meaning")
SEEDS = flags.DEFINE_integer("seeds", 1, "ablate: how many, from --config.seed on")
COORDINATOR = flags.DEFINE_string("coordinator", "", "run: HOST:PORT of the first of several processes")
PROCESSES = flags.DEFINE_integer("processes", 0, "run: how many there are; 0: as SLURM or a TPU says, otherwise one")
PROCESS = flags.DEFINE_integer("process", -1, "run: the number of this one, from 0")
PATIENCE = flags.DEFINE_integer("patience", hosts.patience, "run: seconds after which a process that hangs ends; 0: never")
MODEL = flags.DEFINE_string("model", None, "export: base, sl_cai, dpo_cai, rl_cai or reward")
OUT = flags.DEFINE_string("out", None, "export: the folder to write")
DTYPE = flags.DEFINE_string("dtype", "", "export: float32 or bfloat16; default: the base's")
ADAPTER = flags.DEFINE_bool("adapter", False, "export: the adapter alone, as peft loads it")
CHECK = flags.DEFINE_bool("check", False, "export: compare its logits with those of transformers")
TOPOLOGY = flags.DEFINE_string("topology", None, "compile: a TPU slice, as v5e:16x16")
SLICES = flags.DEFINE_integer("slices", 1, "compile: how many such slices, joined by a network")
JSON = flags.DEFINE_bool("json", False, "compile: what was found also as JSON, on standard output")

STAGE_MODULES = {name: f"cai_jax.stages.{name}" for name in configs.STAGES} | {"pretrain": "cai_jax.miniworld.pretrain"}
# Exit codes: a restart would change nothing; asked to stop, after which the same command goes on, as it does after any other.


def with_local_models(cfg: configs.Config, fetch: Callable[[str, str], str] | None = None) -> configs.Config:
    """`cfg` with the folders that its models lie in, fetched from the hub if they are named so. fetch: see hf.local."""
    from cai_jax.models import hf

    def local(part, flag: str):
        """A section whose key `path`, or that of a section inside it, names a model."""
        changes = {"path": (fetch or hf.local)(part.path, flag)} if isinstance(part, configs.Checkpoint | configs.Model) else {}
        inside = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        changes |= {k: local(v, f"{flag}.{k}") for k, v in inside.items() if isinstance(v, configs.Checkpoint)}
        changes |= {"judges": tuple(map(judge, part.judges))} if isinstance(part, configs.Preferences) else {}
        return dataclasses.replace(part, **changes)

    def judge(path: str) -> str:
        try:
            return (fetch or hf.local)(path, "preferences.judges")
        except InputError as error:  # which speaks of a key `path`
            raise InputError(str(error).replace("preferences.judges.path=", "preferences.judges=")) from error

    return dataclasses.replace(cfg, **{k: local(getattr(cfg, k), k) for k in ("model", "sft", "preferences", "reward")})


def prepared(cfg: configs.Config) -> configs.Config:
    """`cfg` with its models here, and its models and data looked at. Raises InputError for what its stages could not read."""
    from cai_jax import stages

    here = with_local_models(cfg)
    if cfg.stages != ("pretrain",):
        stages.check_models(here)
        stages.check_data(here)
    return here


def join() -> None:
    """Makes this process one of its run, which is told when its machine will end, and counts what it compiles."""
    import jax

    hosts.patience = PATIENCE.value
    hosts.join(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    hand_over()
    if jax.default_backend() == "tpu" or maintenance.HOST in os.environ:
        stop_before_maintenance()
    progress.watch_compiles()


def run(cfg: configs.Config, workdir: Path) -> None:
    """Every stage of `cfg.stages`, in order, under its mesh; of a study, those of every variant."""
    import jax

    if cfg.study.variants:
        from cai_jax import study

        study.run(cfg, workdir, run)
        return

    from cai_jax.sharding import make_mesh

    who = hosts.check({"config": sections.as_dict(cfg)} | versions())
    open_run(workdir)
    entry = log.entry_of(cfg.constitution.path, TEMPLATES)
    hosts.once(begin_run, workdir, sections.as_dict(cfg), entry)
    mesh = make_mesh(cfg.mesh)
    checks.check_batches(cfg, mesh.shape["data"] * mesh.shape["fsdp"])
    say(
        f"run {workdir}: {', '.join(cfg.stages)}; {who}, "
        f"{jax.device_count()} {jax.default_backend()} device(s), mesh {dict(mesh.shape)}"
    )
    rows = []
    here = hosts.together(prepared, cfg)
    with jax.set_mesh(mesh):
        for name in cfg.stages:
            began = time.monotonic()
            worked = importlib.import_module(STAGE_MODULES[name]).run(here, workdir, mesh)
            rows.append([name, f"{time.monotonic() - began:.1f} s" if worked else "done before"])
    record_run(workdir, sections.as_dict(cfg), entry)  # only now: a stage that refuses today's configuration changes nothing
    table("time by stage", ["stage", "time"], rows)
    say(f"compiled {progress.compiled.total()} programs in {progress.compile_seconds:.0f} s; everything is in {workdir}")


def export(workdir: Path, name: str, out: Path) -> None:
    """A model of a run as a Hugging Face folder."""
    import jax

    from cai_jax import export as exports
    from cai_jax import stages
    from cai_jax.sharding import make_mesh

    if name not in exports.NAMES:
        raise InputError(f"--model={name}: wanted one of {', '.join(exports.NAMES)}")
    if not (workdir / "config.json").is_file():
        raise InputError(f"--workdir={workdir}: no run is there, it has no config.json")
    mesh = make_mesh((1, -1, 1))
    cfg = checks.resolve(read_json(workdir / "config.json"))
    with jax.set_mesh(mesh):
        named = stages.checkpoint(cfg, name).path  # as its users know it, and not where it is on this machine
        lm = exports.export(with_local_models(cfg), workdir, name, out, mesh, DTYPE.value, ADAPTER.value, named)
        say(f"{name} of {workdir} is in {out}")
        if CHECK.value:
            off, largest = exports.check(out, name, mesh, lm)
            say(f"largest difference from transformers: {off:.2g}, of values up to {largest:.3g}")
            if off > exports.TOLERANCE * max(1.0, largest):
                raise InputError(f"{out}: transformers computes other values with it")


def compile_steps(cfg: configs.Config) -> bool:
    """Compiles every step of `cfg` for a topology and shows what each takes. -> whether all fit."""
    from cai_jax import ahead

    began = time.monotonic()
    rows = ahead.rehearse(with_local_models(cfg, ahead.local), TOPOLOGY.value, SLICES.value)
    if JSON.value:
        print(json.dumps(rows, indent=1))
    table(f"{SLICES.value} x {TOPOLOGY.value}, of each device", ahead.HEADER, list(map(ahead.cells, rows)))
    for row in rows:
        if warning := ahead.warning(row):
            say(warning)
    say(f"compiled {len(rows)} steps in {time.monotonic() - began:.0f} s")
    return all(row["fits"] for row in rows)


def main(argv: list[str]) -> None:
    needed = {
        "run": {"config": CONFIG, "workdir": WORKDIR},
        "ablate": {"config": CONFIG, "workdir": WORKDIR},
        "compile": {"config": CONFIG, "topology": TOPOLOGY},
        "export": {"workdir": WORKDIR, "model": MODEL, "out": OUT},
    }
    if len(argv) != 2 or argv[1] not in needed:
        commands = ", ".join(f"`cai {name}`" for name in (*needed, "constitution"))
        raise app.UsageError(f"wanted {commands}, `cai audit`, `cai compare` or `cai report`, got arguments {argv[1:]}")
    if missing := [f"--{name}" for name, flag in needed[argv[1]].items() if not flag.value]:
        raise app.UsageError(f"cai {argv[1]} needs {' and '.join(missing)}")
    if argv[1] != "ablate" and (given := [f"--{f.name}" for f in (DROP, CORRUPT, SEEDS) if f.present]):
        raise app.UsageError(f"{given[0]} is a flag of `cai ablate`")
    logging.set_verbosity(logging.WARNING)  # orbax reports every file it writes
    stop_on_sigterm()
    code = 0
    try:
        if argv[1] == "run":
            join()
            run(checks.resolve(CONFIG.value), folder_of(WORKDIR.value))
        elif argv[1] == "ablate":
            from cai_jax.ablate import ablate

            join()
            ablate(checks.resolve(CONFIG.value), folder_of(WORKDIR.value), DROP.value, CORRUPT.value, SEEDS.value, run)
        elif argv[1] == "compile":
            code = 0 if compile_steps(checks.resolve(CONFIG.value)) else 1
        else:
            export(folder_of(WORKDIR.value), MODEL.value, Path(OUT.value))
    except Stopped as e:
        say(str(e))
        code = STOPPED_EXIT
    except (InputError, checks.ConfigError, NotFinite) as e:
        cry(f"error: {e}")
        code = INPUT_EXIT
    except Exception as e:
        if hosts.count() == 1:
            raise
        traceback.print_exc()
        cry(f"error: {e}\nif this is about messages between processes, another one ended; the same command on all goes on")
        code = hosts.LOST_EXIT
    hosts.leave(code)


def parse(argv: list[str]) -> list[str]:
    """Flags of the command line; an unknown config key ends with its name and a suggestion."""
    known = [flag for flag, _, _ in sections.walk(configs.Config())]
    given = [a.removeprefix("--config.").partition("=")[0] for a in argv if a.startswith("--config.")]
    for file in (a.removeprefix("--config=") for a in argv if a.startswith("--config=")):
        if not Path(file).is_file():
            say(f"error: --config={file}: no such file; paths are relative to where the command is run")
            sys.exit(2)
    for key in given:
        if inside := [k for k in known if k.startswith(f"{key}.")]:
            say(f"error: --config.{key} is a section; did you mean --config.{inside[0]}?")
            sys.exit(2)
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as e:  # what a locked ConfigDict raises on a key or a section it does not have
        for key in [g for g in given if g not in known] or [str(e)]:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.4)
            say(f"error: unknown configuration key {key!r}" + (f"; did you mean --config.{near[0]}?" if near else ""))
        sys.exit(2)


def cli() -> None:
    """The command line, to its end."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
