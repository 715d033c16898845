"""PPO's own pieces: texts packed in parts, what is predicted from where, rewards, the loss, the prompts."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_formats
import tiny
from jax import monitoring

from cai_jax import config, losses, optim, prompts
from cai_jax.data import pad_rows
from cai_jax.experience import Layout, layout, minibatch, packed, policy_and_value, ppo_loss, scaled_head
from cai_jax.experience import experience as experience_of
from cai_jax.models.heads import apply_head, init_head
from cai_jax.models.transformer import cast_matrices
from cai_jax.sampling import record_keys
from cai_jax.score import reward_scores
from cai_jax.sharding import put, put_batch
from cai_jax.slots import Sampled, generate
from cai_jax.stages.ppo import Frozen, PPOState, PromptPool, again, iteration, packer
from cai_jax.train import Parts, init_state, make_train_step

R = 6
C = config.PPO(sampling=config.Sampling(max_tokens=R, temperature=0.7), missing_eos_penalty=3.0, whiten_advantages=False)
C = replace(C, batch_size=8, minibatches=1)
RLOO = replace(C, advantage="rloo", group=4)
SCALE = {"mean": 0.25, "std": 2.0}


@cache
def world(mesh):
    """A policy, a reward model and a sampled batch of 8 rows."""
    params = tiny.on(mesh)
    head = put({"head": init_head(jax.random.key(3), tiny.CFG.width)}, mesh)
    tokens, lengths = tiny.rows([4, 7, 8, 5, 6, 8, 3, 7], 8)
    batch = put_batch({"tokens": tokens, "lengths": lengths, "helpful": np.float32([0, 1] * 4)}, mesh)
    keys = record_keys(jax.random.key(0), jnp.arange(16, dtype=jnp.uint32).reshape(8, 2))
    stop = jnp.arange(1, 40)  # many ends, so that responses end early at random
    out = generate(tiny.net(), params, batch["tokens"], batch["lengths"], keys, stop, jnp.float32(0.7), max_new=R)
    return params, {"trunk": params} | head, batch, out


def experience(c, params, reference, reward, scale, kl_coef, batch, out):
    """-> (rollout, metrics, the first part of its texts)."""
    mesh = batch["tokens"].sharding.mesh
    texts, at = packer(c, jax.device_get(batch), out, mesh)(range(8))
    weights = params, reference, reward
    nets = (tiny.net(),) * 3
    rollout, metrics = experience_of(nets, c, weights, scale, kl_coef, batch["helpful"], out, texts, put_batch(at, mesh))
    return rollout, metrics, minibatch(rollout, texts).part(0)


def test_the_value_head_starts_on_the_scale_of_the_scores(mesh1):
    """Returns are made of centred and scaled scores: a value network that starts as the raw reward model is off by as much."""
    _, reward, _, _ = world(mesh1)
    hidden = jax.random.normal(jax.random.key(1), (5, tiny.CFG.width))
    score = (apply_head(reward["head"], hidden) - SCALE["mean"]) / SCALE["std"]
    np.testing.assert_allclose(apply_head(scaled_head(reward["head"], SCALE), hidden), score, rtol=1e-5, atol=1e-6)


def test_bfloat16_leaves_norms_and_heads_in_float32(mesh1):
    """A head or a scale that is rounded for the sampler and not for the trainer makes two models of one."""
    params, reward, _, _ = world(mesh1)
    cast = cast_matrices(reward, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(cast["head"])} == {jnp.dtype("float32")}
    dtypes = {"/".join(k.key for k in path): x.dtype for path, x in jax.tree_util.tree_flatten_with_path(cast["trunk"])[0]}
    assert {n for n, d in dtypes.items() if d == jnp.float32} == {n for n in dtypes if n.endswith("scale")}
    assert apply_head(cast["head"], jnp.ones((2, tiny.CFG.width), jnp.bfloat16)).dtype == jnp.float32


def some_texts(seed: int, count: int, P: int = 9):
    """-> (prompt and response of each, tokens of the prompts)."""
    rng = np.random.default_rng(seed)
    lengths, said = rng.integers(1, P + 1, count), rng.integers(1, R + 1, count)
    return [rng.integers(2, 98, n + m, np.int32) for n, m in zip(lengths, said, strict=True)], lengths


@pytest.mark.parametrize("to", [Layout(1, 32, 2), Layout(2, 32, 2), Layout(4, 15, 1)])
def test_packed_texts_stand_whole_and_what_belongs_to_them_is_found(to):
    for seed in range(5):
        rows, prompts_B = some_texts(seed, 11)
        index = np.random.default_rng(seed).permutation(11)[:8]
        (x, count), at = packed(rows, prompts_B, index, to, R)
        flat = {name: value.reshape(-1) for name, value in x.items()}
        assert {value.shape for value in x.values()} == {(to.rows, -(-8 // to.held // to.rows), to.length)}
        for b in index:
            last, said = at["last"][b], rows[b][prompts_B[b] :]
            span = slice(last + 1 - len(rows[b]), last + 1)
            assert flat["tokens"][span].tolist() == rows[b].tolist()
            assert flat["positions"][span].tolist() == list(range(len(rows[b])))
            assert set(flat["ends"][span]) == {last % to.length + 1}
            places = at["place"][b, : len(said)]
            assert places.tolist() == list(range(last - len(said), last)) and flat["next"][places].tolist() == said.tolist()
            assert flat["answer"][places].tolist() == [1 + b * R + t for t in range(len(said))]
        answers = sum(len(rows[b]) - prompts_B[b] for b in index)
        assert np.count_nonzero(x["answer"]) == answers and np.count_nonzero(x["ends"]) == sum(len(rows[b]) for b in index)
        full = [bool(x["ends"][:, i].any()) for i in range(x["ends"].shape[1])]
        assert full == [i < count for i in range(len(full))]


def test_parts_have_one_size_whatever_the_texts_and_short_texts_make_few():
    to = layout(64, 100, 2)
    assert to.length == 256 and to.held == 2 and to.rows % 2 == 0
    shapes, counts = set(), []
    for size in (100, 50, 10):
        (x, count), _ = packed([np.ones(size, np.int32)] * 64, [size // 2] * 64, range(64), to, 50)
        shapes.add(x["tokens"].shape)
        counts.append(int(count))
    assert len(shapes) == 1 and counts == [8, 4, 1]
    for ways, shape in ((64, (64, 1, 128)), (32, (32, 1, 256)), (16, (32, 1, 256))):  # never more than the longest texts fill
        (x, count), _ = packed([np.ones(100, np.int32)] * 64, [50] * 64, range(64), layout(64, 100, ways), 50)
        assert x["tokens"].shape == shape and count == 1


def test_long_texts_lie_in_rows_of_one_on_a_cpu_alone(monkeypatch):
    for machine, sizes in (("cpu", (Layout(1, 512, 2), Layout(2, 384, 1))), ("tpu", (Layout(8, 512, 2), Layout(8, 768, 2)))):
        monkeypatch.setattr("cai_jax.experience.machine", lambda machine=machine: machine)
        monkeypatch.setattr("cai_jax.slots.machine", lambda machine=machine: machine)
        assert tuple(layout(16, longest, 1) for longest in (256, 352)) == sizes


@pytest.mark.parametrize("c", [C, RLOO, replace(RLOO, advantage="grpo")], ids=lambda c: c.advantage)
def test_parts_teach_what_the_whole_teaches(mesh1, c):
    """Also when what nothing lies in is not a number: it is not looked at."""
    params, reward, batch, out = world(mesh1)
    with jax.set_mesh(mesh1):
        both = {"policy": params} | ({"value": reward} if c == C else {})
        rollout, _, _ = experience(c, both, tiny.on(mesh1), reward, SCALE, jnp.float32(0.2), batch, out)
        tokens, lengths, said, answered = jax.device_get((batch["tokens"], batch["lengths"], out.tokens_BR, out.lengths_B))
        rows = [np.concatenate([tokens[b, : lengths[b]], said[b, : answered[b]]]) for b in range(8)]
        tx = optim.make(c.optimizer, 4)
        step, found = make_train_step(ppo_loss(tiny.net(), c), tx, mesh1), []
        for to in (Layout(8, 32, 2), Layout(1, 32, 2), Layout(2, 16, 1)):
            (x, count), _ = packed(rows, lengths, range(8), to, R)
            x, count = minibatch(rollout, Parts(x, jnp.int32(count)))
            assert to.rows == 8 or 1 < count < x["tokens"].shape[1] or to.length == 16
            x["old_logp"] = x["old_logp"].at[:, int(count) :].set(jnp.nan)
            state = init_state(tiny.copy(both), tx, mesh1)
            state, metrics = step(state, {}, Parts(x, count), jax.random.key(0))
            moved = [metrics.pop(name) for name in ("approx_kl", "ratio_error")]  # 0, but for rounding
            assert max(abs(float(x)) for x in moved) < 1e-5
            if c == RLOO:
                metrics.pop("entropy")  # of parts a mean in which all responses count alike
                moved = [metrics.pop(name) for name in ("loss", "policy_loss")]  # advantages of a group cancel
                assert max(abs(float(x)) for x in moved) < 1e-5
            found.append(jax.device_get((state.opt_state, metrics)))  # its moments are the gradient, and its square
    for other in found[1:]:
        tiny.assert_close(other, found[0], 2e-5)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_without_a_value_function_responses_to_a_prompt_are_compared(mesh1, name):
    """The reward of a whole response, KL included, against those of its group."""
    params, reward, batch, out = world(mesh1)
    c, other = replace(RLOO, advantage=name), put(tiny.params(seed=1), mesh1)
    with jax.set_mesh(mesh1):
        given = other, reward, SCALE, jnp.float32(0.5), batch, out
        both = {"policy": params, "value": {"head": reward["head"]}}
        returns = np.asarray(experience(replace(C, gae_lambda=1.0), both, *given)[0]["returns"])[:, 0]  # without a discount
        rollout, metrics, _ = experience(c, {"policy": params}, *given)
    groups, found = returns.reshape(2, 4).astype(np.float64), np.asarray(rollout["advantages"])
    if name == "rloo":
        wanted = np.array([[r - np.mean(np.delete(g, i)) for i, r in enumerate(g)] for g in groups])
    else:
        wanted = np.array([[(r - g.mean()) / (g.std(ddof=1) + 1e-4) for r in g] for g in groups])
    mask = np.arange(R)[None] < np.asarray(out.lengths_B)[:, None]
    np.testing.assert_allclose(found, np.where(mask, wanted.reshape(8, 1), 0), rtol=1e-4, atol=1e-4)
    assert rollout.keys() == {"old_logp", "advantages"} and "explained_variance" not in metrics


def test_rloo_clips_the_ratio_of_a_whole_response(mesh1):
    """Loss and gradient of the mean over responses, by hand from the log-probs of a policy that has moved."""
    params, reward, batch, out = world(mesh1)
    near = jax.tree.map(lambda a, b: a + 0.02 * (b - a), params, put(tiny.params(seed=1), mesh1))
    with jax.set_mesh(mesh1):
        _, _, part = experience(RLOO, {"policy": params}, params, reward, SCALE, jnp.float32(0.2), batch, out)
        owner = jnp.where(part["answer"] > 0, (part["answer"] - 1) // R, 8).reshape(-1)

        def by_hand(policy):
            logp = policy_and_value(tiny.net(), {"policy": policy}, part, 0.7)[0]
            moved = jnp.where(owner < 8, (logp - part["old_logp"]).reshape(-1), 0.0)
            ratio_B = jnp.exp(jax.ops.segment_sum(moved, owner, 9))[:8]
            advantage_B = jax.ops.segment_max(part["advantages"].reshape(-1), owner, 9)[:8]
            return -jnp.mean(jnp.minimum(ratio_B * advantage_B, jnp.clip(ratio_B, 0.8, 1.2) * advantage_B))

        wanted, slope = jax.jit(jax.value_and_grad(by_hand))(near)
        found = jax.jit(jax.value_and_grad(lambda p: ppo_loss(tiny.net(), RLOO)({"policy": p}, part, None), has_aux=True))
        (loss, metrics), grads = found(near)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4) and float(metrics["weight"]) == 8
    assert 0 < float(metrics["clip_fraction"]) < 1 and "value_loss" not in metrics
    tiny.assert_close(grads, slope, 1e-4)


def test_lesson_02_and_03_scored_logprobs_are_those_of_the_sampler(mesh1):
    with jax.set_mesh(mesh1):
        params, reward, batch, out = world(mesh1)
        both = {"policy": params, "value": {"head": reward["head"]}}
        _, metrics, _ = experience(C, both, params, reward, SCALE, jnp.float32(0.2), batch, out)
        assert float(metrics["drift"]) < 1e-5
        assert abs(float(metrics["kl"])) < 1e-5
        hot = replace(C, sampling=config.Sampling(max_tokens=R, temperature=1.0))
        _, wrong, _ = experience(hot, both, params, reward, SCALE, jnp.float32(0.2), batch, out)
        assert float(wrong["drift"]) > 0.01  # a forgotten temperature shows


def test_lesson_01_and_04_the_score_lands_on_the_last_token_with_its_fraction(mesh1):
    with jax.set_mesh(mesh1):
        params, reward, batch, out = world(mesh1)
        other = put(tiny.params(seed=1), mesh1)
        reward = reward | {"trunk": put(tiny.params(seed=2), mesh1)}
        both = {"policy": params, "value": {"head": reward["head"]}}
        rollout, metrics, _ = experience(C, both, other, reward, SCALE, jnp.float32(0.5), batch, out)
    out, rollout = jax.device_get((out, rollout))
    assert 0 < out.finished_B.sum() < 8 and len(set(out.lengths_B.tolist())) > 2
    tokens, lengths = jax.device_get((batch["tokens"], batch["lengths"]))
    mask = (np.arange(R)[None] < out.lengths_B[:, None]).astype(np.float32)
    rows = [np.concatenate([tokens[b, : lengths[b]], out.tokens_BR[b, : out.lengths_B[b]]]) for b in range(8)]
    joined, _ = pad_rows(rows, 14)

    raw = np.asarray(reward_scores(tiny.net(), reward, jnp.asarray(joined), jnp.asarray(lengths + out.lengths_B)))
    score = (raw - SCALE["mean"]) / SCALE["std"] - 3.0 * ~out.finished_B
    assert float(metrics["score"]) == pytest.approx(score.mean(), abs=1e-5) and score.std() > 0.1

    def scored(params):  # log-probs of the response by a plain forward, [8, R]
        logits = np.asarray(tiny.logits(tiny.net(), params, joined, lengths + out.lengths_B)) / 0.7
        at = lengths[:, None] - 1 + np.arange(R)[None]
        logp = np.take_along_axis(tiny.log_softmax(logits), np.minimum(at, logits.shape[1] - 1)[:, :, None], axis=1)
        return np.take_along_axis(logp, out.tokens_BR[:, :, None], axis=2)[:, :, 0]

    kl = np.mean(np.sum((scored(tiny.params()) - scored(tiny.params(seed=1))) * mask, axis=1))
    assert float(metrics["kl"]) == pytest.approx(kl, abs=1e-3)
    # reward = score - kl_coef x KL, nothing rounded away; with discount 1 and a value of 0 the return at the start is all of it
    assert float(metrics["reward"]) == pytest.approx(float(metrics["score"]) - 0.5 * kl, abs=1e-3)
    assert float(metrics["score"]) != round(float(metrics["score"]))
    np.testing.assert_allclose((rollout["returns"] - rollout["advantages"]) * mask, rollout["old_values"] * mask, atol=1e-4)


def test_a_response_without_eos_pays_the_penalty(mesh1):
    with jax.set_mesh(mesh1):
        params, reward, batch, out = world(mesh1)
        both = {"policy": params, "value": {"head": reward["head"]}}

        def score(finished):
            forced = out._replace(finished_B=jnp.full((8,), finished))
            return float(experience(C, both, params, reward, SCALE, jnp.float32(0.2), batch, forced)[1]["score"])

        assert score(True) - score(False) == pytest.approx(3.0, abs=1e-4)


def test_the_first_minibatch_has_ratio_one_and_a_later_one_clips(mesh1):
    with jax.set_mesh(mesh1):
        params, reward, batch, out = world(mesh1)
        both = {"policy": params, "value": {"head": reward["head"]}}
        _, _, part = experience(C, both, params, reward, SCALE, jnp.float32(0.2), batch, out)
        loss = jax.jit(ppo_loss(tiny.net(), C))
        _, first = loss(both, part, None)
        assert float(first["ratio_error"]) < 1e-4 and float(first["clip_fraction"]) == 0
        grads = jax.jit(jax.grad(lambda p: loss(p, part, None)[0]))(both)
        moved = jax.tree.map(lambda p, g: p - 0.3 * g / (1e-8 + jnp.abs(g).max()), both, grads)
        _, later = loss(moved, part, None)
        assert float(later["clip_fraction"]) > 0 and float(later["approx_kl"]) > 0


def test_what_lies_behind_the_end_changes_nothing(mesh1):
    with jax.set_mesh(mesh1):
        params, reward, batch, out = world(mesh1)
        both = {"policy": params, "value": {"head": reward["head"]}}
        junk = jnp.where(jnp.arange(R)[None] < out.lengths_B[:, None], out.tokens_BR, 50)
        a, am, part_a = experience(C, both, params, reward, SCALE, jnp.float32(0.2), batch, out)
        b, bm, part_b = experience(C, both, params, reward, SCALE, jnp.float32(0.2), batch, out._replace(tokens_BR=junk))
        for name in ("advantages", "returns"):
            np.testing.assert_allclose(a[name], b[name], atol=1e-5)
        assert float(am["score"]) == pytest.approx(float(bm["score"]), abs=1e-5)
        la, lb = (ppo_loss(tiny.net(), C)(both, x, None)[0] for x in (part_a, part_b))
        assert float(la) == pytest.approx(float(lb), abs=1e-5)


def test_shared_and_separate_value_networks_read_their_own_trunk(mesh1):
    with jax.set_mesh(mesh1):
        params, reward, batch, out = world(mesh1)
        shared, separate = {"head": reward["head"]}, {"head": reward["head"], "trunk": put(tiny.params(seed=1), mesh1)}
        *_, part = experience(C, {"policy": params, "value": shared}, params, reward, SCALE, jnp.float32(0.2), batch, out)
        a = policy_and_value(tiny.net(), {"policy": params, "value": shared}, part, 0.7)
        b = policy_and_value(tiny.net(), {"policy": params, "value": separate}, part, 0.7)
        np.testing.assert_array_equal(a[0], b[0])
        assert np.abs(np.asarray(a[2] - b[2])).max() > 0.1


@pytest.mark.parametrize("sizes", [(Layout(16, 32, 2),) * 2, (Layout(1, 32, 2), Layout(4, 32, 1))])
def test_eight_devices_give_the_experience_of_one(mesh1, mesh8, sizes, monkeypatch):
    """In one part, and in several with nothing in the last."""
    found = []
    for mesh, to in zip((mesh1, mesh8), sizes, strict=True):
        monkeypatch.setattr("cai_jax.stages.ppo.layout", lambda *_, to=to: to)
        with jax.set_mesh(mesh):
            params, reward, batch, out = world(mesh)
            both = {"policy": params, "value": {"head": reward["head"]}}
            rollout, metrics, _ = experience(C, both, params, reward, SCALE, jnp.float32(0.2), batch, out)
            found.append(jax.device_get((out, rollout, metrics)))
    assert isinstance(found[0][0], Sampled)
    np.testing.assert_array_equal(found[0][0].tokens_BR, found[1][0].tokens_BR)
    for name in found[0][1]:
        np.testing.assert_allclose(found[0][1][name], found[1][1][name], atol=2e-5, err_msg=name)
    for name in found[0][2]:
        np.testing.assert_allclose(found[0][2][name], found[1][2][name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_where_the_kernel_wants_one_text_a_row_it_has_one(mesh1, monkeypatch):
    params, reward, batch, out = world(mesh1)
    both, found = {"policy": params, "value": {"head": reward["head"]}}, []
    with jax.set_mesh(mesh1):
        for found_machine in ("cpu", "cudnn"):
            monkeypatch.setattr("cai_jax.experience.machine", lambda x=found_machine: x)
            _, metrics, part = experience(C, both, params, reward, SCALE, jnp.float32(0.2), batch, out)
            part = jax.device_get(part)
            found.append((jax.device_get(metrics), (part["positions"] == 0) & (part["ends"] > 0)))
    for name in found[0][0]:
        np.testing.assert_allclose(found[0][0][name], found[1][0][name], rtol=1e-4, atol=2e-5, err_msg=name)
    begun = [np.sum(first, axis=1).tolist() for _, first in found]
    assert max(begun[0]) > 1 and begun[1] == [1] * 8


def test_a_minibatch_has_what_the_rollout_found_for_each_answer():
    parts = Parts({"answer": jnp.array([[[0, 3], [4, 0]]]), "tokens": jnp.array([[[5, 6], [7, 8]]])}, jnp.int32(2))
    out = minibatch({"old_logp": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, parts)
    assert out.arrays["old_logp"].tolist() == [[[0, 3], [4, 0]]] and out.arrays["tokens"].tolist() == [[[5, 6], [7, 8]]]


def pool(tmp_path, redteam: int, helpful: int, **ppo):
    paths = {}
    for name, count in (("redteam", redteam), ("helpful", helpful)):
        paths[name] = tmp_path / f"{name}.jsonl"
        rows = [{"id": f"{name}{i}", "messages": [{"role": "user", "content": f"{name} {i}"}]} for i in range(count)]
        paths[name].write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = config.Data(redteam=str(paths["redteam"]), helpful=str(paths["helpful"]))
    cfg = config.Config(data=data, ppo=config.PPO(**ppo))
    return PromptPool(cfg, SimpleNamespace(tok=tiny.tokenizer(), cfg=tiny.CFG), prompts.TEMPLATES)


def test_prompts_keep_their_share_and_a_pass_uses_each_once(tmp_path):
    p = pool(tmp_path, 12, 6, batch_size=8, helpful_share=0.25)
    seen = {0.0: [], 1.0: []}
    for t in range(2):
        batch, asked = p.batch_at(t)
        assert batch["helpful"].sum() == 2 and len(batch["tokens"]) == 8
        for row, length, helpful in zip(batch["tokens"], batch["lengths"], batch["helpful"], strict=True):
            seen[float(helpful)].append(tuple(row[:length]))
    assert len(set(seen[0.0])) == 12 and len(set(seen[1.0])) == 4
    np.testing.assert_array_equal(p.batch_at(1)[0]["tokens"], batch["tokens"])  # a pure function of the iteration


def test_a_group_is_of_one_prompt_and_lies_together(tmp_path):
    p = pool(tmp_path, 12, 6, batch_size=12, helpful_share=0.4, advantage="rloo", group=3)
    seen = []
    for t in range(4):
        batch, asked = p.batch_at(t)
        assert batch["helpful"].tolist() == [0.0] * 6 + [1.0] * 6  # 0.4 of 12 is not a whole number of groups
        for g in range(4):
            assert len({str(m) for m in asked[3 * g : 3 * g + 3]}) == 1
            assert (batch["tokens"][3 * g : 3 * g + 3] == batch["tokens"][3 * g]).all()
        seen += [str(asked[0]), str(asked[3])]
    assert len(set(seen)) == 8  # no prompt again before all were there


def test_prompts_that_pass_the_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_tokens=120"):
        pool(tmp_path, 4, 4, batch_size=8, sampling=config.Sampling(max_tokens=120))


def test_adaptive_kl_uses_the_measured_kl():
    up = losses.adapt_kl_coef(jnp.float32(0.2), jnp.float32(9.0), 1.0, 1000, 100)
    assert float(up) == pytest.approx(0.2 * (1 + 0.2 * 0.1))


@pytest.mark.parametrize("kind", [{}, {"advantage": "rloo", "group": 2}], ids=["gae", "rloo"])
def test_nothing_is_compiled_after_the_first_iteration(mesh1, request, kind):
    """Counted are XLA's compilations, those of single operations too, over three iterations of prompts of other lengths."""
    compiled = []

    def on(event: str, *_, **__):
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    monitoring.register_event_duration_secs_listener(on)
    request.addfinalizer(lambda: monitoring.unregister_event_duration_listener(on))
    c = replace(C, batch_size=8, minibatches=2, epochs=2, target_kl=10.0, **kind)
    params, reward, _, _ = world(mesh1)

    def batch_at(t):
        tokens, lengths = tiny.rows([4, 7, 8 - t, 5, 6 - t, 8, 3, 7], 8, seed=t)
        return {"tokens": tokens, "lengths": lengths, "helpful": np.float32([0, 1] * 4)}, None

    with jax.set_mesh(mesh1):
        lm = tiny.lm(mesh1)
        frozen = Frozen(lm.net(), {}, lm, lm._replace(params=reward), None, SCALE)
        tx = optim.make(c.optimizer, 12)
        trained = tiny.copy({"policy": params} | ({} if kind else {"value": reward}))
        state = PPOState(init_state(trained, tx, mesh1), jnp.float32(c.kl_coef), jnp.int32(0))
        step = make_train_step(ppo_loss(lm.net(), c), tx, mesh1)
        cfg, counts = SimpleNamespace(seed=0, ppo=c), []
        for t in range(3):
            key = jax.random.fold_in(jax.random.key(0), t)
            state, metrics, seconds = iteration(cfg, mesh1, state, step, frozen, SimpleNamespace(batch_at=batch_at), key, t)
            counts.append(len(compiled))
    assert counts[0] > 3 and counts == [counts[0]] * 3
    assert int(state.iteration) == 3 and int(state.train.step) == 12 and metrics["updates"] == 4
    assert set(seconds) == {"rollout", "score", "update"} and min(seconds.values()) > 0


