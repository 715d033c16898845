"""The workloads as data, the same for every contender: sizes, token ids, lengths. NumPy only.

Ids 0 and 1 are padding and end of text; every drawn token is another one, so that contenders that find padding by its id
see none.
"""

import os
import time
from dataclasses import dataclass

import numpy as np
from model import END, Shape

CASES = {  # benchmark -> what is measured, one table each
    "generate": ("generate",),
    "mixed": ("mixed",),
    "critique": ("critique",),
    "options": ("options",),
    "logprobs": ("logprobs",),
    "train": ("sft-equal", "sft-mixed", "reward-equal", "reward-mixed", "dpo-equal", "dpo-mixed"),
    "ppo": ("ppo-equal", "ppo-mixed"),
    "roofline": ("copy", "products", "decode", "sft-equal"),
}


@dataclass(frozen=True)
class Sizes:
    """Tokens, unless it is rows or records."""

    shape: Shape = Shape()
    rows: int = 16  # decoded or scored together
    top_p: float = 0.9
    prompt: int = 64  # of `generate` and `ppo-equal`
    new: int = 64
    records: int = 256  # of `mixed`
    mean: int = 64  # of new tokens, there and of `ppo-mixed`
    cap: int = 256
    prompts: tuple[int, int] = (32, 96)
    critiques: int = 16  # records of `critique`
    prefix: int = 2048
    dialogue: int = 96
    request: int = 24
    turn: int = 64
    comparisons: int = 4  # of `options`
    principles: int = 4
    conversation: int = 192
    response: int = 96
    question: int = 32
    option: int = 2
    long_shape: Shape = Shape(vocab=128_256, layers=2)  # of `logprobs`
    long_rows: int = 4  # scored together,
    long_batches: int = 4  # so often: a short turn would be over before the machine is up to speed
    long: int = 512
    train_rows: int = 8  # of a step; two to a pair
    train_steps: int = 2
    train_length: int = 128
    train_examples: int = 32  # of mixed length
    train_cap: int = 256
    epochs: int = 2  # of `ppo`, one update each

    def shape_of(self, workload: str) -> Shape:
        return self.long_shape if workload == "logprobs" else self.shape


FULL = Sizes()
SMALL = Sizes(
    shape=Shape(vocab=512, width=32, layers=2, heads=2, mlp=64),
    rows=4, prompt=8, new=8, records=12, mean=6, cap=16, prompts=(4, 12),
    critiques=4, prefix=32, dialogue=8, request=4, turn=8,
    comparisons=2, principles=2, conversation=12, response=6, question=4,
    long_shape=Shape(vocab=2048, width=32, layers=1, heads=2, mlp=64), long_rows=2, long_batches=2, long=16,
    train_rows=4, train_steps=2, train_length=16, train_examples=8, train_cap=32,
)  # fmt: skip


