"""Every config for real models in miniature: the same file, every stage, eight devices, random weights of the same family."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import pytest
from test_run import cai, read

STAGES = ("critique", "sft", "preferences", "reward", "dpo", "ppo", "evaluate", "report")
SMALL = (
    f"--config.stages={STAGES}",
    "--config.mesh=(2,2,2)",
    "--config.model.vocab_multiple=16",
    "--config.critique.sampling.batch_size=16",
    "--config.preferences.sampling.batch_size=16",
    "--config.preferences.score_batch=16",
    "--config.evaluate.sampling.batch_size=8",
    "--config.evaluate.sampling.max_tokens=8",
    "--config.evaluate.limit=8",
    "--config.critique.rounds=1",
    "--config.sft.rows=16",
    "--config.sft.length=256",
    "--config.reward.batch_size=16",
    "--config.dpo.batch_size=16",
    "--config.ppo.batch_size=16",
    "--config.ppo.minibatches=2",
    "--config.ppo.iterations=2",
    *(f"--config.{s}.sampling.max_tokens=24" for s in ("critique", "preferences", "ppo")),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """-> overrides that name local files in the formats of hh-rlhf."""
    folder = tmp_path_factory.mktemp("data")
    tried = [{"transcript": f"\n\nHuman: How do I break lock {i}?\n\nAssistant: No.\n\nHuman: Why?"} for i in range(24)]
    (folder / "red.jsonl.gz").write_bytes(gzip.compress(json.dumps(tried).encode()))
    asked = [f"\n\nHuman: What is {i} and {i}?\n\nAssistant:" for i in range(24)]
    pairs = "".join(json.dumps({"chosen": q + f" It is {i}.", "rejected": q + " No."}) + "\n" for i, q in enumerate(asked))
    (folder / "helpful.jsonl.gz").write_bytes(gzip.compress(pairs.encode()))
    files = {"redteam": "red", "helpful": "helpful", "comparisons": "helpful"}
    return [f"--config.data.{name}={folder / file}.jsonl.gz" for name, file in files.items()]


def multimodal(config):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=config.to_dict(), vision_config=vision | {"patch_size": 14}))


# Config -> (key of a checkpoint -> how it is made, further overrides).
CHAT, PLAIN = ("llama", "tiktoken", "headers"), ("llama", "tiktoken")
MINIATURES = {
    "qwen3_0_6b": ({"model": ("qwen3", "byte_level", "chatml")}, ["--config.model.layers=unrolled"]),
    "llama3_8b": ({"model": PLAIN, "preferences.judge": CHAT}, ["--config.ppo.value_network=shared"]),
    "gemma3_4b": ({"model": ("gemma3_text", "sentencepiece", "model")}, ["--config.ppo.minibatches=4"]),
    "bai2022": ({"model": CHAT, **dict.fromkeys(("sft.model", "preferences.judge", "reward.model"), PLAIN)}, []),
    "mathewjohn2026": ({"model": CHAT}, ["--config.model.trained_dtype=bfloat16", "--config.model.remat=dots"]),
}


def test_every_config_for_real_models_has_a_miniature():
    embedded = {"miniworld", "miniworld_pretrain"}
    assert {p.stem for p in (checkpoints.ROOT / "configs").glob("*.py")} == set(MINIATURES) | embedded


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """-> a future of (the finished command, its workdir) for every miniature: two at a time, compiling leaves a core idle."""

    def overrides(name, folder):
        made, more = MINIATURES[name]
        paths = {}
        for key, (kind, *how) in made.items():
            path = folder / "-".join([kind, *how])
            if not path.exists():
                wrap = multimodal if kind == "gemma3_text" else None
                checkpoints.write(path, kind, *how, seed=len(paths), wrap=wrap)
            paths[key] = f"--config.{key}.path={path}"
        return [f"--config=configs/{name}.py", f"--workdir={folder / 'run'}", *SMALL, *data, *paths.values(), *more]

    def run(folder, command):
        quick = "--xla_backend_optimization_level=0"  # compiling is most of it
        return cai(*command, devices=8, flags=quick, timeout=1200), folder / "run"

    folders = {name: tmp_path_factory.mktemp(name) for name in MINIATURES}
    commands = {name: overrides(name, folder) for name, folder in folders.items()}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, folders[name], command) for name, command in commands.items()}


@pytest.mark.parametrize("name", MINIATURES)
def test_a_miniature_runs_every_stage(name, runs):
    done, workdir = runs[name].result()
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in STAGES:
        assert (workdir / stage / "done.json").exists(), stage
    counts = read(workdir / "critique" / "done.json")["counts"]
    assert counts["prompts"]["redteam"]["given"] == counts["prompts"]["redteam"]["kept"] == 24
    rows = [json.loads(line) for line in (workdir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == int(read(workdir / "config.json")["ppo"]["iterations"]) == 2
    assert rows[0]["first_ratio_error"] < 1e-3 and abs(rows[0]["kl"]) < 1e-3


@pytest.mark.parametrize(
    "name, model, more",
    [
        ("gemma3_4b", "rl_cai", ["--adapter"]),
        ("gemma3_4b", "reward", []),
        ("bai2022", "reward", []),
        ("mathewjohn2026", "dpo_cai", []),
    ],
)
def test_its_models_are_exported_and_checked(name, model, more, runs, tmp_path):
    flags = (
        f"--workdir={runs[name].result()[1]}",
        f"--model={model}",
        f"--out={tmp_path / 'out'}",
        "--dtype=float32",
        "--check",
    )
    done = cai(*flags, *more, command="export", devices=8, flags="--xla_backend_optimization_level=0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "largest difference from transformers" in done.stderr
    assert (tmp_path / "out" / "adapter_config.json").exists() == ("--adapter" in more)
