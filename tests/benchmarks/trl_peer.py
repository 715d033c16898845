"""TRL on PyTorch: its trainers as they are, but for what would slow them on a CPU with memory to spare: no gradient
checkpointing, no mixed precision, no logging, no checkpoints.

PPO left TRL with version 1.13, so that workload runs on 1.12, which setup.sh puts beside the environment.
"""

import sys
from functools import partial
from pathlib import Path

if any(argument.startswith("ppo") for argument in sys.argv):
    sys.path.insert(0, str(Path(sys.prefix).parent / "trl-ppo"))

import numpy as np
import torch
import work
from datasets import Dataset
from model import END
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessor,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from worker import Job, main

FOREVER = 10**6  # steps; the driver ends the process


def arguments(job: Job, rows: int) -> dict:
    """What every trainer's config is told."""
    return {
        "output_dir": str(job.folder / "trl"),
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-9,  # no weight moves, so that everybody's losses stay comparable
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def language_model(job: Job):
    torch.set_num_threads(work.cores())
    return AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)


def scored_model(job: Job):
    """With the head that everybody's reward and value models start from."""
    torch.set_num_threads(work.cores())
    model = AutoModelForSequenceClassification.from_pretrained(job.folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    model.score.weight.data = torch.from_numpy(work.head(job.sizes))[None]
    return model


class Passes(TrainerCallback):
    """A run is `steps` steps. It ends when its last step has, so that fetching a batch belongs to the step that it is for."""

    def __init__(self, turns, steps: int, tokens: int):
        self.turns, self.steps, self.tokens, self.losses = turns, steps, tokens, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            (losses, counts), self.losses = zip(*self.losses, strict=True) if self.losses else ((), ()), []
            check = {"check": float(np.average(losses, weights=counts))} if losses else {}
            self.turns.turn(tokens=self.tokens, steps=self.steps, **check)


def train(trainer_class, job: Job, turns, config, model, data: Dataset, tokens: int, size: int, **options):
    """trainer_class's own loop, forever."""

    class Trainer(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            count = (inputs["labels"][:, 1:] >= 0).sum().item() if "labels" in inputs else 1  # of tokens, or of equal steps
            loss = super().training_step(model, inputs, *args, **kwargs)
            passes.losses.append((loss.item(), count))
            return loss

    trainer = Trainer(
        model=model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(job.folder), **options
    )
    passes = Passes(turns, -(-len(trainer.train_dataset) // size), tokens)
    trainer.add_callback(passes)
    trainer.train()


def sft(job: Job, turns, packing: bool = False):
    s, equal, texts = job.sizes, job.case.endswith("equal"), work.examples(job.sizes, job.case)
    size = s.train_rows * s.train_length // s.train_cap if packing else s.train_rows
    length = s.train_length if equal else s.train_cap
    config = SFTConfig(max_steps=FOREVER, max_length=length, packing=packing, **arguments(job, size))
    data = Dataset.from_dict({"input_ids": texts})
    train(SFTTrainer, job, turns, config, language_model(job), data, sum(map(len, texts)), size)


def reward(job: Job, turns):
    s, pairs = job.sizes, work.pairs(job.sizes, job.case)
    data = Dataset.from_dict({"chosen_ids": [p + a for p, a, _ in pairs], "rejected_ids": [p + b for p, _, b in pairs]})
    config = RewardConfig(max_steps=FOREVER, max_length=None, **arguments(job, s.train_rows // 2))
    train(RewardTrainer, job, turns, config, scored_model(job), data, tokens_of(pairs), s.train_rows // 2)


def dpo(job: Job, turns, ahead: bool = True):
    """`ahead`: reference log-probs before training; else, its default, in every step."""
    s, pairs = job.sizes, work.pairs(job.sizes, job.case)
    columns = zip(*([work.text(p)] + [" " + work.text(x) for x in two] for p, *two in pairs), strict=True)
    data = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), map(list, columns), strict=True)))
    common = arguments(job, s.train_rows // 2)
    config = DPOConfig(max_steps=FOREVER, max_length=None, precompute_ref_log_probs=ahead, beta=0.1, **common)
    train(DPOTrainer, job, turns, config, language_model(job), data, tokens_of(pairs), s.train_rows // 2)


def tokens_of(pairs) -> int:
    return sum(2 * len(p) + len(a) + len(b) for p, a, b in pairs)


class Ends(LogitsProcessor):
    """Row i ends after its lengths[i] tokens behind a prompt of `width`, and not before."""

    def __init__(self, lengths: np.ndarray, width: int):
        self.last = torch.from_numpy(lengths) + width - 1

    def __call__(self, ids, scores):
        last = (ids.shape[1] >= self.last)[:, None]
        end = torch.arange(scores.shape[1]) == END
        return scores.masked_fill(last != end, -torch.inf)


def ppo(job: Job, turns):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    s = job.sizes
    prompts, lengths = work.rollouts(s, job.case)
    policy = language_model(job)
    generate, ends = policy.generate, Ends(lengths, max(map(len, prompts)))
    policy.generate = lambda *args, **options: generate(*args, logits_processor=[ends], **options)
    parts = 2 if job.case == "ppo-mixed" else 1  # all rows padded at once take 20 GB
    config = PPOConfig(
        total_episodes=FOREVER,
        num_ppo_epochs=s.epochs,
        num_mini_batches=1,
        gradient_accumulation_steps=parts,
        local_rollout_forward_batch_size=s.rows,
        response_length=int(lengths.max()),
        stop_token="eos",
        temperature=1.0,
        num_sample_generations=0,
        **arguments(job, s.rows // parts),
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(job.folder, padding_side="left"),
        model=policy,
        ref_model=language_model(job),
        reward_model=scored_model(job),
        value_model=scored_model(job),
        train_dataset=Dataset.from_dict({"input_ids": [row.tolist() for row in prompts]}),
        callbacks=[Passes(turns, 1, int(lengths.sum()))],
    )
    trainer.train()


WORKLOADS = {"ppo-equal": ppo, "ppo-mixed": ppo, "sft-mixed:packing": partial(sft, packing=True)}
for data in ("equal", "mixed"):
    WORKLOADS |= {f"sft-{data}": sft, f"reward-{data}": reward, f"dpo-{data}": dpo}
    WORKLOADS[f"dpo-{data}:default"] = partial(dpo, ahead=False)

if __name__ == "__main__":
    main(WORKLOADS, "torch", "transformers", "trl")
