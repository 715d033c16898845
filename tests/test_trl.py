"""Our losses, their gradients and what they are computed from, against TRL's own code on the same logits, to 1e-5.

Both sides run whole: `preference_loss`, `reward_loss`, `experience` and `ppo_loss` as the stages call them, and the methods of
TRL's trainers, `PPOTrainer.train` included. Only the networks are left out: in their place each side gets one and the same
array, ours as the hidden states of packed texts, under an unembedding that is the identity, TRL's gathered from it as logits of
rows. So gradients by that array can be compared place by place.
"""

import importlib
import sys
import warnings
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from cai_jax import config, experience, losses, pairs, score
from cai_jax.slots import Sampled
from cai_jax.stages import dpo, reward
from cai_jax.train import Parts

V, R, PROMPT = 11, 6, 3  # tokens; of a response, of a prompt at most
PAD, END = 0, 1
NET = tiny.net(replace(tiny.UNTIED, vocab_size=V, width=V))
HEAD = {"kernel": np.ones((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
TO = experience.Layout(rows=4, length=32, held=2)  # one part
TEMPERATURE, CLIP, KL = 0.7, 0.2, 0.3
C = config.PPO(sampling=config.Sampling(max_tokens=R, temperature=TEMPERATURE), clip=CLIP, missing_eos_penalty=0.0, group=4)


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """What stands for the network's weights is what it would give."""
    for module in (dpo, score, experience):
        monkeypatch.setattr(module, "hidden_states", lambda net, params, *_: params["hidden"])


def policy(logits):
    return {"hidden": logits, "unembed": {"kernel": np.eye(V, dtype=np.float32)}}


def scalar(values):
    return {"trunk": {"hidden": values[..., None]}, "head": HEAD}


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def leaf(x):
    return torch.tensor(x, requires_grad=True)


def same(ours, theirs):
    """To 1e-5 of the largest value; a loss, in which larger ones cancel, also to 1e-6."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    if np.ndim(theirs) == 0:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5, abs=1e-6)
    else:
        tiny.assert_close(np.asarray(ours), theirs, rtol=1e-5)


class Logits(torch.nn.Module):
    """A model of TRL's: of responses whose tokens are predicted at places [B, R] of flat packed logits, behind a prompt."""

    is_gradient_checkpointing = False

    def __init__(self, packed, place_BR):
        super().__init__()
        self.packed, self.place_BR = packed, torch.tensor(place_BR).long()

    def forward(self, **_):
        said = self.packed.reshape(-1, V)[self.place_BR]
        return SimpleNamespace(logits=torch.nn.functional.pad(said, (0, 0, PROMPT - 1, 1)))


def trl(name="trl"):
    """A module of TRL's, imported when a test wants it: that takes seconds, and every worker collects every test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        return importlib.import_module(name)


def trainer(kind, **attributes):
    """One of TRL's without its __init__, which loads models and data: with what the method under test reads."""

    def own(x, **_):
        return x

    alone = SimpleNamespace(device="cpu", gather=own, gather_for_metrics=own, reduce=own, process_index=0, is_main_process=True)
    usual = {"accelerator": alone, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}
    out = object.__new__(kind)
    vars(out).update(usual | {"aux_loss_enabled": False} | attributes)
    return out


# Comparisons


def comparisons(labels):
    """-> (our batch, one place of it filled up; places [2 N, R] of the responses' tokens, the preferred ones first, with these
    tokens and their mask; places [2 N] of their last tokens)."""
    rng, trees, starts = np.random.default_rng(len(labels)), [], []
    for _ in labels:
        starts.append(int(rng.integers(1, PROMPT + 1)))
        trees.append(pairs.fork(*(rng.integers(2, V, n).tolist() for n in (starts[-1], *rng.integers(1, R + 1, 2)))))
    N, column = len(labels), np.asarray(labels, np.float32)
    all_of = pairs.Pairs(trees, np.array(starts, np.int32), {"p_a": column}, np.arange(N), np.ones(N, bool))
    batch = pairs.batches(all_of, N + 1, 1, 0, "s", 1)[0](0)
    T = batch["tokens"].shape[1]
    places, tokens, mask, last = (np.zeros((2 * N, *s), np.int64) for s in ((R,), (R,), (R,), ()))
    for row, m in np.argwhere(batch["row_mask"] > 0):
        n = batch["index"][row, m]
        for side in (0, 1):
            at = n if (side == 0) == (labels[n] > 0.5) else N + n
            mine = batch["owner"][row] == 2 * m + side
            places[at, : mine.sum()], tokens[at, : mine.sum()] = row * T + batch["at"][row, mine], batch["next"][row, mine]
            mask[at, : mine.sum()], last[at] = 1, row * T + batch["last"][row, m, side]
    return batch, (places, tokens, mask), last


# TRL has no soft labels for IPO. It has them for DPO in "aot", which sorts comparisons: of one alone, the loss is ours.
@pytest.mark.parametrize(
    "kind, theirs, beta, labels",
    [
        ("sigmoid", "sigmoid", 0.1, [1.0, 0.0, 0.0, 1.0, 1.0]),
        ("ipo", "ipo", 0.4, [0.0, 1.0, 1.0, 0.0, 1.0]),
        ("sigmoid", "aot", 0.3, [0.73]),
        ("sigmoid", "aot", 0.3, [0.4]),
    ],
)
def test_dpo_and_ipo(kind, theirs, beta, labels):
    batch, (places, tokens, mask), _ = comparisons(labels)
    now, before = normal(1, *batch["tokens"].shape, V), normal(2, *batch["tokens"].shape, V)
    reference = jax.jit(lambda x: dpo.response_logprobs(NET, policy(x), batch))(before)
    batch |= {"reference_a": reference[..., 0], "reference_b": reference[..., 1]}
    loss = dpo.preference_loss(NET, beta, kind)
    ours, slope = jax.jit(jax.value_and_grad(lambda x: loss(policy(x), batch, None)[0]))(now)

    given = leaf(now)
    model = Logits(given, places)
    least = 1 - max(labels[0], 1 - labels[0])
    how = {"loss_types": [theirs], "loss_weights": [1.0], "beta": beta, "label_smoothing": least, "use_weighting": False}
    how |= {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_liger_kernel": False, "precompute_ref_logps": False}
    args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    other = trainer(trl().DPOTrainer, model=model, ref_model=Logits(torch.tensor(before), places), args=args, **how)
    ahead = ((0, 0), (PROMPT, 0))
    inputs = {"input_ids": np.pad(tokens, ahead), "completion_mask": np.pad(mask, ahead)}
    inputs["attention_mask"] = np.pad(mask, ahead, constant_values=1)
    found = other.compute_loss(model, {k: torch.tensor(v) for k, v in inputs.items()})
    found.backward()
    same(ours, found)
    same(slope, given.grad)
    assert np.abs(slope).max() > 1e-3


def test_the_reward_model():
    """Certain labels: TRL has no soft ones, its margins are something else."""
    batch, _, last = comparisons([1.0, 0.0, 0.0, 1.0, 1.0])
    values, loss = normal(3, *batch["tokens"].shape), reward.reward_loss(NET)
    ours, slope = jax.jit(jax.value_and_grad(lambda x: loss(scalar(x), batch, None)[0]))(values)

    given = leaf(values)
    args, model = SimpleNamespace(center_rewards_coefficient=None), SimpleNamespace(training=True)
    scored = SimpleNamespace(logits=given.reshape(-1, 1)[torch.tensor(last)])
    other = trainer(trl().RewardTrainer, model=model, args=args)
    found = other.compute_loss(lambda **_: scored, {"attention_mask": torch.ones(len(last), 1)})
    found.backward()
    same(ours, found)
    same(slope, given.grad)
    assert np.count_nonzero(slope) == len(last)


# Rollouts


class World:
    """Eight responses to two prompts, in one part: what they were sampled, scored and valued by, and a policy some steps on."""

    def __init__(self, whole: bool):
        rng = np.random.default_rng(5)
        lengths = np.full(8, R) if whole else np.array([6, 1, 4, 2, 6, 3, 5, 2])
        self.mask = np.arange(R)[None] < lengths[:, None]
        self.tokens = np.where(self.mask, rng.integers(2, V, (8, R)), PAD)
        self.finished = np.array([True, False, True, True] * 2)
        self.tokens[self.finished, lengths[self.finished] - 1] = END
        asked = [rng.integers(2, V, n) for n in (PROMPT, 1) for _ in range(4)]
        rows = [np.concatenate([q, said[:n]]) for q, said, n in zip(asked, self.tokens, lengths, strict=True)]
        self.asked, start = asked, np.array([len(q) for q in asked])
        (arrays, count), self.at = experience.packed(rows, start, range(8), TO, R)
        assert arrays["tokens"].shape[1] == count == 1
        self.texts, shape = Parts(arrays, jnp.int32(1)), (TO.rows, TO.length)
        self.before, self.reference = normal(6, *shape, V), normal(7, *shape, V)
        self.now = self.before + normal(8, *shape, V, scale=0.3)
        self.scores, self.values, self.later = normal(9, *shape), normal(10, *shape), normal(11, *shape)
        self.score_B, self.lengths = self.scores.reshape(-1)[self.at["last"]], lengths

    def rollout(self, c, kl_coef, **of_policy):
        weights = of_policy | {"policy": policy(self.before)}, policy(self.reference), scalar(self.scores)
        sampled = Sampled(np.int32(self.tokens), np.int32(self.lengths), self.finished, np.zeros((8, R), np.float32))
        given = {"mean": 0.0, "std": 1.0}, jnp.float32(kl_coef), np.ones(8, np.float32), sampled
        return experience.experience((NET,) * 3, c, weights, *given, self.texts, self.at)[0]

    def learn(self, c, rollout, given):
        """-> (loss, metrics), gradients by the arrays of `given`: "policy", and "value" if there is one."""
        part = experience.minibatch(rollout, self.texts).part(0)
        kinds = {"policy": policy, "value": scalar}

        def loss(given):
            return experience.ppo_loss(NET, c)({name: kinds[name](x) for name, x in given.items()}, part, None)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(given)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_rloo_and_grpo(name):
    """Advantages, and the clipped loss of a policy some steps on. RLOO has its KL in the reward on both sides. TRL's GRPO has
    it in the loss, by k3, ours in the reward: it is left out. Ours is a mean over tokens, TRL's "bnpo"."""
    w, kl_coef = World(whole=False), KL if name == "rloo" else 0.0
    c = replace(C, advantage=name)
    rollout = w.rollout(c, kl_coef)
    (ours, metrics), slope = w.learn(c, rollout, {"policy": w.now})
    assert 0.1 < metrics["clip_fraction"] < 0.9

    said = [list(map(int, row[:n])) for row, n in zip(w.tokens, w.lengths, strict=True)]
    generated = [list(map(int, q)) for q in w.asked], said, ["text"] * 8
    if name == "grpo":
        generated = *generated[:2], None, generated[2], None, {}, None, None
    before, after = (Logits(x, w.at["place"]) for x in (torch.tensor(w.before), leaf(w.now)))
    args = {"per_device_train_batch_size": 8, "gradient_checkpointing_kwargs": None, "delta": None}
    args |= {"gradient_accumulation_steps": 1, "steps_per_generation": 2}
    how = dict.fromkeys(("pad_to_multiple_of", "reward_clip_range", "environment_factories", "environments", "tools"))
    how |= dict.fromkeys(("mask_truncated_completions", "normalize_advantages", "use_vllm", "_entropy_bonus_enabled"), False)
    how |= {"num_generations": 4, "num_iterations": 1, "temperature": TEMPERATURE, "epsilon_low": CLIP, "epsilon_high": CLIP}
    how |= {"loss_type": "bnpo", "importance_sampling_level": "token", "current_gradient_accumulation_steps": 1}
    how |= {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "model_kwarg_keys": set()}
    how |= {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group", "reward_weights": torch.ones(1)}
    how |= {"reward_func_names": ["score"], "_pending_extra_logs": {}, "_pending_metrics": {}, "_logs": defaultdict(list)}
    how["_logs"]["rewards"] = defaultdict(list)
    how |= {"_tokenizer": SimpleNamespace(pad_token_id=PAD, eos_token_id=END), "beta": kl_coef, "args": SimpleNamespace(**args)}
    how |= {"processing_class": SimpleNamespace(batch_decode=lambda ids, **_: ["text"] * len(ids))}
    how |= {"_generate": lambda prompts: generated, "_calculate_rewards": lambda *_: torch.tensor(w.score_B)[:, None]}
    kind = {"rloo": trl().RLOOTrainer, "grpo": trl().GRPOTrainer}[name]
    other = trainer(kind, model=before, ref_model=Logits(torch.tensor(w.reference), w.at["place"]), **how)
    inputs = other._generate_and_score_completions([{"prompt": "text"}] * 8)
    same(rollout["advantages"], inputs["advantages"].numpy()[:, None] * w.mask)
    found = other._compute_loss(after, inputs)
    found.backward()
    same(ours, found)
    same(slope["policy"], after.packed.grad)


class Reached(Exception):
    pass


def ppo(w, monkeypatch, given, **settings):
    """PPOTrainer.train to its first backward(loss). given: logits and values of a policy some steps on. -> its variables."""
    module, seen, places = trl("trl.experimental.ppo.ppo_trainer"), {}, w.at["place"]

    def backward(loss):
        seen.update(sys._getframe(1).f_locals)
        raise Reached

    def rows(values):
        return torch.nn.functional.pad(values.reshape(-1)[torch.tensor(places).long()], (PROMPT - 1, 1))[..., None]

    def forward(model, *_):
        if model == "reference":
            return Logits(torch.tensor(w.reference), places)()
        return Logits(given[0], places)(), rows(given[1])

    def rewarded(model, *_):
        return (rows(torch.tensor(w.values)), None, None) if model == "values" else (None, torch.tensor(w.score_B), None)

    model = SimpleNamespace(train=lambda: None, policy="policy", value_model="values")
    queries, said = torch.full((8, PROMPT), 2), torch.tensor(w.tokens)
    sampled = Logits(torch.tensor(w.before), places)().logits[:, PROMPT - 1 : -1] / TEMPERATURE
    stand_ins = {"unwrap_model_for_generation": lambda *_, **__: nullcontext(model), "forward": forward, "get_reward": rewarded}
    stand_ins["batch_generation"] = lambda *_: (torch.cat([queries, said], 1), sampled)
    for name, f in stand_ins.items():
        monkeypatch.setattr(module, name, f)
    monkeypatch.setattr(np.random, "permutation", np.arange)  # of responses in minibatches, of which there is one
    args = dict.fromkeys(("num_ppo_epochs", "num_mini_batches", "gradient_accumulation_steps", "num_total_batches"), 1)
    args |= dict.fromkeys(("local_batch_size", "local_mini_batch_size", "per_device_train_batch_size", "batch_size"), 8)
    args |= dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "ds3_gather_for_generation"))
    args |= {"local_rollout_forward_batch_size": 8, "total_episodes": 8, "response_length": R, "temperature": TEMPERATURE}
    args |= {"missing_eos_penalty": C.missing_eos_penalty, "kl_estimator": "k1", "kl_coef": KL, "whiten_rewards": False}
    args |= {"gamma": C.discount, "lam": C.gae_lambda, "cliprange": CLIP, "cliprange_value": C.value_clip}
    args |= {"vf_coef": C.value_coef} | settings
    tools = {"print": lambda *_: None, "accumulate": lambda _: nullcontext(), "unwrap_model": lambda m: m, "backward": backward}
    how = {"reward_model": "scores", "ref_model": "reference", "optimizer": None, "dataloader": [{"input_ids": queries}]}
    how |= {"processing_class": SimpleNamespace(pad_token_id=PAD, eos_token_id=END), "stop_token_id": None}
    how |= {"state": SimpleNamespace(), "control": None, "callback_handler": SimpleNamespace(on_train_begin=lambda *_: None)}
    how |= {"is_deepspeed_enabled": False, "train_dataset_len": 8, "accelerator": SimpleNamespace(device="cpu", **tools)}
    with pytest.raises(Reached):
        trainer(module.PPOTrainer, model=model, args=SimpleNamespace(**args), **how).train()
    return seen


def unbiased(mask):
    """TRL whitens by the unbiased variance, we by the biased one, as the original did."""
    return np.float32(1 - 1 / np.sum(mask)) ** 0.5


def test_ppo(monkeypatch):
    """Rewards, values, advantages, returns and both losses, of responses as long as they may be: behind shorter ones TRL puts
    one more token, where the score is paid."""
    w, c = World(whole=True), replace(C, missing_eos_penalty=1.5, group=1)
    now = {"policy": w.now, "value": w.later}
    rollout = w.rollout(c, KL, value=scalar(w.values))
    rollout["advantages"] *= unbiased(w.mask)
    (ours, metrics), slope = w.learn(c, rollout, now)
    assert 0.1 < metrics["clip_fraction"] < 0.9 and np.ptp(w.score_B) > 1 and not w.finished.all()

    given = leaf(w.now), leaf(w.later)
    found = ppo(w, monkeypatch, given, missing_eos_penalty=1.5)
    for name, theirs in (("old_logp", "logprobs"), ("old_values", "values"), ("advantages",) * 2, ("returns",) * 2):
        same(rollout[name], found[theirs])
    same(ours, found["loss"])
    same(metrics["policy_loss"], found["pg_loss"])
    same(metrics["value_loss"], found["vf_loss"])
    found["loss"].backward()
    same(slope["policy"], given[0].grad)
    same(slope["value"], given[1].grad)


@pytest.mark.parametrize("kl, estimate", [("k1", losses.kl_k1), ("k3", losses.kl_k3)])
def test_the_equations_of_ppo_under_the_masks_of_trl(monkeypatch, kl, estimate):
    """Of responses of many lengths, each of our equations on what TRL gives its own."""
    w = World(whole=False)
    found = ppo(w, monkeypatch, (leaf(w.now), leaf(w.later)), kl_estimator=kl, gamma=0.97)
    x = {k: v.detach().numpy() for k, v in found.items() if isinstance(v, torch.Tensor)}
    said, paid = ((~x[name]).astype(np.float32) for name in ("padding_mask", "padding_mask_p1"))
    assert (said == w.mask).all() and paid.sum() == said.sum() + 6
    same(estimate(x["logprobs"], x["ref_logprobs"]), x["kl"])
    advantages, returns = losses.gae(x["rewards"], x["values"], paid, 0.97, C.gae_lambda)
    same(returns, x["returns"])
    same(losses.whiten(advantages, said) * unbiased(said), x["advantages"])
    of_policy = x["logprobs"], x["advantages"], said, CLIP
    of_values = x["values"], x["returns"], paid, C.value_clip
    for loss, at, rest, theirs in (
        (lambda *a: losses.ppo_policy_loss(*a)[0], "new_logprobs", of_policy, "pg_loss"),
        (losses.ppo_value_loss, "vpred", of_values, "vf_loss"),
    ):
        ours, slope = jax.value_and_grad(loss)(x[at], *rest)
        same(ours, found[theirs])
        same(slope, torch.autograd.grad(found[theirs], found[at], retain_graph=True)[0])
