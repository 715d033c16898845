"""The text of a compiled program: its computations, their operations, and what those say of themselves."""

import re
from math import prod
from typing import NamedTuple

import numpy as np

LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    far: bool  # in the device's main memory, not in that of a core

    def bytes(self) -> float:
        bits = {"pred": 8, "token": 0, "opaque": 0}.get(self.dtype) or int((re.search(r"\d+", self.dtype) or [0])[0])
        return prod(self.dims) * bits / 8


class Op(NamedTuple):
    name: str
    kind: str
    shapes: list[Shape]  # of its results
    operands: list[str]
    rest: str  # attributes, as printed

    def called(self, attribute: str) -> list[str]:
        found = re.search(attribute + r"=(?:\{([^}]*)\}|(%[\w.\-]+))", self.rest)
        return NAME.findall(found[1] or found[2]) if found else []

    def numbers(self, attribute: str, default=()) -> list[int]:
        found = re.search(attribute + r"=\{([\d,]*)\}", self.rest)
        return [int(n) for n in found[1].split(",") if n] if found else list(default)

    def scope(self) -> str:
        return (re.search(r'op_name="([^"]*)"', self.rest) or ["", ""])[1]


class Unknown(ValueError):
    """The text has something that is not understood, so that a count would be wrong."""


def _balanced(text: str, at: int) -> int:
    """The place behind the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise Unknown(f"a parenthesis stays open: {text[:200]}")


def _shapes(text: str) -> list[Shape]:
    found = SHAPE.findall(text)
    return [Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout) for dtype, dims, layout in found]


def parse(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """-> (computation -> its operations by name, the last one its result; the name of the first to run)."""
    computations, entry, current = {}, "", None
    text = re.sub(r"=\{\n.*\n\}\}", "={}}", text)  # what kernels say of themselves stands on lines of its own
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := LINE.match(line)):
            rest = re.sub(r"/\*.*?\*/", "", found[3])
            end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
            kind = re.match(r" ?([\w\-]+)\(", rest[end:])
            if not kind:
                raise Unknown(f"not an operation: {line[:200]}")
            start = end + kind.end() - 1
            stop = _balanced(rest, start)
            inside = rest[start + 1 : stop - 1]
            operands = NAME.findall(inside)
            # A constant's value and a parameter's number stand where others have operands.
            after = rest[stop:] if operands or kind[1] not in ("constant", "parameter") else f"value={inside}{rest[stop:]}"
            current[found[2]] = Op(found[2], kind[1], _shapes(rest[:end]), operands, after)
            if found[1]:
                current["ROOT"] = current[found[2]]
    return computations, entry


def number(op: Op) -> int:
    found = re.match(r"value=(-?\d+)", op.rest)
    return int(found[1]) if found else 0


def through(op: Op, inside: dict[str, Op]) -> Op:
    """What a value was before it was only moved or converted."""
    while op.kind in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        op = inside[op.operands[0]]
    return op


def origin(op: Op, place: int, here: dict[str, Op]) -> Op:
    """What stands at a place of a tuple, before it was only moved."""
    return through(here[op.operands[place]] if op.kind == "tuple" else op, here)


def convolution(op: Op, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Products are convolutions to the TPU compiler, batch axes are spatial ones with holes. What falls into a hole or on
    padding is not multiplied."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()
    result, spatial = op.shapes[0].dims, sorted(c for c in out if c.isdigit())
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", op.rest) or ["", ""])[1]))

    def of(key: str, i: int, default: str) -> list[int]:
        return [int(n) for n in window.get(key, "x".join([default] * len(spatial))).split("x")[i].split("_")]

    pairs = 1
    for i, c in enumerate(spatial):
        (size,), (stride,), (holes,), (spread,) = (of(k, i, "1") for k in ("size", "stride", "lhs_dilate", "rhs_dilate"))
        low = of("pad", i, "0_0")[0]
        at = np.arange(result[out.index(c)])[:, None] * stride + np.arange(size)[None] * spread - low
        pairs *= int(((at >= 0) & (at <= (lhs[left.index(c)] - 1) * holes) & (at % holes == 0)).sum())
    return 2.0 * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")] * pairs


def groups(rest: str, devices: int) -> np.ndarray:
    """Which devices talk to one another. -> their numbers [groups, devices of one]."""
    if found := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]+\})\}", rest):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, order, turn = ([int(n) for n in x.split(",")] if x else None for x in found.groups())
        return np.arange(prod(order)).reshape(order).transpose(turn).reshape(shape)
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", rest
    ):
        axes, chosen = dict(re.findall(r"'(\w+)'=(\d+)", found[1])), re.findall(r"'(\w+)'", found[4])
        if ":" in found[4]:
            raise Unknown(f"a part of an axis: {found[0]}")
        order, turn = ([int(n) for n in x.split(",")] if x else None for x in found.groups()[1:3])
        ids = np.arange(prod(map(int, axes.values())))
        ids = ids.reshape(order or -1).transpose(turn).reshape([int(n) for n in axes.values()])
        turn = sorted(range(len(axes)), key=lambda i: list(axes)[i] in chosen)
        return ids.transpose(turn).reshape(-1, prod(int(axes[name]) for name in chosen))
    if found := re.search(r"(?:replica_groups|source_target_pairs)=(?!\{\}).{,200}", rest):
        raise Unknown(f"groups of devices: {found[0]}")
    return np.arange(devices)[None]
