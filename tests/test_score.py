"""Log-probs of given text against plain softmaxes, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import score
from cai_jax.data import bucket, pad_rows
from cai_jax.errors import InputError
from cai_jax.models.heads import apply_head, init_head
from cai_jax.score import averaged_preference, hidden_states, option_logprobs, row_batch
from cai_jax.sharding import put, put_batch

# --- Options ----------------------------------------------------------------------------------------------------------
CONTEXTS = ["Q:", "Which is better? The answer is:", "x" * 29, "y" * 40, "Really?", "z" * 33, "a b c", "Hm"]
LETTERS, WHOLE = ("A", "B"), (" (A)", " (B) or so")  # one token each; four and ten


def options(mesh, contexts=CONTEXTS, batch_size=8, options=LETTERS):
    with jax.set_mesh(mesh):
        return option_logprobs(tiny.lm(mesh), contexts, batch_size, mesh, "judge", options)


def by_hand(contexts, options):
    """One plain forward pass of context + option for each."""
    tok, out = tiny.tokenizer(), np.zeros((len(contexts), len(options)))
    rows = [tok.encode(c + o) for c in contexts for o in options]
    tokens, lengths = pad_rows(rows, 64)
    logp = tiny.log_softmax(tiny.logits(tiny.net(), tiny.params(), tokens, lengths))
    for r, ids in enumerate(rows):
        context = len(tok.encode(contexts[r // len(options)]))
        out[r // len(options), r % len(options)] = sum(logp[r, t - 1, ids[t]] for t in range(context, len(ids)))
    return out


@pytest.mark.parametrize("names", [LETTERS, WHOLE], ids=["one token", "whole strings"])
def test_option_logprobs_equal_plain_forward_passes(mesh1, names):
    found = options(mesh1, options=names)
    assert found.dtype == np.float64 and found.shape == (8, 2)
    np.testing.assert_allclose(found, by_hand(CONTEXTS, names), rtol=1e-5, atol=2e-5)
    assert (np.ptp(found, axis=0) > 0.5).all()


def test_contexts_may_have_options_of_their_own(mesh1):
    asked = [(c, WHOLE[: 1 + n % 2] + LETTERS[: 1 + n % 3]) for n, c in enumerate(CONTEXTS)]
    with jax.set_mesh(mesh1):
        found = score.choice_logprobs(tiny.lm(mesh1), asked, 8, mesh1, "")
    assert [len(x) for x in found] == [len(options) for _, options in asked] and len(set(map(len, found))) == 3
    for x, (context, options) in zip(found, asked, strict=True):
        np.testing.assert_allclose(x, by_hand([context], options)[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("limit", [1, 40, 2048])
def test_options_of_contexts_with_much_in_common_are_those_of_each_alone(mesh1, mesh8, monkeypatch, limit):
    """Worked examples before all, a conversation before four, then two orders of each: in small trees and large ones, on one
    device and on eight."""
    monkeypatch.setattr(score, "LIMITS", (limit,))
    asked = [
        f"Examples of what is better. {c}, {q}? {o}:" for c in ("Hi", "Who is it") for q in "xy" for o in ("a b", "b a", "a b")
    ]
    wanted = by_hand(asked, WHOLE)
    for mesh in (mesh1, mesh8):
        np.testing.assert_allclose(options(mesh, asked, options=WHOLE), wanted, rtol=1e-5, atol=2e-5)
    assert len(np.unique(wanted.round(4))) == 16  # of 24: the third order is the first


def test_what_contexts_share_is_read_once(mesh1, capsys):
    """The tokens read, counted by hand: both options begin with " (", which is read, their letters differ, ")" is not read."""
    asked = [f"{'e' * 20}{order}:" for order in ("ab", "ba")]
    options(mesh1, asked, options=(" (A)", " (B)"))
    assert "4 options: 34 tokens read of 104" in capsys.readouterr().err


def test_the_wider_a_model_the_more_of_its_texts_share_a_tree():
    """Forty texts behind a beginning of 200 tokens, 100 more each: what stands twice costs wide models more than long rows."""
    texts = [[*range(200), *([i] * 100)] for i in range(40)]
    plans = {width: score.cheapest(texts, width) for width in (16, 1024)}
    lengths = {width: length for width, (*_, length) in plans.items()}
    assert lengths[16] <= 512 and lengths[1024] == 1024
    for trees, placed, rows, length in plans.values():
        assert sorted(n for tree in trees for n, _ in tree.texts) == list(range(40))
        assert max(row for row, _ in placed) == rows - 1
        assert all(at + len(tree.tokens) <= length for tree, (_, at) in zip(trees, placed, strict=True))


@pytest.mark.parametrize("names", [LETTERS, WHOLE], ids=["one token", "whole strings"])
def test_lesson_23_option_logprobs_do_not_depend_on_batch_size_order_or_company(mesh1, names):
    wanted = options(mesh1, options=names)
    order = np.random.default_rng(0).permutation(len(CONTEXTS))
    found = options(mesh1, [CONTEXTS[i] for i in order], options=names)
    np.testing.assert_allclose(found, wanted[order], rtol=1e-6, atol=1e-6)
    short = [i for i in order if len(CONTEXTS[i]) < 20]
    found = options(mesh1, [CONTEXTS[i] for i in short], 4, names)
    np.testing.assert_allclose(found, wanted[short], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(options(mesh1, CONTEXTS[2:3], options=names), wanted[2:3], rtol=1e-6, atol=1e-6)
    twice = options(mesh1, CONTEXTS * 2, options=names)  # more rows than one batch holds, the last batch not full
    np.testing.assert_allclose(twice, np.concatenate([wanted, wanted]), rtol=1e-6, atol=1e-6)


def test_scores_on_eight_devices_equal_those_on_one(mesh1, mesh8):
    short = [c for c in CONTEXTS if bucket(len(c)) == 32]
    np.testing.assert_allclose(options(mesh8, short), options(mesh1, short), rtol=1e-5, atol=1e-5)


def test_a_comparison_longer_than_the_context_is_refused(mesh1):
    with pytest.raises(InputError, match="judge: a comparison of 129 tokens passes the model's context of 128"):
        options(mesh1, [*CONTEXTS, "x" * 128])


def test_the_length_of_the_longest_option_counts(mesh1):
    with pytest.raises(InputError, match="a comparison of 130 tokens"):
        options(mesh1, ["x" * 120], options=WHOLE)


def test_lesson_09_the_preference_is_the_mean_of_both_orders():
    log = np.log
    ab, ba = log([[0.9, 0.1], [0.2, 0.2]]), log([[0.3, 0.1], [0.1, 0.3]])
    np.testing.assert_allclose(averaged_preference(ab, ba), [(0.9 + 0.25) / 2, (0.5 + 0.75) / 2], rtol=1e-6)


def test_lesson_09_the_preference_does_not_depend_on_which_response_is_named_first():
    """A judge with a strong liking for the option (A): the averaged labels of a pair and of the pair swapped sum to one."""
    rng = np.random.default_rng(0)
    ab, ba = rng.normal(size=(2, 50, 2)) + [2.0, 0.0]
    np.testing.assert_allclose(averaged_preference(ab, ba) + averaged_preference(ba, ab), 1.0, atol=1e-6)
    same = averaged_preference(ab, ab)  # a judge that looks at the letters only
    np.testing.assert_allclose(same, 0.5, atol=1e-6)


# --- Rewards ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reward(mesh1):
    return {"trunk": tiny.on(mesh1), "head": {"kernel": jnp.linspace(-1.0, 1.0, 32)[:, None], "bias": jnp.array([0.25])}}


scores_of = jax.jit(score.reward_scores, static_argnums=0)


def test_reward_scores_read_the_last_token_of_each_row(reward):
    tokens, lengths = tiny.rows([8, 3, 5, 1], 8, seed=2)
    hidden = jax.jit(hidden_states, static_argnums=0)(tiny.net(), reward["trunk"], row_batch(tokens, lengths))
    hidden = np.asarray(hidden, np.float64)
    kernel = np.asarray(reward["head"]["kernel"], np.float64)[:, 0]
    wanted = [hidden[b, n - 1] @ kernel + 0.25 for b, n in enumerate(lengths)]
    found = scores_of(tiny.net(), reward, tokens, lengths)
    assert found.dtype == jnp.float32 and found.shape == (4,)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_reward_scores_see_the_end_token_and_nothing_behind_it(reward):
    tokens, lengths = tiny.rows([8, 3, 5, 1], 8, seed=2)
    wanted = np.asarray(scores_of(tiny.net(), reward, tokens, lengths))
    behind, _ = tiny.rows([8, 3, 5, 1], 8, seed=2, pad=60)
    np.testing.assert_array_equal(scores_of(tiny.net(), reward, behind, lengths), wanted)
    last = tokens.copy()
    last[np.arange(4), lengths - 1] = tiny.END
    assert (np.abs(scores_of(tiny.net(), reward, last, lengths) - wanted) > 1e-3).all()


def test_lesson_23_reward_scores_do_not_depend_on_batch_order_or_mesh(reward, mesh8):
    tokens, lengths = tiny.rows([8, 3, 5, 1], 8, seed=2)
    wanted = np.asarray(scores_of(tiny.net(), reward, tokens, lengths))
    order = np.array([2, 0, 3, 1])
    found = scores_of(tiny.net(), reward, tokens[order], lengths[order])
    np.testing.assert_allclose(found, wanted[order], rtol=1e-5, atol=1e-6)
    with jax.set_mesh(mesh8):
        b = put_batch({"tokens": np.tile(tokens, (2, 1)), "lengths": np.tile(lengths, 2)}, mesh8)
        params = put(jax.device_get(reward), mesh8)
        found = scores_of(tiny.net(), params, b["tokens"], b["lengths"])
    np.testing.assert_allclose(found, np.tile(wanted, 2), rtol=1e-5, atol=1e-5)


def test_a_new_head_has_the_papers_scale_and_computes_in_float32():
    head = init_head(jax.random.key(0), 2048)
    assert np.std(head["kernel"]) == pytest.approx(2049**-0.5, rel=0.05) and (np.asarray(head["bias"]) == 0).all()
    assert (np.asarray(init_head(jax.random.key(0), 32, 0.0)["kernel"]) == 0).all()
    x = jnp.ones((2, 3, 2048), jnp.bfloat16)
    out = apply_head(head, x)
    assert out.dtype == jnp.float32 and out.shape == (2, 3)
    np.testing.assert_allclose(out, np.full((2, 3), np.asarray(head["kernel"], np.float64).sum()), rtol=1e-4, atol=1e-5)


def test_row_logprobs_are_those_of_the_logits_behind_each_beginning(mesh1, mesh8):
    rng = np.random.default_rng(5)
    rows = [(rng.integers(2, 98, n).tolist(), first) for n, first in ((9, 4), (17, 1), (3, 2), (30, 29), (12, 5))]
    wanted = []
    for ids, first in rows:
        logits = np.asarray(tiny.logits(tiny.net(), tiny.on(mesh1), np.array([ids], np.int32), np.array([len(ids)], np.int32)))
        logp = np.asarray(jax.nn.log_softmax(logits[0]))
        wanted.append(sum(logp[n - 1, ids[n]] for n in range(first, len(ids))))
    for mesh in (mesh1, mesh8):
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(score.row_logprobs(tiny.lm(mesh), rows, 2, mesh), wanted, rtol=2e-5)


def test_row_scores_are_read_at_last_tokens_in_the_order_given(mesh1):
    rng = np.random.default_rng(6)
    rows = [rng.integers(2, 98, n).tolist() for n in (4, 20, 7)]
    lm = tiny.lm(mesh1)
    head = jax.tree.map(lambda x: x + 0.3, init_head(jax.random.key(0), tiny.CFG.width))
    lm = lm._replace(params={"trunk": lm.params, "head": head})
    with jax.set_mesh(mesh1):
        tokens, lengths = pad_rows(rows, 32)
        wanted = np.asarray(score.reward_scores(lm.net(), lm.params, tokens, lengths))
        np.testing.assert_allclose(score.row_scores(lm, rows, 2, mesh1), wanted, rtol=2e-5)
        with pytest.raises(InputError, match="passes the model's context of 128"):
            score.row_scores(lm, [[2] * 129], 2, mesh1)
