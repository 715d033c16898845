"""Where every array of every step lies: a text for each config of real models, to be read when it changes.

python tests/golden.py        writes tests/golden/*.txt again; test_golden.py compares them
"""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from cai_jax import ahead, checks
from cai_jax.ahead.steps import steps
from cai_jax.main import with_local_models
from cai_jax.sharding import AXES, path_name

HERE = Path(__file__).parent
FOLDER, CONFIGS = HERE / "golden", HERE.parent / "configs"
MESHES = {  # what the configs say they are for: chips, and -1 of their meshes filled in
    "qwen3_0_6b": (1, 8, 1),
    "gemma3_4b": (1, 8, 1),
    "llama3_8b": (4, 32, 2),
    "mathewjohn2026": (4, 16, 4),
    "bai2022": (8, 32, 4),
}
TPU = AbstractDevice("TPU v5 lite", 1, "tpu")


def text(name: str) -> str:
    """Every argument of every step, layers together: name, shape, spec."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = with_local_models(checks.resolve(module.get_config()), ahead.local)
    mesh = AbstractMesh(MESHES[name], AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=TPU)
    lines, seen = [f"{name} on {dict(mesh.shape)}"], {}
    with jax.sharding.use_abstract_mesh(mesh):
        for step in steps(cfg, mesh):
            title = f"{step.stage}, {step.name}"
            lines += ["", f"{title}: {step.sizes}"]
            names = inspect.signature(step.lower.func.__self__).parameters
            for argument, tree in (dict(zip(names, step.lower.args, strict=False)) | step.lower.keywords).items():
                leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
                found = tuple(dict.fromkeys(f"    {line(*leaf)}" for leaf in leaves if getattr(leaf[1], "shape", ())))
                before = seen.setdefault((argument, found), title)
                if found:
                    lines += [f"  {argument}:" + f" as in {before}" * (before != title), *(found if before == title else ())]
    return "\n".join(lines) + "\n"


def line(path, x) -> str:
    """A leaf: its path, with * for the number of a layer, its shape, and along what its axes are split."""
    spec = ["+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in x.sharding.spec]
    name = re.sub(r"(^|[/_])[0-9]+(?=/)", r"\1*", path_name(path))
    return f"{name} {list(x.shape)} ({', '.join(spec)})".lstrip()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MESHES:
        (FOLDER / f"{name}.txt").write_text(text(name), encoding="utf-8")
        print(f"wrote {FOLDER.name}/{name}.txt")
