"""Every jitted step of a configuration's stages, ready to be compiled: its function, the shapes of what it is given, and what
its products take by formula. Steps are built by what a run builds them with, on texts as long as the configuration allows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import constitution as constitutions
from cai_jax import generate as engine
from cai_jax import optim, panel, prompts, records, score
from cai_jax.ahead import shapes
from cai_jax.ahead.shapes import TOK, array, batch, conversation, longest_prompt, pairs, shaped, text
from cai_jax.ahead.work import Work
from cai_jax.config import Config, Sampling
from cai_jax.constitution.few_shot import load_few_shot
from cai_jax.data import bucket, pack
from cai_jax.evaluation import untouched
from cai_jax.experience import experience, kind, layout, minibatch, packed, ppo_loss
from cai_jax.logprobs import block_count
from cai_jax.models import lora
from cai_jax.models.transformer import Transformer
from cai_jax.sampling import record_keys
from cai_jax.score import pair_scores
from cai_jax.sharding import BATCH, P, batch_ways, replicated
from cai_jax.slots import PIECE, Reading, Rules, Sampled, decode, generate, needed, read, read_prefix
from cai_jax.stages import MODELS, OF_INIT, SCORERS, adapts, checkpoint, origin, trunk
from cai_jax.stages.dpo import preference_loss, response_logprobs
from cai_jax.stages.harm import harm_loss
from cai_jax.stages.reward import reward_loss
from cai_jax.train import Parts, TrainState, abstract, language_model_loss, make_train_step

STOPS, ENDS = 98, 2  # states of the automaton of plain transcripts' stop strings; ids that end a text


class Step(NamedTuple):
    stage: str
    name: str
    sizes: str  # for people
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    work: Work  # of all devices together
    loops: dict[str, float]  # how often loops run that the data decide about, by name


def steps(cfg: Config, mesh) -> list[Step]:
    """Of every stage of `cfg`, in order. In the scope of the mesh."""
    return [step for stage in cfg.stages if stage in OF_STAGE for step in OF_STAGE[stage](cfg, mesh)]


def sampling(cfg: Config, mesh, stage: str, name: str, s: Sampling, context: str, before: str = "") -> list[Step]:
    """Reading and decoding in slots that hold `context` behind the prefix it begins with."""
    m, ways = shapes.model(cfg, mesh, name), batch_ways(mesh)
    net = Transformer(m.net.cfg, m.net.dtype, unrolled=True)
    params, work = shapes.served(net, m.params, mesh, s.gather), Work(net)
    shared = len(TOK.prompt(before)) if before else 0
    prefix, room = shapes.prefix(net, mesh, shared, s.cache)
    own = len(TOK.prompt(context)) - shared
    B, S = s.batch_size, needed(own, 0, s.max_tokens)
    slots = shapes.slots(net, mesh, B, S, s.max_tokens, s.cache)
    M, T = ways * max(1, B // ways // engine.REFILL), PIECE if own >= PIECE else bucket(own)
    ints = {name: array(mesh, jnp.int32, M, spec=P(BATCH)) for name in ("lengths_M", "filled_M", "offset_M", "limit_M")}
    reading = Reading(
        rows_Wm=array(mesh, jnp.int32, ways, M // ways, spec=P(BATCH)),
        tokens_MT=array(mesh, jnp.int32, M, T, spec=P(BATCH)),
        addresses_M2=array(mesh, jnp.uint32, M, 2, spec=P(BATCH)),
        temperature_M=array(mesh, jnp.float32, M, spec=P(BATCH)),
        **ints,
    )
    V, number = net.cfg.vocab_size, array(mesh, jnp.int32)
    options = {"gather": s.gather, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p}
    rules = Rules(array(mesh, jnp.int32, ENDS), array(mesh, jnp.int8, STOPS, V))
    kept = net.dtype if s.cache == "auto" else s.cache
    out = []
    if before:
        piece = array(mesh, jnp.int32, ways, min(room, PIECE), spec=P(BATCH))
        layers = shapes.slots(net, mesh, ways, room, 1, s.cache).layers
        lower = partial(read_prefix.lower, net, params, piece, layers, number, room, s.cache)
        sizes = f"{shared:,} tokens, {piece.shape[1]} at a time"
        out.append(Step(stage, "read prefix", sizes, lower, work.cached(ways, piece.shape[1], room), {}))
    lower = partial(read.lower, net, params, prefix, slots, shapes.key(mesh), reading, False)
    out.append(Step(stage, "read", f"{M:,} x {T} tokens into slots of {S:,}", lower, work.cached(M, T, S + room), {}))
    lower = partial(decode.lower, net, params, prefix, slots, rules, number, **options)
    sizes = f"a token in {B:,} slots of {S:,}, {jnp.dtype(kept).name}"
    return [*out, Step(stage, "decode", sizes, lower, work.cached(B, 1, S + room).head(B), {"decoding": 1})]


def critique(cfg: Config, mesh) -> list[Step]:
    c, constitution = (
        cfg.critique,
        constitutions.load(cfg.constitution.path, cfg.constitution.exclude, templates=prompts.TEMPLATES),
    )
    context, before = prompts.dialogue(conversation(cfg)), ""
    if c.rounds:
        p = max(constitution.principles, key=lambda p: len(p.critique) + len(p.revision))
        said, thought = (text(c.sampling.max_tokens, 1, n) for n in (0, 1))
        if c.few_shot:
            blocks = load_few_shot(c.few_shot).critiques
            before = prompts.few_shot_critique(blocks, prompts.TEMPLATES, c.direct)
        if c.direct:
            context = prompts.revision(before + context + prompts.completion(said), None, p.revision)
        else:
            context = prompts.revision(before + prompts.critique(conversation(cfg), said, p.critique), thought, p.revision)
    return sampling(cfg, mesh, "critique", "base", c.sampling, context, before)


def train(cfg: Config, mesh, stage: str, m: shapes.Model, loss, parts: int, arrays, sizes: str, work: Work, loops=()) -> Step:
    """An update of a stage's weights."""
    tx = optim.make(getattr(cfg, stage).optimizer, 100)
    state = jax.eval_shape(lambda p: TrainState(jnp.zeros((), jnp.int32), p, tx.init(p)), m.trained)
    step = make_train_step(loss, tx, mesh, parts)
    lower = partial(step.lower, abstract(state, mesh), m.frozen, batch(arrays, mesh), shapes.key(mesh))
    return Step(stage, "train", sizes + f", in {parts} parts" * (parts > 1), lower, work, dict(loops))


