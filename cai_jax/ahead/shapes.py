"""What stands for models, texts and batches where no step runs: shapes with places on a mesh, texts of a length."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import prompts, records
from cai_jax.config import Config
from cai_jax.models import LM, compute_dtype, lora
from cai_jax.models.heads import init_head
from cai_jax.models.transformer import Transformer, cast_matrices, init_params
from cai_jax.pairs import batches, encode_comparisons
from cai_jax.sharding import BATCH, NamedSharding, P, apart_specs, batch_ways
from cai_jax.slots import new, prefix_room, serving
from cai_jax.stages import SCORERS, STAGE_OF, adapts, architecture, trunk
from cai_jax.stages.harm import encode
from cai_jax.tokenizer import Tokenizer
from cai_jax.train import Parts, abstract

EVERYWHERE = P()  # on every device, whole
LETTERS = 4  # of a token, in bytes
PROMPT = 256  # tokens of the longest prompt where --config.data.max_prompt is not set


class Letters(Tokenizer):
    """Stands for a tokenizer where only lengths count, and what texts have in common."""

    def encode(self, text: str) -> list[int]:
        letters = text.encode()
        return (np.frombuffer(letters + b" " * (-len(letters) % LETTERS), np.uint32) % 2**31).tolist()


TOK = Letters(None, 0, 0)


def text(tokens: int, *number: int) -> str:
    """So many tokens, which no other number gives."""
    return np.random.default_rng(number).integers(*b"a{", max(0, tokens) * LETTERS, np.uint8).tobytes().decode()


def longest_prompt(cfg: Config) -> int:
    return cfg.data.max_prompt or PROMPT


def conversation(cfg: Config, number: int = 0) -> list[dict]:
    """A prompt that is as long as prompts may be once a template is around it."""
    around = len(prompts.dialogue([{"role": prompts.USER, "content": ""}]))
    return [{"role": prompts.USER, "content": text(longest_prompt(cfg) - -(-around // LETTERS), 0, number)}]


def shaped(tree, mesh, spec=EVERYWHERE):
    """Shapes of arrays whose leading axes all lie as `spec` says."""
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place), tree)


def array(mesh, dtype, *shape: int, spec=EVERYWHERE):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def batch(arrays, mesh):
    """Host arrays, or Parts of them, as they are put on the mesh."""
    if isinstance(arrays, Parts):
        return Parts(shaped(arrays.arrays, mesh, P(BATCH)), array(mesh, jnp.int32))
    return shaped(arrays, mesh, P(BATCH))


def key(mesh):
    return shaped(jax.eval_shape(lambda: jax.random.key(0)), mesh)


class Model(NamedTuple):
    net: Transformer
    trained: Any  # by the stage that makes it
    frozen: Any  # beside them; {}: none
    params: Any  # as later stages read it, all of it


def head(width: int):
    return jax.eval_shape(lambda: init_head(jax.random.key(0), width))


def model(cfg: Config, mesh, name: str, adapter: bool | None = None) -> Model:
    """A model of the run, as stages.load_start and stages.load_lm give it; `adapter`: otherwise than its stage trains it."""
    arch, dtype = architecture(cfg, name), compute_dtype(cfg.model.compute_dtype)
    adapter = adapts(cfg, STAGE_OF[name]) if adapter is None else adapter
    whole = jax.eval_shape(lambda: init_params(Transformer(arch), jax.random.key(0)))
    trained, frozen = jax.eval_shape(partial(cast_matrices, dtype=jnp.dtype(cfg.model.trained_dtype)), whole), {}
    if adapter:
        arch = lora.attach(arch, cfg.lora)
        trained = jax.eval_shape(lambda: lora.init(arch, jax.random.key(0)))
        frozen = jax.eval_shape(partial(cast_matrices, dtype=dtype), whole)
    if name in SCORERS:
        trained = {"trunk": trunk(trained), "head": head(arch.width)}
        frozen = {"trunk": trunk(frozen)} if frozen else {"trunk": {}}
    kept = jax.eval_shape(partial(cast_matrices, dtype=dtype), lora.join(frozen, trained))
    net = Transformer(arch, dtype, remat=cfg.model.remat, unrolled=cfg.model.layers == "unrolled")
    return Model(net, *(abstract(x, mesh) for x in (trained, frozen, kept)))


def pairs(cfg: Config, mesh, m: Model, stage: str) -> tuple[dict[str, np.ndarray], str]:
    """A batch of the longest comparisons, in the stage harm conversations, in as many rows as they can take. -> (arrays, their
    sizes)."""
    c = getattr(cfg, stage)
    prompt = len(TOK.prompt(prompts.dialogue(conversation(cfg))))
    longest = min(cfg.data.max_pair or prompt + cfg.preferences.sampling.max_tokens, m.net.cfg.max_length)
    rows = [
        {"messages": conversation(cfg, n), "p_a": 0.5, "source": "ai"}
        | {f"response_{side}": text(longest - prompt - 2, n, *side.encode()) for side in "ab"}
        for n in range(c.batch_size)
    ]
    if stage == "harm":
        what, lm = "conversations", LM(m.net.cfg, m.net.dtype, {}, TOK)
        rated = [r | {"response": r["response_a"], "rating": 0.0} for r in rows]
        found = encode(lm, prompts.TEMPLATES, rated, longest, records.Drops())
    else:
        what, found = "comparisons", encode_comparisons(TOK, prompts.TEMPLATES, rows, longest, records.Drops())
    if stage == "dpo":
        found.columns.update(dict.fromkeys(("reference_a", "reference_b"), np.zeros(c.batch_size, np.float32)))
    arrays = batches(found, c.batch_size, 1, 0, stage, batch_ways(mesh) * c.microbatches)[0](0)
    R, T = arrays["tokens"].shape
    return arrays, f"{c.batch_size:,} {what} in {R:,} rows of {T:,} tokens"


def served(net: Transformer, params, mesh, gather: bool):
    """Parameters as slots.ready leaves them."""
    shapes = jax.eval_shape(lambda p: serving(net, p, gather=False, decoding=False), params)
    places = apart_specs(shapes, whole=gather)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), shapes, places
    )


def slots(net: Transformer, mesh, rows: int, tokens: int, sampled: int, cache: str):
    """See slots.new."""
    found = jax.eval_shape(lambda: new(net, rows, tokens, sampled, cache))
    layers, x_BD = shaped(found.layers, mesh, P(BATCH, "model")), shaped(found.x_BD, mesh, P(BATCH))
    return shaped(found, mesh)._replace(layers=layers, x_BD=x_BD)


def prefix(net: Transformer, mesh, tokens: int, cache: str = "auto"):
    """See slots.read_text. -> (layers as rows share them, or None; slots of theirs)."""
    if not tokens:
        return None, 0
    room = prefix_room(tokens)
    rows = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], new(net, 1, room, 1, cache).layers))
    return shaped(rows, mesh, P("model")), room