def definition(case: str, s: Sizes) -> str:
    """What is measured, as printed with the results."""
    low, high = s.prompts
    contexts = s.comparisons * 2 * s.principles
    one_step = f"{s.train_rows} rows of {s.train_length} tokens a step, {s.train_steps} steps, AdamW"
    mixed = f"lengths log-normal around 90, {s.train_cap // 16} to {s.train_cap}; one pass, AdamW; real tokens count"
    steps = "steps only, no start-up"
    ppo = "at temperature 1, scores by a reward model, a reference and a value network of the policy's size, "
    ppo += f"{s.epochs} epochs of one update of all rows."
    return {
        "generate": f"{s.rows} rows, {s.prompt} prompt tokens and {s.new} new ones each, top_p {s.top_p}, temperature 1.",
        "mixed": f"{s.records} records, prompts of {low} to {high} tokens, new tokens geometric with mean {s.mean}, at most "
        f"{s.cap}, the same for everyone; {s.rows} rows at a time, top_p {s.top_p}, temperature 1. In a static batch a row "
        "that has ended waits for the longest.",
        "critique": f"{s.critiques} records behind {s.prefix:,} shared few-shot tokens: {s.dialogue} tokens of dialogue, a "
        f"critique of {s.turn}, a request of {s.request}, a revision of {s.turn}; top_p {s.top_p}, temperature 1. A prefix "
        "that is computed once is computed within the time. The floor takes 4 rows at a time, for its attention scores.",
        "options": f"{s.comparisons} comparisons: conversation {s.conversation} tokens, two responses of {s.response} in both "
        f"orders, {s.principles} questions of {s.question}, two options of {s.option}: {contexts} contexts, "
        f"{2 * contexts} log-probs; {s.rows} rows at a time.",
        "logprobs": f"{s.long_batches * s.long_rows} rows of {s.long} tokens, {s.long_rows} at a time, log-prob of every token "
        "given those before it. Peak: most resident memory during the run less that after loading the weights.",
        "sft-equal": f"Supervised fine-tuning, {one_step}; {steps}.",
        "reward-equal": f"Reward model on pairs, {one_step}; {steps}.",
        "dpo-equal": f"DPO on pairs, {one_step}; {steps}. Reference log-probs are taken before, unless it says otherwise.",
        "sft-mixed": f"Supervised fine-tuning, {s.train_examples} examples, {mixed}; {steps}.",
        "reward-mixed": f"Reward model, {s.train_examples // 2} pairs, {mixed}; {steps}.",
        "dpo-mixed": f"DPO, {s.train_examples // 2} pairs, {mixed}; {steps}. Reference log-probs are taken before, unless it "
        "says otherwise.",
        "ppo-equal": f"A whole iteration: {s.rows} rollouts of {s.prompt} + {s.new} tokens {ppo}",
        "ppo-mixed": f"A whole iteration: {s.rows} rollouts, prompts of {low} to {high} tokens, responses geometric with mean "
        f"{s.mean}, at most {s.cap}, the same for everyone {ppo} TRL learns from half of the rows at a time, for its memory.",
        "copy": "Copying arrays, one a core, reads and writes counted.",
        "products": "Float32 products of square matrices, the fastest of what is here.",
        "decode": f"One decoding step of {s.rows} rows at about {s.prompt + s.new} tokens of context. Products alone: those "
        "with all its matrices, outputs before inputs, and nothing else.",
    }[case]


def _tokens(s: Shape, name: str, *size: int) -> np.ndarray:
    return np.random.default_rng([7, *name.encode()]).integers(END + 1, s.vocab, size, np.int32)


def generate(s: Sizes) -> np.ndarray:
    """Prompts [rows, prompt] of `generate` and `ppo-equal`."""
    return _tokens(s.shape, "generate", s.rows, s.prompt)


def mixed(s: Sizes) -> tuple[list[np.ndarray], np.ndarray]:
    """-> (prompts, how many new tokens each gets)."""
    rng = np.random.default_rng(11)
    low, high = s.prompts
    prompts = [_tokens(s.shape, f"mixed {i}", n) for i, n in enumerate(rng.integers(low, high + 1, s.records))]
    return prompts, np.minimum(rng.geometric(1 / s.mean, s.records), s.cap).astype(np.int32)


def rollouts(s: Sizes, case: str) -> tuple[list[np.ndarray], np.ndarray]:
    """-> (prompts of `ppo-*`, how many tokens each response has)."""
    if case == "ppo-equal":
        return list(generate(s)), np.full(s.rows, s.new, np.int32)
    prompts, lengths = mixed(s)
    return prompts[: s.rows], lengths[: s.rows]