def counted(net: Transformer, mesh, rows: int, of_row: int, share: float = 1.0) -> tuple[int, int]:
    """-> (blocks in which a device finds a share of its tokens that counts, such tokens of all devices, blocks filled up)."""
    ways, c = batch_ways(mesh), net.cfg
    parted = ways if rows % ways == 0 else 1
    own = rows * of_row // parted
    made = block_count(own, (c.vocab_size + c.vocab_padding) // mesh.shape["model"], c.width, fine=True)
    used = -(-int(np.ceil(own * share)) // -(-own // made))
    return used, used * -(-own // made) * parted


def sft(cfg: Config, mesh) -> list[Step]:
    c, m = cfg.sft, shapes.model(cfg, mesh, "sl_cai")
    rows = pack([([1] * c.length, 0)] * c.rows, c.length, records.Drops())
    blocks, places = counted(m.net, mesh, c.rows // c.microbatches, c.length)
    work = Work(m.net).training(c.rows, c.length, "packed").head(places * c.microbatches, trained=True)
    loss, sizes = language_model_loss(m.net), f"{c.rows:,} rows of {c.length:,} tokens"
    return [train(cfg, mesh, "sft", m, loss, c.microbatches, rows, sizes, work, {"counted": blocks})]


def preferences(cfg: Config, mesh) -> list[Step]:
    c, before = cfg.preferences, ""
    out = sampling(cfg, mesh, "preferences", OF_INIT[c.policy], c.sampling, prompts.dialogue(conversation(cfg)))
    files = [(law.constitution.path, law.constitution.exclude) for law in panel.laws(cfg)]
    laws = [constitutions.load(*file, templates=prompts.TEMPLATES) for file in files]
    longest = [sorted(law.principles, key=lambda p: -len(p.comparison))[: c.principles] for law in laws]
    drawn = max(longest, key=lambda principles: sum(len(p.comparison) for p in principles))
    if c.few_shot:
        blocks = load_few_shot(c.few_shot).comparisons
        before = prompts.few_shot_comparison(blocks, [drawn[0]] * len(blocks))
    ask, asked = prompts.reasoning if c.chain_of_thought else prompts.comparison, []
    for n in range(-(-c.score_batch // len(drawn))):
        a, b = (text(c.sampling.max_tokens, n, side) for side in (1, 2))
        asked += [before + ask(conversation(cfg, n), p.comparison, *x) for p in drawn for x in ((a, b), (b, a))]
    contexts = [x for x in asked for _ in range(c.thoughts)]
    if c.chain_of_thought:
        contexts = [prompts.verdict(x, text(c.thought.max_tokens, n, 3)) for n, x in enumerate(contexts)]
    encoded, judges = [TOK.options(x, prompts.OPTIONS) for x in contexts], {}
    for name, alone in panel.judges(cfg, checkpoint(cfg, "judge")).items():
        judges.setdefault(checkpoint(alone, "judge"), (name, alone))  # of one folder of shapes: their steps are the same
    for name, alone in judges.values():
        judge = shapes.model(alone, mesh, "judge")
        if c.chain_of_thought:
            out += sampling(alone, mesh, "preferences", "judge", c.thought, asked[0])
        net = Transformer(judge.net.cfg, judge.net.dtype, unrolled=True)
        plan = score.plan(encoded, net.cfg.width, c.score_batch, batch_ways(mesh))
        params, (prefix, room) = (
            shapes.served(net, judge.params, mesh, c.thought.gather),
            shapes.prefix(net, mesh, len(plan.before)),
        )
        rows = batch({k: x[: plan.batch_size] for k, x in plan.rows.items()}, mesh)
        B, T = rows["tokens"].shape
        lower = partial(score.tree_logprobs.lower, net, params, prefix, array(mesh, jnp.int32), rows)
        sizes = f"{B:,} rows of {T:,} tokens" + f" behind {room:,}" * bool(room) + f", {name}" * (len(judges) > 1)
        work = Work(net).texts(B, T, "trees", room).head(rows["at"].size)
        out.append(Step("preferences", "score options", sizes, lower, work, {}))
    return out


def scorer(cfg: Config, mesh, stage: str, loss_of: Callable) -> list[Step]:
    """Of a model that ends in a number."""
    m = shapes.model(cfg, mesh, stage)
    (arrays, sizes), work = pairs(cfg, mesh, m, stage), Work(m.net)
    shape = *arrays["tokens"].shape, "trees"
    lower = partial(
        jax.jit(partial(pair_scores, m.net), out_shardings=replicated(mesh)).lower,
        lora.join(m.frozen, m.trained),
        batch(arrays, mesh),
    )
    parts = getattr(cfg, stage).microbatches
    return [
        train(cfg, mesh, stage, m, loss_of(m.net), parts, arrays, sizes, work.training(*shape)),
        Step(stage, "score", sizes, lower, work.texts(*shape), {}),
    ]


def dpo(cfg: Config, mesh) -> list[Step]:
    c, m, before = cfg.dpo, shapes.model(cfg, mesh, "dpo_cai"), shapes.model(cfg, mesh, "sl_cai")
    arrays, sizes = pairs(cfg, mesh, m, "dpo")
    (R, A), shape = arrays["at"].shape, (*arrays["tokens"].shape, "trees")
    net = Transformer(before.net.cfg, before.net.dtype)
    given = batch({k: x for k, x in arrays.items() if not k.startswith("reference")}, mesh)
    lower = partial(jax.jit(partial(response_logprobs, net), out_shardings=replicated(mesh)).lower, before.params, given)
    (once, all_places), (blocks, places) = counted(net, mesh, R, A), counted(net, mesh, R // c.microbatches, A)
    work = Work(m.net).training(*shape).head(places * c.microbatches, trained=True)
    return [
        Step("dpo", "reference", sizes, lower, Work(net).texts(*shape).head(all_places), {"counted": once}),
        train(
            cfg,
            mesh,
            "dpo",
            m,
            preference_loss(m.net, c.beta, c.loss),
            c.microbatches,
            arrays,
            sizes,
            work,
            {"counted": blocks},
        ),
    ]


def ppo(cfg: Config, mesh) -> list[Step]:
    c, m, judge = cfg.ppo, shapes.model(cfg, mesh, "rl_cai"), shapes.model(cfg, mesh, "reward")
    start = shapes.model(cfg, mesh, origin(cfg, "rl_cai") or "base", None if adapts(cfg, "ppo") else False)
    critic = c.advantage == "gae"
    separate, own = critic and c.value_network == "separate", checkpoint(cfg, "reward") != checkpoint(cfg, "rl_cai")
    head = abstract({"head": shapes.head(m.net.cfg.width)}, mesh)
    value, held = ({"trunk": trunk(x)} if separate else {} for x in (m.trained, m.frozen))
    learnt, held = ({"value": head | value}, {"value": held}) if critic else ({}, {})
    m = m._replace(trained={"policy": m.trained} | learnt, frozen={"policy": m.frozen} | held)
    params, net, work = lora.join(m.frozen, m.trained), m.net, Work(m.net)
    B, R, n = c.batch_size, c.sampling.max_tokens, longest_prompt(cfg)
    width, ways = bucket(n), batch_ways(mesh)

    tokens, lengths = array(mesh, jnp.int32, B, width, spec=P(BATCH)), array(mesh, jnp.int32, B, spec=P(BATCH))
    keys = shaped(jax.eval_shape(lambda: record_keys(jax.random.key(0), jnp.zeros((B, 2), jnp.uint32))), mesh, P(BATCH))
    number, options = array(mesh, jnp.float32), {"max_new": R, "gather": c.sampling.gather, "cache": c.sampling.cache}
    roll = partial(
        generate.lower, net, params["policy"], tokens, lengths, keys, array(mesh, jnp.int32, ENDS), number, **options
    )
    rolled = work.cached(B, width, width + R).plus(work.cached(B, 1, width + R).head(B), R)

    rows, long = [np.ones(n + R, np.int32)] * B, np.full(B, n, np.int32)
    all_to, few_to = (layout(n, width + R, ways) for n in (B, B // c.minibatches))
    texts, at = packed(rows, long, range(B), all_to, R)
    few, _ = packed(rows, long, range(B // c.minibatches), few_to, R)
    said = {"tokens": np.zeros((B, bucket(n + 2 * R)), np.int32), "lengths": long}
    read_again = batch(said, mesh) if own else None
    wrote = Sampled(
        array(mesh, jnp.int32, B, R), array(mesh, jnp.int32, B), array(mesh, bool, B), array(mesh, jnp.float32, B, R)
    )
    nets = net, Transformer(start.net.cfg, net.dtype), Transformer(judge.net.cfg, net.dtype)
    given = (params, start.params, judge.params), {"mean": 0.0, "std": 1.0}, number, array(mesh, jnp.float32, B, spec=P(BATCH))
    score_all = partial(experience.lower, nets, c, *given, wrote, batch(texts, mesh), batch(at, mesh), read_again)

    found = ("old_logp", "advantages") + (("old_values", "returns") if critic else ())
    rollout = dict.fromkeys(found, np.zeros((B, R), np.float32))
    few = Parts(jax.eval_shape(minibatch, rollout, few).arrays, few.count)
    N, N_few = (x.arrays["tokens"].shape[1] for x in (texts, few))
    (blocks, places), (few_blocks, few_places) = (counted(net, mesh, x.rows, x.length, R / (n + R)) for x in (all_to, few_to))
    shape, few_shape = ((x.rows, x.length, kind()) for x in (all_to, few_to))
    forward = work.texts(*shape).head(places)
    scored = forward.plus(forward).plus(work.texts(*shape), separate + (not own))
    apart = Work(nets[2]).texts(*said["tokens"].shape, "alone") if own else work
    learn = work.training(*few_shape).head(few_places, trained=True).plus(work.training(*few_shape), int(separate))
    sizes, few_sizes = (f"parts of {x.rows:,} rows of {x.length:,} tokens" for x in (all_to, few_to))
    loops, few_loops = {"counted": blocks, "parts": N}, {"counted": few_blocks, "parts": N_few}
    learned, loss = work.plus(learn, N_few), ppo_loss(net, c)
    return [
        Step("ppo", "roll out", f"{B:,} prompts of {width}, {R} tokens each", roll, rolled, {"decoding": R}),
        Step("ppo", "score", f"{N} {sizes}", score_all, work.plus(scored, N).plus(apart), loops),
        train(cfg, mesh, "ppo", m, loss, 1, few, f"{N_few} {few_sizes}", learned, few_loops),
    ]


def evaluate(cfg: Config, mesh) -> list[Step]:
    c, m, context = cfg.evaluate.sampling, shapes.model(cfg, mesh, "base"), prompts.dialogue(conversation(cfg))
    out = sampling(cfg, mesh, "evaluate", "base", c, context)
    B, T = c.batch_size, bucket(longest_prompt(cfg) + c.max_tokens + 1)
    sizes, ends = f"{B:,} texts of {T:,} tokens", np.full(B, T, np.int32)
    rows = batch({"tokens": np.ones((B, T), np.int32), "lengths": ends, "first": ends - c.max_tokens}, mesh)
    if untouched(c) and any(stage in cfg.stages for stage in MODELS.values()):  # which have a KL from the base
        net = Transformer(m.net.cfg, m.net.dtype)
        blocks, places = counted(net, mesh, B, T, c.max_tokens / T)
        lower, work = partial(score.text_logprobs.lower, net, m.params, rows), Work(net).texts(B, T, "alone").head(places)
        out.append(Step("evaluate", "log-probs", sizes, lower, work, {"counted": blocks}))
    for name in (name for name in SCORERS if name in cfg.stages):
        m = shapes.model(cfg, mesh, name)
        net = Transformer(m.net.cfg, m.net.dtype)
        lower = partial(score.text_scores.lower, net, m.params, rows)
        out.append(Step("evaluate", f"score by {name}", sizes, lower, Work(net).texts(B, T, "alone"), {}))
    return out


OF_STAGE = {"critique": critique, "sft": sft, "preferences": preferences, "dpo": dpo, "ppo": ppo, "evaluate": evaluate}
OF_STAGE |= {k: partial(scorer, stage=k, loss_of=loss) for k, loss in {"reward": reward_loss, "harm": harm_loss}.items()}
