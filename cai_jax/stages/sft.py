"""Supervised fine-tuning (paper 3.1): the pretrained base on revisions mixed with helpful responses, loss on completions."""

from pathlib import Path

from cai_jax import checkpoints, optim, prompts, records
from cai_jax.config import Config
from cai_jax.data import epochs, pack
from cai_jax.stages import inputs_of, load_constitution, load_start, stream
from cai_jax.train import fit, init_state, language_model_loss, make_train_step
from cai_jax.workdir import begin, finish

STAGE = "sft"


def targets(cfg: Config, workdir: Path, drops: records.Drops) -> tuple[int, list[tuple[list[dict], str]]]:
    """How many texts there were, and (messages, completion) pairs of those that are whole: a text that was cut off or is empty
    teaches nothing good and is counted out."""
    given, out = 0, []

    def add(messages, text: str, finished: bool, what: str) -> None:
        nonlocal given
        given += 1
        if drops.keep(finished, f"{what} cut off") and drops.keep(bool(text), f"{what} empty"):
            out.append((messages, text))

    for r in records.read(workdir / "critique" / "revisions.jsonl", ("messages", "response", "rounds")):
        rounds = r["rounds"] if cfg.sft.revisions == "all" else r["rounds"][-1:]
        for revised in rounds:
            add(r["messages"], revised["revision"], revised["finished"], "revision")
        if not r["rounds"]:
            add(r["messages"], r["response"], r["finished"], "response")
    for r in records.read(workdir / "critique" / "helpful.jsonl", ("messages", "response")):
        add(r["messages"], r["response"], r["finished"], "helpful response")
    return given, out


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes sft/checkpoints (training state), sft/model (parameters) and sft/metrics.jsonl."""
    folder, c = workdir / STAGE, cfg.sft
    if not begin(STAGE, workdir, inputs_of(cfg, workdir, STAGE, after=("critique",), models=("sl_cai",))):
        return False
    start, templates, drops = (
        load_start(cfg, workdir, mesh, "sl_cai"),
        load_constitution(cfg, "sl_cai").templates,
        records.Drops(),
    )
    given, pairs = targets(cfg, workdir, drops)
    examples, tok = [], start.lm.tok
    for messages, text in pairs:
        prompt = tok.prompt(prompts.dialogue(messages, templates))
        examples.append((prompt + tok.encode(prompts.completion(text, templates)) + [tok.eos_id], len(prompt)))
    rows = pack(examples, c.length, drops)
    kept = int(((rows["positions"] == 0) & (rows["ends"] > 0)).sum())
    batch_at, steps = epochs(rows, c.rows, c.epochs, cfg.seed, STAGE)
    tx = optim.make(c.optimizer, steps)
    step = make_train_step(language_model_loss(start.net), tx, mesh, c.microbatches)
    state = init_state(start.trained, tx, mesh)
    state = fit(STAGE, folder, state, start.frozen, step, batch_at, steps, stream(cfg, STAGE), c.checkpoint_every, mesh)
    checkpoints.save_model(folder, state.params)
    counts = drops.counts(given, kept)
    counts |= {"rows": len(rows["tokens"]), "steps": steps, "target_tokens": int(rows["weights"].sum())}
    finish(STAGE, workdir, counts, model=checkpoints.fingerprint(state.params))
    return True