def critique(s: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (prefix [prefix], dialogues [N, dialogue], requests [N, request])."""
    sizes = {"prefix": (s.prefix,), "dialogue": (s.critiques, s.dialogue), "request": (s.critiques, s.request)}
    return tuple(_tokens(s.shape, name, *size) for name, size in sizes.items())


def options(s: Sizes):
    """-> (conversations [N, .], responses [N, 2, .], questions [principles, .], options [2, .])."""
    return (
        _tokens(s.shape, "conversation", s.comparisons, s.conversation),
        _tokens(s.shape, "response", s.comparisons, 2, s.response),
        _tokens(s.shape, "question", s.principles, s.question),
        _tokens(s.shape, "option", 2, s.option),
    )


def option_contexts(s: Sizes) -> np.ndarray:
    """Whole contexts [N * 2 * principles, T]: comparison, then principle, then order."""
    conversations, responses, questions, _ = options(s)
    return np.stack(
        [
            np.concatenate([talk, question, *pair])
            for talk, two in zip(conversations, responses, strict=True)
            for question in questions
            for pair in (two, two[::-1])
        ]
    )


def option_rows(s: Sizes) -> np.ndarray:
    """Every context with every option behind it, [contexts * 2, T + option]."""
    _, _, _, chosen = options(s)
    return np.stack([np.concatenate([c, o]) for c in option_contexts(s) for o in chosen])


def logprobs(s: Sizes) -> np.ndarray:
    """[batches, rows, T]"""
    return _tokens(s.long_shape, "logprobs", s.long_batches, s.long_rows, s.long)


def _lengths(s: Sizes, case: str, equal: int, mixed: int) -> np.ndarray:
    if case.endswith("-equal"):
        return np.full(equal, s.train_length)
    drawn = np.random.default_rng(13).lognormal(np.log(90 * s.train_cap / FULL.train_cap), 0.6, mixed)
    return np.clip(drawn, s.train_cap // 16, s.train_cap).astype(int)


def examples(s: Sizes, case: str) -> list[list[int]]:
    """Texts of `sft-*`, whose every token is learnt but the first."""
    lengths = _lengths(s, case, s.train_rows * s.train_steps, s.train_examples)
    return [_tokens(s.shape, f"{case} {i}", n - 1).tolist() + [END] for i, n in enumerate(lengths)]


def pairs(s: Sizes, case: str) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of `reward-*` and `dpo-*`; a prompt is half of the row of its chosen response."""
    lengths = _lengths(s, case, s.train_rows * s.train_steps, s.train_examples)
    out = []
    for i, (a, b) in enumerate(lengths.reshape(-1, 2)):
        prompt = _tokens(s.shape, f"{case} {i} prompt", a // 2).tolist()
        a, b = (max(n - len(prompt), 2) for n in (a, b))
        out.append(
            (prompt, *(_tokens(s.shape, f"{case} {i} {side}", n - 1).tolist() + [END] for side, n in (("a", a), ("b", b))))
        )
    return out


def head(s: Sizes) -> np.ndarray:
    """What a reward or value model multiplies its last hidden states with, [width]."""
    return np.random.default_rng(17).normal(0, 0.02, s.shape.width).astype(np.float32)


def text(ids) -> str:
    """For contenders that take text: the tokenizer of the folder reads it as these ids."""
    return " ".join({END: "</s>"}.get(int(i), str(int(i))) for i in ids)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def step_of(generate, s: Sizes) -> dict:
    """Seconds of one decoding step, from generating few tokens and all; `generate(new)` takes no less for a larger `new`."""
    times = [time.perf_counter()]
    for new in (few := s.new // 8, s.new):
        generate(new)
        times.append(time.perf_counter())
    few_seconds, seconds = np.diff(times)
    return {"step": float(seconds - few_seconds) / (s.new - few)}


def decode_matrices(s: Sizes) -> list[tuple[int, int]]:
    """(outputs, inputs) of the matrices that one decoding step multiplies with, in their order."""
    D, F = s.shape.width, s.shape.mlp
    layer = [(D, D)] * 4 + [(F, D)] * 2 + [(D, F)]
    return layer * s.shape.layers + [(s.shape.vocab, D)]


def products_alone(multiply) -> dict:
    """Seconds of `multiply()`, which does all products of one decoding step."""
    start, times = time.perf_counter(), 8
    for _ in range(times):
        multiply()
    return {"step": (time.perf_counter() - start) / times}


def decode_cost(s: Sizes) -> tuple[float, float]:
    """(bytes read, operations) that one decoding step cannot do without: each weight once, and the cache at half of `new`."""
    context = s.rows * (s.prompt + s.new / 2) * s.shape.layers * s.shape.width
    return 4 * (s.shape.weights + 2 * context), 2 * s.rows * s.shape.weights + 4 * context


def step_cost(s: Sizes) -> float:
    """Operations of one supervised step: products with weights forward and twice backward, and causal attention."""
    tokens = s.train_rows * s.train_length
    return 3 * tokens * (2 * s.shape.weights + 2 * s.shape.layers * s.shape.width * s.train_length)
