"""What a configuration takes on a TPU, without one: counts from a program's text, the formulas they are held against, every
step of a configuration, and the command."""

import json
import re
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import topologies
from test_run import cai

from cai_jax import ahead
from cai_jax.ahead import chips, cost, hlo, shapes
from cai_jax.ahead.steps import steps
from cai_jax.ahead.work import Work, weights
from cai_jax.checks import resolve
from cai_jax.config import default
from cai_jax.errors import InputError
from cai_jax.sharding import BATCH, P, make_mesh

TPU = pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")


def config(**changes):
    cfg = default()
    for key, value in changes.items():
        cfg.update_from_flattened_dict({key.replace("__", "."): value})
    return resolve(cfg)


# --- Counting ---------------------------------------------------------------------------------------------------------
LOOP = """HloModule loop

%taking (p.0: f32[6,4,8], p.1: s32[]) -> f32[4,8] {
  %p.0 = f32[6,4,8]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,4,8]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %flat = f32[4,8]{1,0:T(8,128)} bitcast(%slice)
}

%body (s: (s32[], f32[2,4], f32[6,4,8])) -> (s32[], f32[2,4], f32[6,4,8]) {
  %s = (s32[]{:T(128)}, f32[2,4]{1,0:T(8,128)}, /*index=2*/f32[6,4,8]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[2,4]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %w = f32[6,4,8]{2,1,0:T(8,128)} get-tuple-element(%s), index=2
  %one = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %one)
  %matrix = f32[4,8]{1,0:T(8,128)} fusion(%w, %i), kind=kLoop, calls=%taking
  %y = f32[2,8]{1,0:T(8,128)S(1)} dot(%x, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[2,8]{1,0:T(8,128)S(1)} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %kept = f32[2,4]{1,0:T(8,128)} slice(%sum), slice={[0:2], [0:4]}
  ROOT %out = (s32[]{:T(128)}, f32[2,4]{1,0:T(8,128)}, f32[6,4,8]{2,1,0:T(8,128)}) tuple(%next, %kept, %w)
}

%more (s: (s32[], f32[2,4], f32[6,4,8])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[2,4]{1,0:T(8,128)}, f32[6,4,8]{2,1,0:T(8,128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %last = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%at, %last), direction=LT
}

ENTRY %main (a: f32[2,4], b: f32[6,4,8]) -> f32[2,4] {
  %a = f32[2,4]{1,0:T(8,128)} parameter(0)
  %b = f32[6,4,8]{2,1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %all = (s32[]{:T(128)}, f32[2,4]{1,0:T(8,128)}, f32[6,4,8]{2,1,0:T(8,128)}) tuple(%start, %a, %b)
  %loop = (s32[]{:T(128)}, f32[2,4]{1,0:T(8,128)}, f32[6,4,8]{2,1,0:T(8,128)}) while(%all), condition=%more, body=%body
  ROOT %result = f32[2,4]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    """Three times: from 0 to 6 in steps of 2. Of the stack that it takes a matrix from, a pass reads the matrix."""
    found = cost.cost(LOOP, 8)
    assert found.flops == 3 * 2 * 2 * 4 * 8
    assert found.calls == {("all-reduce", False): 3}
    assert found.sent == {("all-reduce", False): 3 * 2 * (3 / 4) * 2 * 8 * 4}
    taking, dot, reduce, kept, counter = 2 * 128 + 4, 32 + 128, 2 * 64, 2 * 32, 12 + 9
    assert found.bytes == 3 * (taking + dot + reduce + kept + counter)


def test_every_operand_of_a_fusion_is_told_from_the_others():
    """Of eleven vectors the first is read, of the second a slice, and the eleventh, which the second must not be taken for."""
    given = [f"p.{i}: f32[100]" for i in range(11)]
    lines = [f"  %p.{i} = f32[100]{{0}} parameter({i})" for i in (10, *range(10))]
    text = f"""%fused ({", ".join(given)}) -> f32[10] {{
{chr(10).join(lines)}
  %s = f32[10]{{0}} slice(%p.1), slice={{[0:10]}}
  %a = f32[100]{{0}} add(%p.0, %p.10)
  %t = f32[10]{{0}} slice(%a), slice={{[0:10]}}
  ROOT %r = f32[10]{{0}} add(%s, %t)
}}

