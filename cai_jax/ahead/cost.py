"""What a compiled program does, counted from its text: one device's products, memory traffic and messages.

Loops count as often as they run, which XLA's own cost analysis leaves out, and the products of fused kernels by what they
compute. A fusion reads and writes what goes in and out of it, and of what it only takes a slice of, the slice.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from cai_jax.ahead.hlo import Op, Shape, Unknown, convolution, groups, number, origin, parse, through
from cai_jax.models.kernels import BLOCKS

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota recv".split()
SLICES = ("dynamic-slice", "slice", "gather")
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}  # products [T, H] x [H, T] or alike of each


@dataclass
class Cost:
    """Of one device."""

    flops: float = 0.0  # of products, a multiplication and an addition each counted
    bytes: float = 0.0  # read from and written to main memory
    sent: Counter = field(default_factory=Counter)  # (kind, whether it crosses slices) -> bytes that leave the device
    calls: Counter = field(default_factory=Counter)  # likewise -> how often

    def add(self, other: "Cost", times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for mine, theirs in ((self.sent, other.sent), (self.calls, other.calls)):
            for key, n in theirs.items():
                mine[key] += times * n


def cost(text: str, devices: int, slices: int = 1, loops: Mapping[str, float] | None = None) -> Cost:
    """Of a program as `compiled.as_text()` prints it, for so many devices in so many slices of equal size.

    loops: how often a loop runs that the data decide about, by a part of its name (see jax.named_scope). Raises Unknown for
    another such loop.
    """
    program = _Program(text, devices, slices, loops or {})
    return program.of(program.entry)


class _Program:
    def __init__(self, text: str, devices: int, slices: int, loops: Mapping[str, float]):
        self.computations, self.entry = parse(text)
        self.devices, self.slices, self.loops, self.known = devices, slices, loops, {}

    def ops(self, name: str) -> list[Op]:
        return [op for key, op in self.computations[name].items() if key != "ROOT"]

    def of(self, name: str) -> Cost:
        """Of a computation that runs step by step."""
        if name not in self.known:
            total, messages, here = Cost(), {}, self.computations[name]
            for op in self.ops(name):
                if op.kind == "while":
                    times = self.trips(op, here)
                    for part in ("body", "condition"):
                        total.add(self.of(op.called(part)[0]), times)
                elif op.kind == "conditional":
                    names = [n for a in ("branch_computations", "true_computation", "false_computation") for n in op.called(a)]
                    total.add(max(map(self.of, names), key=lambda c: (c.flops, c.bytes)))
                elif op.kind in ("call", "async-start"):
                    total.add(self.of((op.called("calls") or op.called("to_apply"))[0]))
                elif op.kind not in FREE and not op.kind.endswith(("-done", "-update")):
                    flops, sent = self.inside(op, here)
                    total.flops += flops
                    messages |= sent
                    total.bytes += 0 if sent and op.kind != "fusion" else self.moved(op, here)
            for message in messages.values():
                total.add(message)
            self.known[name] = total
        return self.known[name]

    def inside(self, op: Op, here: dict[str, Op]) -> tuple[float, dict[str, Cost]]:
        """Of an operation and of what is fused into it: products, and what is sent by each message. One that goes on beside
        other work has a start and an end, and stands in each piece of that work too, in inner loops as in others: its start
        counts."""
        if op.kind.removesuffix("-start") in COLLECTIVES:
            return 0.0, {op.name: self.sent(op, here)}
        if op.kind == "send":
            return 0.0, {op.name: self.far(op, here)}
        if op.kind != "fusion":
            return self.flops(op, here), {}
        name = op.called("calls")[0]
        found = [self.inside(x, self.computations[name]) for x in self.ops(name)]
        out = {f"{op.name} {k}": c for _, sent in found for k, c in sent.items()}
        if op.name.startswith("async-collective-done") or name.startswith("async_collective_fusion"):
            out = {}
        # What only takes its part of a sum is one kernel, which sends no more than that.
        out = {k: _scattered(c) for k, c in out.items()} if name.startswith("all-reduce-scatter") else out
        return sum(flops for flops, _ in found), out

    def flops(self, op: Op, here: dict[str, Op]) -> float:
        if op.kind == "dot":
            lhs = here[op.operands[0]].shapes[0].dims
            return 2 * prod(op.shapes[0].dims) * prod(lhs[i] for i in op.numbers("lhs_contracting_dims"))
        if op.kind == "convolution":
            return convolution(op, *(here[name].shapes[0].dims for name in op.operands[:2]))
        if op.kind == "reduce" and through(here[op.operands[0]], here).kind == "multiply":  # so few rows that it is no product
            return 2 * prod(here[op.operands[0]].shapes[0].dims)
        if op.kind == "custom-call" and "tpu_custom_call" in op.rest:
            return self.kernel(op, here)
        return 0.0

    def kernel(self, op: Op, here: dict[str, Op]) -> float:
        """A fused attention: what its blocks compute that are not wholly hidden."""
        if "paged_attention" in op.scope():
            q, pages, _ = (s.dims for x in op.operands for s in here[x].shapes if s.dtype[0] in "bf")
            return 4.0 * prod(q) * prod(pages[:3]) / q[0]  # all slots of a row, also those that it has not filled
        products = next((n for name, n in KERNELS.items() if name in op.scope()), None)
        q = next((s.dims for x in op.operands for s in here[x].shapes if len(s.dims) >= 3 and s.dtype[0] in "bf"), None)
        if not products or not q:
            raise Unknown(f"a kernel that is not known: {op.scope() or op.name}")
        *lead, T, H = q
        block = next(size for size in BLOCKS if T % size == 0)
        return 2.0 * products * prod(lead) * H * T * (T + block) / 2

    def moved(self, op: Op, here: dict[str, Op]) -> float:
        """Bytes of main memory that an operation reads and writes."""
        if op.kind == "fusion":
            name = op.called("calls")[0]
            inside = self.computations[name]
            read = sum(self.taken(name, i, here[x].shapes[0]) for i, x in enumerate(op.operands) if here[x].shapes)
            return read + self.written(inside["ROOT"], inside)
        if op.kind in SLICES:
            return 2 * _far(op.shapes)
        if op.kind in ("dynamic-update-slice", "scatter"):
            return 2 * _far(here[op.operands[-1 if op.kind == "scatter" else 1]].shapes)
        if op.kind.endswith("-start"):
            return _far(op.shapes[:2])
        return _far(op.shapes) + sum(_far(here[x].shapes) for x in op.operands)

    def taken(self, name: str, place: int, shape: Shape) -> float:
        """Bytes that a fused computation reads of its operand at `place`."""
        if not shape.far:
            return 0.0
        own = next(op for op in self.ops(name) if op.kind == "parameter" and number(op) == place)
        return min(shape.bytes(), self.used(own, self.computations[name]))

    def used(self, op: Op, inside: dict[str, Op]) -> float:
        """Bytes that are read of a value, which is whole unless all its users take slices of it."""
        total = 0.0
        for user in (x for key, x in inside.items() if key != "ROOT" and op.name in x.operands):
            if user.kind in SLICES and user.operands[0] == op.name:
                total += sum(s.bytes() for s in user.shapes)
            elif user.kind == "dynamic-update-slice" and user.operands[0] == op.name:
                total += 0.0  # it is changed where it lies
            elif user.kind in ("bitcast", "get-tuple-element"):
                total += self.used(user, inside)
            elif user.kind == "fusion":
                called, at = user.called("calls")[0], user.operands.index(op.name)
                total += self.taken(called, at, op.shapes[0]._replace(far=True))
            else:
                return sum(s.bytes() for s in op.shapes)
        return total

    def written(self, op: Op, inside: dict[str, Op]) -> float:
        if op.kind == "tuple":
            return sum(self.written(inside[x], inside) for x in op.operands)
        if op.kind == "bitcast" and op.operands[0] in inside and inside[op.operands[0]].kind == "dynamic-update-slice":
            op = inside[op.operands[0]]
        if op.kind == "dynamic-update-slice":
            return sum(s.bytes() for s in inside[op.operands[1]].shapes)
        if op.kind == "fusion":
            called = self.computations[op.called("calls")[0]]
            return self.written(called["ROOT"], called) if any(s.far for s in op.shapes) else 0.0
        return _far(op.shapes)

    def sent(self, op: Op, here: dict[str, Op]) -> Cost:
        """Bytes that leave each device, as the rings and trees that are optimal in bytes send them."""
        kind, (size, far) = op.kind.removesuffix("-start"), self.group(op)
        # Results of a "-start" hold what is given too, so what is received is told from that.
        given = sum(s.bytes() for x in op.operands for s in here[x].shapes)
        share = (size - 1) / size
        whole = {"all-gather": given * size * share, "all-reduce": 2 * given * share, "collective-permute": given}
        received = given * size if kind == "all-gather" else given
        moved = given + received if size > 1 else 0.0
        return Cost(0.0, moved, Counter({(kind, far): whole.get(kind, given * share)}), Counter({(kind, far): 1}))

    def far(self, op: Op, here: dict[str, Op]) -> Cost:
        """What goes to other slices, which TPUs do through their hosts: bytes that leave each device."""
        kind = (re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest) or [""] * 2)[1].lower().replace("_", "-")
        if kind not in COLLECTIVES:
            raise Unknown(f"a message to another slice that is not known: {kind or op.rest[:200]}")
        given = sum(s.bytes() for s in here[op.operands[0]].shapes)
        times = 2 * (self.slices - 1) / self.slices if kind == "all-reduce" else 1.0
        return Cost(0.0, 2 * given, Counter({(kind, True): times * given}), Counter({(kind, True): 1}))

    def group(self, op: Op) -> tuple[int, bool]:
        """-> (devices that take part together, whether in several slices)."""
        ids = groups(op.rest, self.devices)
        slices = ids // (self.devices // self.slices)
        return ids.shape[1], bool((slices != slices[:, :1]).any())

    def trips(self, op: Op, here: dict[str, Op]) -> float:
        """How often a loop runs: as the compiler knows, by a counter that goes up to a constant, or as `loops` says."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
            return int(known[1])
        condition, body = (self.computations[op.called(part)[0]] for part in ("condition", "body"))
        test = condition["ROOT"]
        if test.kind == "compare" and "direction=LT" in test.rest:
            counter, last = (condition[x] for x in test.operands)
            if counter.kind == "get-tuple-element" and last.kind == "constant":
                place = int(re.search(r"index=(\d+)", counter.rest)[1])
                start, after = (origin(x["ROOT"] if x is body else x[op.operands[0]], place, x) for x in (here, body))
                steps = [x for x in map(body.get, after.operands) if x.kind == "constant"] if after.kind == "add" else []
                if start.kind == "constant" and steps:
                    return -(-(number(last) - number(start)) // number(steps[0]))
        named = [name for name in re.findall(r"\w+", op.scope()) if name in self.loops]
        if not named:
            raise Unknown(f"how often does the loop {op.scope() or op.name!r} run?")
        return self.loops[named[-1]]


def _scattered(c: Cost) -> Cost:
    """A sum of which each device takes its part, from one that all have whole."""
    sent = Counter({("reduce-scatter", far): n / 2 for (_, far), n in c.sent.items()})
    return Cost(c.flops, c.bytes, sent, Counter({("reduce-scatter", far): n for (_, far), n in c.calls.items()}))


def _far(shapes: list[Shape]) -> float:
    return sum(s.bytes() for s in shapes if s.far)
