"""What several sections of a configuration have in common: models, sampling, optimisers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """A model of its own for one part of the method; its keys are those of `Model`, from which it takes nothing over."""

    path: str = ""  # empty: none of its own
    format: str = "plain"  # chat for an instruct model, whatever model.format is
    system: str = ""


@dataclass(frozen=True)
class Model:
    path: str = "cai_jax/miniworld/base"  # Hugging Face folder, or owner/name@revision: the helpful-only base, also the judge
    format: str = "plain"  # plain: Human/Assistant transcripts; chat: the chat template of the checkpoint's tokenizer
    system: str = ""  # a system prompt
    compute_dtype: str = "auto"  # auto: float32 on CPU, bfloat16 on accelerators; frozen weights are of it too
    trained_dtype: str = "float32"  # of trained weights; bfloat16 rounds each update at random, so that small ones count
    vocab_multiple: int = 1  # rows of the embedding are padded to a multiple of it, so that a mesh divides them
    attention: str = "auto"  # auto: the machine's kernels | cudnn: GPU | splash: TPU | xla, which does what those cannot
    remat: str = "none"  # none | full: recompute each layer in the backward pass, a third more time | dots: keep products
    sequence: str = "whole"  # split: between layers, tokens lie along the mesh's model axis, so that longer texts fit
    layers: str = "scanned"  # scanned: one layer is compiled, for any depth | unrolled: all are, to be faster on some machines


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (2106.09685): the stages train these beside the frozen weights of the model that they start from."""

    rank: int = 0  # 0: none, every weight is trained
    alpha: float = 16.0  # the product of an adapter's two matrices counts alpha / rank times
    targets: str = "attention/[qkvo]|mlp/(gate|up|down)"  # regular expression on our names: which matrices get one
    stages: tuple[str, ...] = ("sft", "reward", "dpo", "ppo")  # which train adapters; the others train every weight


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # nucleus mass; 1: off
    top_k: int = 0  # the likeliest tokens that are left; 0: all
    min_p: float = 0.0  # least probability that is left, as a share of the likeliest token's
    max_tokens: int = 32  # per sampled text, EOS included
    batch_size: int = 128  # rows decoded together
    cache: str = "auto"  # keys and values are kept in the compute dtype | bfloat16 | int8: in half of that, less exactly
    gather: bool = True  # put weights split along fsdp together once; False: at every token, in less memory


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 0
    final_ratio: float = 0.1  # learning rate at the end / peak, reached by a cosine; 1: constant
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global gradient norm
