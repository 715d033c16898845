"""The engine's host side: contexts in, sampled texts out, in input order and the same whatever the slots do.

A chain is a generator of what one record asks the model, one text after another: it yields a Request and is sent the answer. It
stays in one slot, and each context is read from where it departs from what the slot holds: a revision goes on from its
critique's cache, a second sample of a prompt reads one token. What contexts begin with in common, such as worked examples, is
read once for all slots.
"""

from collections import Counter, deque
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.config import Sampling
from cai_jax.data import bucket
from cai_jax.errors import InputError
from cai_jax.models import LM
from cai_jax.progress import Progress, say
from cai_jax.prompts import TEMPLATES, read_back, stops
from cai_jax.records import Journal
from cai_jax.sampling import record_key_data
from cai_jax.sharding import batch_ways, exact_div, put_batch
from cai_jax.slots import PIECE, Reading, Rules, decode, grow, needed, new, read, read_text, ready
from cai_jax.stops import stop_table
from cai_jax.trees import WORTH, common, shared
from cai_jax.workdir import raise_if_stopping

IN_A_ROW = 8  # texts at most that share a slot for their contexts: more would leave slots idle at the end
LONG = 256  # tokens of a slot: in longer ones, texts of which it holds nothing are read without the rest, for more programs
REFILL = 4  # slots are filled again when one of so many is free: filling fewer at once, or waiting longer, costs more


class Request(NamedTuple):
    key: str  # of the noise: "<record id>/<turn>"
    context: str  # the text to continue
    temperature: float | None = None  # where it is not that of the sampling; 0: greedy
    max_tokens: int | None = None  # where it is less than that of the sampling


Chain = Generator[Request, dict | None, Any]


def fits(lm: LM, context: str, max_tokens: int) -> bool:
    """Whether the model's context holds this one and max_tokens more."""
    return len(lm.tok.prompt(context)) + max_tokens <= lm.cfg.max_length


def sample_texts(
    lm: LM,
    requests: list[Request],
    sampling: Sampling,
    seed: int,
    journal: Journal,
    mesh,
    templates=TEMPLATES,
    what: str = "responses",
    stoppable: bool = True,
) -> list[dict]:
    """Continues every context. -> per request, in order: {"text", "tokens", "finished"}. See `sample_chains`.

    Requests that follow one another and have much of their contexts in common share a slot and its cache.
    """
    ids = [lm.tok.prompt(r.context) for r in requests]
    for r, row in zip(requests, ids, strict=True):
        require_room(lm, r, row, sampling, journal)
    first = len(common(ids))

    def chain(group: list[Request]) -> Chain:
        out = []
        for r in group:
            out.append((yield r))
        return out

    groups: list[list[Request]] = []
    for i, r in enumerate(requests):
        again = shared(ids[i], ids[i - 1]) - first if i else 0
        if again >= WORTH and again * 2 > len(ids[i]) - first and len(groups[-1]) < IN_A_ROW:
            groups[-1].append(r)
        else:
            groups.append([r])
    chains = {" ".join(r.key for r in group): chain(group) for group in groups}
    done = sample_chains(lm, chains, sampling, seed, journal, mesh, templates, what, stoppable=stoppable)
    return [answer for key in chains for answer in done[key]]


def require_room(lm: LM, r: Request, ids: list[int], sampling: Sampling, journal: Journal) -> None:
    """Raises InputError when the model's context does not hold a request and its answer."""
    if len(ids) + sampling.max_tokens > lm.cfg.max_length:
        raise InputError(
            f"record {r.key!r}: its prompt of {len(ids)} tokens and {sampling.max_tokens} new ones pass the model's "
            f"context of {lm.cfg.max_length}; shorten the prompt or --config.{journal.path.parent.name}.sampling.max_tokens"
        )


