"""The architecture, kept by a test: who may import whom, where a library may appear, and how long things may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cai_jax"

# Lowest first: the tiers of the design by number, some of them in several steps. A module imports lower steps only.
TIERS = (
    {"errors", "maintenance", "intervals"},  # 0: the ground
    {"files", "hosts", "terminal"},
    {"progress"},
    {"workdir"},
    {"records", "sharding", "sections"},
    {"config"},
    {"checks"},
    {"constitution", "losses", "canvas", "sampling", "metrics", "optim", "checkpoints", "tokenizer"},
    {"prompts", "models", "figures", "paper", "markup"},  # 1
    {"formats", "sources", "trees", "stops", "logprobs", "panel", "passages"},
    {"data"},
    {"evals"},
    {"slots", "pairs", "gate"},  # 2
    {"generate", "score"},
    {"train"},  # 3
    {"experience"},
    {"stages", "miniworld", "evaluation", "watch", "gallery"},  # 4: the last three stand between what stages share and them
    {"export", "ahead", "judge", "outcomes", "ablate"},  # 5
    {"study"},
    {"main", "commands"},
    {"audit", "compare", "report"},  # which say things as commands do
    {"__main__"},
)
TIER = {room: tier for tier, rooms in enumerate(TIERS) for room in rooms}

# What may be imported inside a room, or across rooms of one tier: importer -> imported, both by prefix.
SIBLINGS = (
    ("config.", "config."),
    ("models.", "models."),
    ("constitution.", "constitution."),
    ("ahead.", "ahead."),
    ("audit.", "audit."),
    ("evals.", "evals."),
    ("gallery.", "gallery."),
    ("gallery", "evaluation"),
    ("gallery.", "stages"),
    ("stages.report", "gallery."),
    ("compare.", "compare."),
    ("miniworld.", "miniworld."),
    ("stages.", "evaluation"),
    ("stages.", "watch"),
    ("watch", "evaluation"),
    ("watch", "stages"),
    ("stages.", "stages"),  # what stages share stands in stages/__init__.py
    ("stages.referee", "stages.reward"),  # the same on other comparisons
    ("stages.evaluate", "stages.preferences"),  # whose judge it asks
    ("evaluation", "miniworld."),
    ("evaluation", "stages"),
)

# A library, or a name of one -> the only places that may import it.
ONLY_IN = {
    "flax.linen": ("models.",),
    "orbax": ("checkpoints",),
    "absl.flags": ("main",),
    "transformers": ("tokenizer", "miniworld.make", "models.families", "export"),  # tokenizers, config.json, the check
    "tokenizers": ("tokenizer", "miniworld.make"),
}

MAX_FILE, MAX_FUNCTION = 300, 60


def module_name(path, package=PACKAGE):
    """'stages.sft' for cai_jax/stages/sft.py; a package's __init__.py has the package's name."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(tree, modules):
    """Full dotted names that a syntax tree imports, at any depth: 'a.b' for `from a import b`, when that is the finer name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                inside = node.module.startswith("cai_jax")
                yield node.module if inside and full.removeprefix("cai_jax.") not in modules else full


def forbidden(importer, tree, modules):
    """Sentences on each import of a module that the layers do not allow."""
    for name in sorted(set(imports(tree, modules))):
        if name == "cai_jax" or name.startswith("cai_jax."):
            target = name.removeprefix("cai_jax").removeprefix(".")
            if target and not allowed(importer, target):
                yield f"{importer} imports {target}"
        for library, places in ONLY_IN.items():
            if f"{name}.".startswith(f"{library}.") and not any(matches(importer, place) for place in places):
                yield f"{importer} imports {name}, which belongs to {', '.join(places)}"


def allowed(importer, target):
    here, there = importer.split(".")[0], target.split(".")[0]
    lower = here in TIER and there in TIER and TIER[there] < TIER[here]
    return lower or any(matches(importer, a) and matches(target, b) for a, b in SIBLINGS)


def matches(module, prefix):
    """'models.' matches everything in models and models itself; 'main' matches main only."""
    return f"{module}.".startswith(prefix) if prefix.endswith(".") else module == prefix


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_module_has_a_tier():
    rooms = {name.split(".")[0] for name in MODULES if name != "__init__"}
    assert rooms <= TIER.keys(), f"give {sorted(rooms - TIER.keys())} a tier in {Path(__file__).name}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_keep_to_the_layers(name):
    assert list(forbidden(name, parse(MODULES[name]), MODULES)) == []


@pytest.mark.parametrize(
    "importer, line, complaint",
    [
        ("losses", "from cai_jax import sampling", "losses imports sampling"),
        ("records", "from cai_jax.workdir import write_text", None),
        ("workdir", "import cai_jax.records", "workdir imports records"),
        ("prompts", "from cai_jax.constitution import Principle", None),
        ("constitution", "from cai_jax import prompts", "constitution imports prompts"),
        ("score", "from cai_jax.generate import run", "score imports generate"),
        ("models.heads", "from cai_jax.models import transformer", None),
        ("models.heads", "from cai_jax.generate import run", "models.heads imports generate"),
        ("stages.ppo", "from cai_jax.stages import sft", "stages.ppo imports stages.sft"),
        ("stages.ppo", "from cai_jax.stages.sft import run", "stages.ppo imports stages.sft"),
        ("stages.ppo", "from cai_jax.stages import load_model", None),
        ("stages", "from cai_jax.stages import ppo", "stages imports stages.ppo"),
        ("stages.ppo", "import cai_jax.train", None),
        ("evaluation", "from cai_jax.miniworld.oracle import judge", None),
        ("stages.ppo", "from cai_jax.miniworld import oracle", "stages.ppo imports miniworld.oracle"),
        ("miniworld.pretrain", "from cai_jax.miniworld import grammar", None),
        ("miniworld.pretrain", "from cai_jax.stages import sft", "miniworld.pretrain imports stages.sft"),
        ("train", "from cai_jax.main import cli", "train imports main"),
        ("main", "from cai_jax.stages import sft, ppo", None),
        ("train", "from flax import linen as nn", "train imports flax.linen, which belongs to models."),
        ("train", "import flax.linen as nn", "train imports flax.linen, which belongs to models."),
        ("train", "from flax import struct", None),
        ("models.heads", "from flax.linen import Module", None),
        ("train", "import orbax.checkpoint", "train imports orbax.checkpoint, which belongs to checkpoints"),
        ("config", "from absl import flags", "config imports absl.flags, which belongs to main"),
        ("config", "from absl import logging", None),
        (
            "models.hf",
            "def f():\n  from transformers import AutoTokenizer",
            "models.hf imports transformers.AutoTokenizer, which belongs to tokenizer, miniworld.make, models.families, export",
        ),
    ],
)
def test_the_check_itself(importer, line, complaint):
    modules = {"sampling", "prompts", "models.transformer", "stages.sft", "stages.ppo", "miniworld.oracle", "miniworld.grammar"}
    found = list(forbidden(importer, ast.parse(line), modules))
    assert found == ([complaint] if complaint else [])


def reads_with_default(tree):
    """Lines of `cfg.get(...)` and the like: a default there is a second, hidden config."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            owner = node.func.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in ("cfg", "config"):
                yield node.lineno


@pytest.mark.parametrize("name", MODULES)
def test_no_default_is_given_where_a_config_is_read(name):
    assert list(reads_with_default(parse(MODULES[name]))) == []
    assert list(reads_with_default(ast.parse("x = 1\ny = cfg.ppo.get('kl', x)\nz = table.get(x)"))) == [2]


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short(name):
    length = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    functions = [n for n in ast.walk(parse(MODULES[name])) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: n for f in functions if (n := f.end_lineno - f.lineno + 1) > MAX_FUNCTION}
    assert length <= MAX_FILE and not long, f"{length} lines; long functions: {long}"


def test_importing_everything_touches_no_device():
    """Devices must be free to be chosen, and processes to be joined, after the imports."""
    names = ["cai_jax" if n == "__init__" else f"cai_jax.{n}" for n in MODULES]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'an import started a jax backend'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