ENTRY %main ({", ".join(given)}) -> f32[10] {{
{chr(10).join(lines)}
  ROOT %f = f32[10]{{0}} fusion({", ".join(f"%p.{i}" for i in range(11))}), kind=kLoop, calls=%fused
}}
"""
    assert cost.cost(text, 1).bytes == 4 * (100 + 10 + 100 + 10)


GROUPS = "replica_groups={{0,1},{2,3}}, to_apply=%add"
BESIDE = f"""%one (p: f32[8]) -> (f32[16], f32[8]) {{
  %p = f32[8]{{0}} parameter(0)
  %g = f32[16]{{0}} all-gather(%p), channel_id=7, {GROUPS}
  ROOT %r = (f32[16]{{0}}, f32[8]{{0}}) tuple(%g, %p)
}}

%async_collective_fusion.5 (o: f32[8]) -> f32[16] {{
  %o = f32[8]{{0}} parameter(0)
  ROOT %n = f32[16]{{0}} all-gather(%o), channel_id=7, {GROUPS}
}}

%two (q: f32[8]) -> f32[1,16] {{
  %q = f32[8]{{0}} parameter(0)
  ROOT %h = f32[1,16]{{1,0}} all-gather(%q), channel_id=7, {GROUPS}
}}

%all-reduce-scatter.3 (s: f32[8]) -> f32[4] {{
  %s = f32[8]{{0}} parameter(0)
  %w = f32[8]{{0}} all-reduce(%s), channel_id=9, {GROUPS}
  ROOT %t = f32[4]{{0}} slice(%w), slice={{[0:4]}}
}}