def sample_chains(
    lm: LM,
    chains: dict[str, Chain],
    sampling: Sampling,
    seed: int,
    journal: Journal,
    mesh,
    templates=TEMPLATES,
    what: str = "responses",
    prefix: str = "",
    stoppable: bool = True,
) -> dict[str, Any]:
    """Runs every chain to its end. -> what each returned (JSON values), in order.

    A chain is sent {"text", "tokens", "finished"} for each request, or None where the model's context does not hold its own and
    sampling.max_tokens more; for a first request that is an InputError. `finished` is False for a text cut off at
    max_tokens; one that goes on with a cue of `templates` ends before it. `prefix`: what many contexts begin with.

    Chains that ended are in the journal and not run again. A text is a function of (model, context, sampling, seed, the
    journal folder's stage, its request's key): not of slots, order or restarts. `stoppable`: after SIGTERM Stopped is raised.
    """
    stage = journal.path.parent.name
    first = {key: next(chain) for key, chain in chains.items()}
    ids = {key: lm.tok.prompt(r.context) for key, r in first.items()}
    for key, r in first.items():
        require_room(lm, r, ids[key], sampling, journal)
    waiting = sorted(chains.keys() - journal.done.keys(), key=lambda k: (bucket(len(ids[k])), len(ids[k]), k))
    if waiting:
        begins = lm.tok.prompt(prefix) if prefix else common(list(ids.values()))
        pool = Pool(lm, sampling, seed, stage, mesh, templates, begins)
        pool.reserve(max(len(row) - pool.own(row) for row in ids.values()))  # of all, so that sizes do not depend on a restart
        done = len(chains) - len(waiting)
        with Progress(f"{stage}: {what}", len(chains), done, "record") as progress:
            for ended in _ended(pool, {key: (chains[key], first[key]) for key in waiting}, stoppable):
                journal.add(ended)
                done += len(ended)
                progress.update(done)
        say(f"{stage}: {what}: {pool.summary()}")
    return {key: journal.done[key]["result"] for key in chains}


def _ended(pool, chains: dict[str, tuple[Chain, Request]], stoppable: bool):
    """Chains with their first requests, in the order in which they begin, through the slots of `pool`. Yields what ended,
    some at a time: {"key", "result"} each."""
    waiting, active = deque(chains), {}

    def begin(slot: int) -> None:
        if waiting:
            active[slot] = key = waiting.popleft()
            pool.ask(slot, chains[key][1], fresh=True)

    def go_on(slot: int, answer: dict | None) -> list[dict]:
        """Sends an answer to a slot's chain. What that asks next is put in its place; where it ends, the next chain begins."""
        while True:  # and no recursion: a function that holds itself would hold the pool, weights and all, until a collection
            try:
                r = chains[active[slot]][0].send(answer)
            except StopIteration as end:
                ended = {"key": active.pop(slot), "result": end.value}
                begin(slot)
                return [ended]
            if pool.ask(slot, r):
                return []
            answer = None

    for slot in range(pool.sampling.batch_size):
        begin(slot)
    while active:
        if stoppable:
            raise_if_stopping()
        yield [e for slot, answer in pool.answers(list(active)) for e in go_on(slot, answer)]