def test_lesson_04_another_reward_model_reads_the_same_texts_in_its_own_tokens(mesh1):
    """The end it knows stands behind what was finished, and what passes its context is cut at the front."""
    other, templates = test_formats.made("tiktoken", "headers"), prompts.TEMPLATES
    wrote = tiny.tokenizer()
    said, ended = ["Yes.", "No, not ", ""], [True, False, True]
    asked = [[{"role": "user", "content": text}] for text in ("Why?", "Is it so? <|eot_id|>", "And " * 60)]
    rows = [wrote.encode(text) + [wrote.eos_id] * end for text, end in zip(said, ended, strict=True)]
    tokens, lengths = pad_rows(rows, 12)
    out = Sampled(jnp.asarray(tokens), jnp.asarray(lengths), jnp.array(ended), None)
    reward = SimpleNamespace(tok=other, cfg=SimpleNamespace(max_length=90))
    found = again(Frozen(None, {}, SimpleNamespace(tok=wrote), reward, templates, {}), asked, out)
    for i, n in enumerate(found["lengths"]):
        text = prompts.dialogue(asked[i], templates) + prompts.completion(said[i], templates)
        whole = other.prompt(text) + [other.eos_id] * ended[i]
        assert found["tokens"][i, :n].tolist() == whole[-90:]
    assert found["lengths"].tolist()[2] == 90 and found["lengths"].max() == 90
