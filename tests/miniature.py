"""Random checkpoints of a family with a tokenizer, as a folder of the hub would hold them, small enough to run in a moment."""

import json
from functools import cache
from pathlib import Path

import torch
from test_formats import CONTROL, TEMPLATES, trained
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096}
ENDS = 80  # tokens that end a text, by generation_config.json: random weights would hardly ever choose the one true end


@cache
def tokenizer(style: str) -> PreTrainedTokenizerFast:
    """One that has learnt the words of the constitutions, so that they are not too many tokens."""
    texts = [p.read_text() for p in sorted((ROOT / "constitutions").glob("*.toml"))]
    fast = trained(style, [line for text in texts for line in text.split("\n")], 1200)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=CONTROL[3:]
    )


def write(path: Path, kind: str, style: str, template: str = "", seed: int = 0, wrap=None, **fields) -> str:
    """A folder with random weights. `wrap(config)` -> (model, config) for what is more than a language model."""
    hf = tokenizer(style)
    hf.chat_template = TEMPLATES.get(template)
    hf.save_pretrained(path)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(hf)}
    config = AutoConfig.for_model(kind, **SIZES | ends | fields)
    torch.manual_seed(seed)
    model = wrap(config) if wrap else AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    stop = {"eos_token_id": [2, *range(len(hf) - ENDS, len(hf))], "bos_token_id": 1, "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(stop))
    return str(path)