class Pool:
    """The slots of one call on the device, and what the host knows of them."""

    def __init__(self, lm: LM, sampling: Sampling, seed: int, stage: str, mesh, templates, prefix: list[int]):
        self.lm, self.sampling, self.stage, self.mesh, self.templates = lm, sampling, stage, mesh, templates
        self.ways = batch_ways(mesh)
        self.part = exact_div(sampling.batch_size, self.ways, f"--config.{stage}.sampling.batch_size over the mesh")
        self.fill = max(1, self.part // REFILL)  # texts that each part reads together
        self.net, self.key = lm.net(unrolled=True), jax.random.key(seed)
        self.params = ready(lm, sampling.gather).params
        table = stop_table(lm.tok, stops(templates))
        none = np.arange(len(table), dtype=table.dtype)[:, None]  # ids that stand for no text change no state
        table = np.concatenate([table, np.repeat(none, max(0, lm.cfg.vocab_size - table.shape[1]), axis=1)], axis=1)
        self.rules = Rules(jnp.array(lm.tok.stop_ids, jnp.int32), jnp.asarray(table))
        self.room, self.long, self.slots = 0, False, None
        self.held = [([], 0)] * sampling.batch_size  # tokens in each slot's own cache, and how many of the prefix before them
        self.asked, self.unread, self.counts = {}, [], Counter(read=len(prefix))
        self.prefix_ids = prefix
        self.prefix = read_text(self.net, self.params, prefix, mesh, sampling.cache) if prefix else None

    def own(self, ids: list[int]) -> int:
        """Where a context departs from the prefix; at least one token is its own."""
        n = min(shared(ids, self.prefix_ids), len(ids) - 1)
        return n if n >= WORTH else 0

    def reserve(self, tokens: int, kept: int = 0) -> None:
        """Room in every slot for so many tokens of its own, but for those kept to be read, and those to be sampled."""
        if (wanted := needed(tokens, kept, self.sampling.max_tokens)) > self.room:
            args = self.net, self.sampling.batch_size, wanted, self.sampling.max_tokens, self.sampling.cache
            self.long = self.long if self.slots else wanted > LONG  # by the first contexts, whatever a restart then grows
            self.slots, self.room = grow(self.slots, wanted) if self.slots else new(*args), wanted

    def ask(self, slot: int, r: Request, fresh: bool = False) -> bool:
        """Puts a context into a slot. -> whether the model has room for it. Not `fresh`: of what the slot holds, the tokens in
        common are kept."""
        ids = self.lm.tok.prompt(r.context)
        if len(ids) + self.sampling.max_tokens > self.lm.cfg.max_length:
            return False
        at, (held, before) = self.own(ids), self.held[slot]
        own = ids[at:]
        kept = 0 if fresh or before != at else min(shared(own, held), len(own) - 1)
        self.held[slot], self.asked[slot] = (own, at), r
        self.unread.append((slot, kept, own[kept:]))
        self.counts.update(texts=1, read=len(own) - kept, kept=kept, shared=at)
        self.reserve(len(own), kept)
        return True

    def answers(self, active: list[int]) -> list[tuple[int, dict]]:
        """Samples in all slots until some of the active ones are done. -> their numbers and texts."""
        self._read()
        B, s = self.sampling.batch_size, self.sampling
        until = min(B, B - len(active) + self.fill * self.ways)
        rules = {"gather": s.gather, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p}
        self.slots = decode(self.net, self.params, self.prefix, self.slots, self.rules, until, **rules)
        tokens, count, done, finished = jax.device_get(
            (self.slots.tokens_BR, self.slots.count_B, self.slots.done_B, self.slots.finished_B)
        )
        out = []
        for slot in (i for i in active if done[i]):
            ids = tokens[slot, : count[slot]].tolist()
            own, at = self.held[slot]
            self.held[slot] = (own + ids)[: self.room - 1], at  # a row that is done writes on in its last place
            self.counts.update(sampled=len(ids))
            raw = self.lm.tok.decode(ids)
            ended = bool(finished[slot]) or any(x in raw for x in stops(self.templates))
            out.append((slot, {"text": read_back(raw, self.templates), "tokens": len(ids), "finished": ended}))
        return out

    def _read(self) -> None:
        """Reads what was asked, piece by piece; texts of like length together. In long slots they are apart from those of which
        a slot holds a part, so that how a text is read does not depend on the others."""
        while self.unread:
            by_size, rest = {}, []
            for slot, at, ids in self.unread:
                by_size.setdefault((bucket(len(ids[:PIECE])), self.long and at == 0), []).append((slot, at, ids[:PIECE]))
                if ids[PIECE:]:
                    rest.append((slot, at + PIECE, ids[PIECE:]))
            for (size, fresh), texts in sorted(by_size.items()):
                parts = [[t for t in texts if t[0] // self.part == w] for w in range(self.ways)]
                for i in range(0, max(map(len, parts)), self.fill):
                    self._read_some([p[i : i + self.fill] for p in parts], size, fresh)
            self.unread = rest

    def _read_some(self, parts: list[list[tuple[int, int, list[int]]]], size: int, fresh: bool) -> None:
        M = self.ways * self.fill
        ints = ("lengths_M", "filled_M", "offset_M", "limit_M")
        x = {name: np.zeros(M, np.int32) for name in ints} | {"tokens_MT": np.zeros((M, size), np.int32)}
        x |= {"addresses_M2": np.zeros((M, 2), np.uint32), "temperature_M": np.zeros(M, np.float32)}
        used = [[slot % self.part for slot, *_ in part] for part in parts]
        rows = [[*mine, *(i for i in range(self.part) if i not in mine)][: self.fill] for mine in used]
        x["rows_Wm"] = np.array(rows, np.int32)
        for w, part in enumerate(parts):
            for j, (slot, at, ids) in enumerate(part):
                i, r = w * self.fill + j, self.asked[slot]
                x["tokens_MT"][i, : len(ids)] = ids
                x["lengths_M"][i], x["filled_M"][i], x["offset_M"][i] = len(ids), at, self.held[slot][1]
                x["addresses_M2"][i] = record_key_data(self.stage, r.key)
                x["limit_M"][i] = min(r.max_tokens or self.sampling.max_tokens, self.sampling.max_tokens)
                x["temperature_M"][i] = self.sampling.temperature if r.temperature is None else r.temperature
        reading = Reading(**put_batch(x, self.mesh))
        self.slots = read(self.net, self.params, self.prefix, self.slots, self.key, reading, fresh)

    def summary(self) -> str:
        c, steps = self.counts, int(self.slots.steps)
        busy = c["sampled"] / max(1, steps * self.sampling.batch_size)
        return (
            f"{c['texts']:,} texts: {c['read']:,} tokens read, {c['kept'] + c['shared']:,} found in a cache; {c['sampled']:,} "
            f"sampled in {steps:,} steps with {busy:.0%} of {self.sampling.batch_size} slots busy"
        )
