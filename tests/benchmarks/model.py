"""The model of the benchmarks as a Hugging Face folder that every contender loads. NumPy and safetensors only.

Its weights are random: speed does not depend on them, and nothing has to be fetched.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PAD, END = 0, 1
THETA = 1e6  # of rotary positions: tunix's Llama has this one, whatever its config says


@dataclass(frozen=True)
class Shape:
    """A Llama: untied embeddings, as many key-value heads as heads, float32."""

    vocab: int = 32_000
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 2048

    @property
    def weights(self) -> int:
        """Those that every token is multiplied with: all but the embedding and the norms."""
        return self.vocab * self.width + self.layers * (4 * self.width**2 + 3 * self.width * self.mlp)

    def __str__(self) -> str:
        size = (self.weights + self.vocab * self.width) / 1e6
        return (
            f"Llama of {size:.0f} M weights, float32: vocabulary {self.vocab:,}, width {self.width}, {self.layers} layers, "
            f"{self.heads} heads, gated MLP {self.mlp:,}, untied, random weights"
        )


def write(folder: Path, s: Shape) -> None:
    """A Hugging Face folder: config, weights, and a tokenizer whose words are the numbers of its tokens."""
    done = folder / "done"
    if done.is_file() and done.read_text() == repr((s, THETA)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    ones = np.ones(s.width, np.float32)
    tensors = {"model.embed_tokens.weight": draw(s.vocab, s.width), "lm_head.weight": draw(s.vocab, s.width)}
    tensors["model.norm.weight"] = ones
    for i in range(s.layers):
        at = f"model.layers.{i}."
        tensors |= {f"{at}self_attn.{x}_proj.weight": draw(s.width, s.width) for x in "qkvo"}
        tensors |= {f"{at}mlp.{x}_proj.weight": draw(s.mlp, s.width) for x in ("gate", "up")}
        tensors[f"{at}mlp.down_proj.weight"] = draw(s.width, s.mlp)
        tensors |= {f"{at}{x}_layernorm.weight": ones for x in ("input", "post_attention")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in {"config": _config(s), "tokenizer": _tokenizer(s), "tokenizer_config": _SPECIAL}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    done.write_text(repr((s, THETA)))


def _config(s: Shape) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "intermediate_size": s.mlp,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads,
        "head_dim": s.width // s.heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,  # no text ends by itself
        "pad_token_id": PAD,
    }


_SPECIAL = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}


def _tokenizer(s: Shape) -> dict:
    words = {"<pad>": PAD, "</s>": END} | {str(i): i for i in range(END + 1, s.vocab)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": words[t], "content": t} | flags for t in ("<pad>", "</s>")],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<pad>"},
    }
