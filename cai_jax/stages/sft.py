"""Supervised fine-tuning (paper 3.1): the pretrained base on revisions mixed with helpful responses, loss on completions."""

from pathlib import Path

from cai_jax import checkpoints, optim, records
from cai_jax.config import Config
from cai_jax.data import epochs, helped, pack_pairs, revised, whole
from cai_jax.stages import inputs_of, load_constitution, load_start, stream
from cai_jax.train import fit, init_state, language_model_loss, make_train_step
from cai_jax.workdir import begin, finish

STAGE = "sft"


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
    texts = revised(workdir / "critique", c.revisions) + helped(workdir / "critique")
    rows, kept = pack_pairs(whole(texts, drops), start.lm.tok, templates, c.length, drops)
    batch_at, steps = epochs(rows, c.rows, c.epochs, cfg.seed, STAGE)
    tx = optim.make(c.optimizer, steps)
    step = make_train_step(language_model_loss(start.net), tx, mesh, c.microbatches)
    state = init_state(start.trained, tx, mesh)
    state = fit(STAGE, folder, state, start.frozen, step, batch_at, steps, stream(cfg, STAGE), c.checkpoint_every, mesh)
    checkpoints.save_model(folder, state.params)
    counts = drops.counts(len(texts), kept)
    counts |= {"rows": len(rows["tokens"]), "steps": steps, "target_tokens": int(rows["weights"].sum())}
    finish(STAGE, workdir, counts, model=checkpoints.fingerprint(state.params))
    return True