ENTRY %main (a: f32[8]) -> f32[4] {{
  %a = f32[8]{{0}} parameter(0)
  %async-collective-start.1 = (f32[16]{{0}}, f32[8]{{0}}) fusion(%a), kind=kCustom, calls=%one
  %f.1 = f32[16]{{0}} fusion(%a), kind=kOutput, calls=%async_collective_fusion.5
  %async-collective-done.1 = f32[1,16]{{1,0}} fusion(%a), kind=kCustom, calls=%two
  %b = f32[8]{{0}} all-reduce(%a), channel_id=1, {GROUPS}
  %c = f32[8]{{0}} all-reduce(%b), channel_id=1, {GROUPS}
  ROOT %d = f32[4]{{0}} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.3
}}
"""


def test_a_message_counts_once_however_it_is_written():
    """One that goes on beside other work is one; two of one channel are two; a sum of which each takes a part sends half."""
    found = cost.cost(BESIDE, 4)
    assert found.calls == {("all-gather", False): 1, ("all-reduce", False): 2, ("reduce-scatter", False): 1}
    assert found.sent == {("all-gather", False): 32, ("all-reduce", False): 2 * 32, ("reduce-scatter", False): 16}


FAR = """ENTRY %main (a: bf16[32,4]) -> bf16[32,4] {
  %a = bf16[32,4]{1,0:T(8,128)} parameter(0)
  %after = token[] after-all()
  %r = (bf16[32,4]{1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=1, frontend_attributes={KIND}
  %rd = (bf16[32,4]{1,0:T(8,128)}, token[]) recv-done(%r), channel_id=1
  %s = (bf16[32,4]{1,0:T(8,128)}, u32[], token[]) send(%a, %after), channel_id=2, frontend_attributes={KIND}
  %sd = token[] send-done(%s), channel_id=2
  ROOT %x = bf16[32,4]{1,0:T(8,128)} get-tuple-element(%rd), index=0
}
"""


def test_what_tpus_send_to_other_slices_through_their_hosts_is_counted():
    """As the TPU compiler writes it for several slices: no collective, but a message to the host, which adds the slices up."""
    kind = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="{}"'
    found = cost.cost(FAR.replace("KIND", kind.format("ALL_REDUCE")), 8, slices=2)
    assert found.calls == {("all-reduce", True): 1} and found.sent == {("all-reduce", True): 32 * 4 * 2}
    assert cost.cost(FAR.replace("KIND", kind.format("ALL_REDUCE")), 8, slices=4).sent["all-reduce", True] == 1.5 * 32 * 4 * 2
    assert cost.cost(FAR.replace("KIND", kind.format("ALL_GATHER")), 8, slices=4).sent["all-gather", True] == 32 * 4 * 2
    with pytest.raises(cost.Unknown, match="another slice that is not known: gossip"):
        cost.cost(FAR.replace("KIND", kind.format("GOSSIP")), 8, slices=2)


def test_groups_that_cross_slices_are_told_apart():
    """[2,4]<=[4,2]T(1,0) is {0,2,4,6} and {1,3,5,7}: in two slices of four devices each group is in both."""
    assert cost.cost(LOOP, 8, slices=2).calls == {("all-reduce", True): 3}
    within = LOOP.replace("[2,4]<=[4,2]T(1,0)", "{{0,1,2,3},{4,5,6,7}}")
    assert cost.cost(within, 8, slices=2).calls == {("all-reduce", False): 3}


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,3},{1,2}}, x", [[0, 3], [1, 2]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    np.testing.assert_array_equal(hlo.groups(text, 4), groups)


@pytest.mark.parametrize("text", ["replica_groups=other[2,2], x", "replica_groups=mesh['a'=4] {'a':(1)2}, x"])
def test_groups_of_an_unknown_form_are_not_taken_for_all_devices(text):
    with pytest.raises(hlo.Unknown, match="replica_groups="):
        hlo.groups(text, 4)


def test_a_loop_that_the_data_ends_is_asked_for():
    unknown = LOOP.replace("%last = s32[]{:T(128)} constant(6)", "%last = s32[]{:T(128)} get-tuple-element(%s.1), index=0")
    with pytest.raises(hlo.Unknown, match="how often does the loop"):
        cost.cost(unknown, 8)
    named = unknown.replace("body=%body", 'body=%body, metadata={op_name="jit(f)/outer/while/body/jvp(inner)/while"}')
    assert cost.cost(named, 8, loops={"outer": 7, "inner": 5}).calls == {("all-reduce", False): 5}


@pytest.mark.parametrize(
    "labels, window, lhs, rhs, out, products",
    [
        ("bf_io->bf", "", (16, 1024), (1024, 512), (16, 512), 16 * 1024 * 512),
        # A batch of eight as a spatial axis whose every second place is a hole, and a kernel as wide.
        ("0bf_0io->0bf", "size=8 stride=7 pad=0_0 lhs_dilate=8", (8, 4, 16), (8, 16, 2), (8, 4, 2), 8 * 4 * 16 * 2),
        ("b0f_0io->b0f", "size=3 pad=1_1", (1, 10, 4), (3, 4, 5), (1, 10, 5), (3 * 10 - 2) * 4 * 5),
    ],
)
def test_convolutions_are_counted_by_what_is_multiplied(labels, window, lhs, rhs, out, products):
    shape = lambda dims: f"f32[{','.join(map(str, dims))}]{{0}}"  # noqa: E731
    text = f"""ENTRY %main (a: f32[]) -> f32[] {{
  %a = {shape(lhs)} parameter(0)
  %b = {shape(rhs)} parameter(1)
  ROOT %c = {shape(out)} convolution(%a, %b){f", window={{{window}}}" if window else ""}, dim_labels={labels}
}}
"""
    assert cost.cost(text, 1).flops == 2 * products


# --- Formulas ---------------------------------------------------------------------------------------------------------
def test_weights_are_those_of_a_published_model():
    """Llama 3.1, 8 B: 8,030,261,248 with its norms (the model card), of which two matrices are embeddings."""
    cfg = shapes.architecture(config(model__path="configs/shapes/Llama-3.1-8B"), "base")
    norms = (2 * cfg.num_layers + 1) * cfg.width
    assert sum(weights(cfg).values()) + 2 * cfg.vocab_size * cfg.width + norms == 8_030_261_248


def test_training_takes_three_forward_passes_and_recomputing_almost_four():
    net = tiny.net()
    c, (rows, length) = net.cfg, (2, 512)
    matrices, scores = sum(weights(c).values()), 256 * 256 + 256 * 512  # in two blocks of queries
    attention = 2 * c.num_heads * c.head_dim * c.num_layers * rows * scores
    forward = Work(net).texts(rows, length, "alone").flops
    assert forward == 2 * matrices * rows * length + 2 * attention
    assert Work(net).training(rows, length, "alone").flops == 3 * forward
    again = Work(net.clone(remat="full")).training(rows, length, "alone").flops
    assert again == 4 * forward - 2 * weights(c)["down"] * rows * length


@pytest.fixture(scope="module")
def built(mesh8):
    """Every step of the embedded world's stages on eight devices of this machine."""
    cfg = config(
        stages=("critique", "sft", "preferences", "reward", "harm", "dpo", "ppo", "evaluate"),
        mesh=(2, 2, 2),
        model__vocab_multiple=2,
        data__max_prompt=64,
        preferences__score_batch=16,
    )
    with jax.set_mesh(mesh8):
        return {f"{s.stage}, {s.name}": s for s in steps(cfg, mesh8)}


NAMES = """critique, read|critique, decode|sft, train|preferences, read|preferences, decode|preferences, score options|
reward, train|reward, score|harm, train|harm, score|dpo, reference|dpo, train|ppo, roll out|
ppo, score|ppo, train|evaluate, read|evaluate, decode|evaluate, log-probs|
evaluate, score by reward|evaluate, score by harm"""
NAMES = [name.strip() for name in NAMES.split("|")]


def test_every_step_is_there(built):
    assert list(built) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled_multiplies_what_the_formula_says(name, built, mesh8):
    """On this machine's compiler. To 5 %: sampling by threshold and rotating are products too, and a device has parts of
    blocks."""
    step = built[name]
    with jax.set_mesh(mesh8):
        text = step.lower().compile().as_text()
    found = cost.cost(text, 8, loops=step.loops)
    assert found.flops == pytest.approx(step.work.flops / 8, rel=0.05)


@TPU
def test_a_tied_embedding_stays_whole_while_a_tpu_decodes():
    """It is looked up in parts, and whole for the logits. Left to itself the TPU compiler sends it at every token."""
    cfg = config(
        stages=("critique",), mesh=(1, 8, 1), model__path="configs/shapes/Llama-3.2-1B", critique__sampling__batch_size=32
    )
    devices = chips.devices("v5e:2x4")
    with jax.set_mesh(mesh := make_mesh(cfg.mesh, devices)):
        (decode,) = (s for s in steps(cfg, mesh) if s.name == "decode")
        found = cost.cost(decode.lower().compile().as_text(), 8, loops=decode.loops)
    assert found.sent.total() < 1e6 < 2 * 128256 * 2048  # bytes: of states and what is found per row, not of weights


# --- The command ------------------------------------------------------------------------------------------------------
@TPU
def test_the_command_shows_every_step_and_gives_json():
    done = cai(
        "--config=configs/miniworld.py",
        "--config.stages=('critique','sft')",
        "--config.data.max_prompt=64",
        "--topology=v5e:2x4",
        "--json",
        command="compile",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert [f"{r['stage']}, {r['step']}" for r in rows] == ["critique, read", "critique, decode", "sft, train"]
    for row in rows:
        assert row["fits"] and 0 < row["memory"]["needs"] < row["hbm"] == 16 * 2**30
        assert row["flops"] == pytest.approx(row["flops_by_formula"], rel=0.05)
        assert f"{row['memory']['needs'] / 2**30:.2f}" in done.stderr
    assert re.search(r"compiled 3 steps in \d+ s", done.stderr)


@TPU
@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--topology=v5e:3x7"], "the TPU compiler knows no such slice"),
        (["--topology=v9:2x2"], "wanted one of v4, v5e"),
        (["--topology=v5e:2x4", "--slices=0"], "--slices=0"),
        (["--topology=v5e:2x4", "--config.stages=('report',)"], "none of them is compiled ahead"),
        (["--topology=v5e:2x4", "--config.mesh=(3,1,1)"], "--config.mesh=(3, 1, 1) wants 3 devices, v5e:2x4 has 8"),
        (["--topology=v5e:2x2", "--slices=2", "--config.mesh=(1,8,1)"], "the data axis over 2 slices"),
        (["--topology=v5e:2x4", "--config.mesh=(1,1,8)"], "'model'"),
        (["--topology=v5e:2x4", "--config.model.path=nobody/nothing"], "--config.model.path=nobody/nothing"),
    ],
)
def test_what_cannot_be_compiled_is_said(arguments, told):
    done = cai("--config=configs/miniworld.py", *arguments, command="compile")
    assert done.returncode == 2 and told in " ".join(done.stderr.split()), done.stderr[-2000:]


@TPU
def test_a_step_that_does_not_fit_is_said_with_what_to_change():
    devices = chips.devices("v5e:2x2")
    mesh = make_mesh((4, 1, 1), devices)
    x = shapes.array(mesh, jnp.float32, 4, 60_000, 60_000, spec=P(BATCH))  # 14.4 GB a device, and as much for the result
    step = SimpleNamespace(stage="sft", name="train", sizes="much", loops={}, work=None)
    step.lower = partial(jax.jit(lambda x: x * 2).lower, x)
    with jax.set_mesh(mesh):
        row = ahead.compiled(step, chips.CHIPS["v5e"], 4, 1)
    assert not row["fits"] and row["memory"]["needs"] > 16 * 2**30
    assert "sft, train (much) does not fit" in ahead.warning(row) and "--config.model.remat=full" in ahead.warning(row)
    assert len(ahead.cells(row)) == len(ahead.HEADER)


def test_what_to_install_is_said_where_there_is_no_compiler(monkeypatch):
    """jax 0.10 says it so; where libtpu is missing, it is jax that is asked."""

    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    if find_spec("libtpu"):
        monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"wants the TPU compiler.*'\.\[tpu\]'"):
        chips.devices("v5e:2x4")


def test_a_step_that_the_compiler_refuses_is_a_row_like_the_others():
    """It must not cost a user what was found of the others."""

    def refuse():
        raise RuntimeError("INTERNAL: no routing table\n for %all-reduce.27")

    step = SimpleNamespace(stage="reward", name="train", sizes="128 rows", lower=lambda: SimpleNamespace(compile=refuse))
    row = ahead.compiled(step, chips.CHIPS["v5e"], 4, 1)
    assert not row["fits"] and json.dumps(row)
    told = ahead.warning(row)
    assert "reward, train (128 rows)" in told and "no routing table for %all-reduce.27" in told and "--config.mesh" in told
    assert len(ahead.cells(row)) == len(ahead.HEADER)


def test_a_model_is_known_by_its_name(tmp_path, monkeypatch):
    assert ahead.local("meta-llama/Llama-3.1-8B-Instruct@main", "model") == "configs/shapes/Llama-3.1-8B"
    assert ahead.local(str(tmp_path), "model") == str(tmp_path) and ahead.local("", "model") == ""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="--config.reward.model.path=a/b: no such folder"):
        ahead.local("a/b", "reward.model")
