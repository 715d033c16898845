"""The benchmarks run, on a tiny model and our side only, and their tables say what was measured."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(HERE))

import model  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import table  # noqa: E402
import work  # noqa: E402

from cai_jax.checks import check_batches, resolve  # noqa: E402


@pytest.mark.parametrize(
    "benchmark, options, names",
    [
        ("generate", ["--peers=floor"], ["ours", "floor: plain JAX"]),
        ("mixed", ["--peers="], ["ours"]),
        ("critique", ["--peers="], ["ours", "ours, nothing shared"]),
        ("options", ["--peers=floor"], ["ours", "floor: plain JAX"]),
        ("logprobs", ["--peers="], ["ours"]),
        ("train", ["--peers=floor", "--cases=sft-mixed"], ["ours", "floor: plain JAX"]),
        ("train", ["--peers=", "--cases=reward-mixed,dpo-equal"], ["ours", "ours"]),
        ("ppo", ["--peers="], ["ours", "ours"]),
    ],
)
def test_a_benchmark_prints_a_table_of_finite_numbers(tmp_path, benchmark, options, names):
    found = rows(finished(tmp_path, benchmark, *options))
    assert [r[0] for r in found] == names
    for cells in found:
        numbers = [float(x) for cell in cells[1:] for x in re.findall(r"[\d.]+(?:e[+-]\d+)?|nan|inf", cell)]
        assert len(numbers) >= 2 and all(math.isfinite(x) and x > 0 for x in numbers), cells
        assert "no" not in cells  # the floor does the same work


def test_the_roofline_and_a_file_to_write(tmp_path):
    file = tmp_path / "docs" / "b.md"
    printed = finished(tmp_path, "roofline", "--peers=", f"--write={file}", "--date=2001-02-03")
    found = rows(printed)
    assert [r[0] for r in found[:2]] == ["copy bandwidth", "float32 products"]
    assert [r[0] for r in found[4:]] == [
        "ours, one decoding step",
        "XLA, products alone, one decoding step",
        "ours, one training step",
    ]
    assert all(re.fullmatch(r"-?\d+ %", r[2]) for r in found[4:])
    text = file.read_text()
    assert text.startswith("# Benchmarks\n") and "2001-02-03" in text and rows(text) == found


@pytest.mark.parametrize("sizes", [work.SMALL, work.FULL], ids=["small", "full"])
def test_the_products_alone_are_those_that_the_roofline_counts(sizes):
    assert sum(outputs * inputs for outputs, inputs in work.decode_matrices(sizes)) == sizes.shape.weights


def test_the_table_of_one_accelerator(tmp_path):
    file = tmp_path / "b.md"
    command = [sys.executable, str(HERE / "accelerator.py"), "--small", f"--write={file}"]
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    names = ["copy", "products, float32", *(f"decode step, {n} slots" for n in (1, 4, 16)), "SFT step"]
    assert [r[0] for r in found] == names + [f"PPO, {x}" for x in ("rollout", "score", "update", "whole iteration")]
    assert re.fullmatch(r"MFU \d+ % of the products", found[5][2]) and rows(file.read_text()) == found
    assert all(float(r[1].split()[0]) > 0 for r in (*found[:2], *found[5:]))
    assert "6 for each weight and token" in done.stdout  # MFU has its definition beside it


def finished(folder: Path, *arguments: str) -> str:
    """What run.py prints for one round of the tiny model."""
    command = [sys.executable, str(HERE / "run.py"), *arguments, "--small", "--rounds=1", f"--folder={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(markdown: str) -> list[list[str]]:
    """Cells of the tables' rows, without heads."""
    found = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    ruled = [i for i, r in enumerate(found) if set(r[0]) == {"-"}]
    return [r for i, r in enumerate(found) if i not in ruled and i + 1 not in ruled]


def test_peers_that_are_not_there_name_what_sets_them_up(tmp_path):
    command = [sys.executable, str(HERE / "run.py"), "generate", f"--envs={tmp_path}", "--peers=torch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "tests/benchmarks/setup.sh" in done.stderr and str(tmp_path) in done.stderr


def test_ratios_are_taken_within_a_round():
    assert table.ratios([2.0, 40.0, 3.0], [1.0, 10.0, 2.0]) == (2.0, 1.5, 4.0)


def test_a_table_says_who_took_how_long_and_whether_it_did_the_same():
    def answer(seconds, check):
        return {"seconds": seconds, "tokens": 100, "check": check}

    rounds = [
        {"ours": answer(1.0, 5.0), "a": answer(2.0, 5.0001), "b": answer(4.0, 5.1)},
        {"ours": answer(2.0, 5.0), "a": answer(6.0, 5.0001), "b": answer(4.0, 5.1)},
    ]
    assert table.rows(rounds) == [
        ["ours", "1.5", "66.67 tokens", "", ""],
        ["a", "4", "25 tokens", "**2.50** (2.00 to 3.00)", "yes"],
        ["b", "4", "25 tokens", "**3.00** (2.00 to 4.00)", "no"],
    ]
    assert len(table.head(rounds)) == 5
    assert table.agrees([1, 2], [1, 2]) and not table.agrees([1, 2], [1, 3])


def test_a_section_is_replaced_in_place_and_added_at_the_end():
    text = table.replace_section("# Title\n", "a", "one\n")
    text = table.replace_section(text, "b", "two")
    assert text == "# Title\n\n<!-- begin a -->\none\n<!-- end a -->\n\n<!-- begin b -->\ntwo\n<!-- end b -->\n"
    changed = table.replace_section(text, "a", r"three \1")
    assert changed == text.replace("one", r"three \1")
    with pytest.raises(ValueError, match="end a"):
        table.replace_section("<!-- begin a -->\n", "a", "x")


def test_lengths_and_contexts_are_those_that_the_definitions_state():
    s = work.FULL
    prompts, lengths = work.mixed(s)
    assert len(prompts) == len(lengths) == s.records and lengths.min() >= 1 and lengths.max() == s.cap
    assert {len(p) for p in prompts} <= set(range(s.prompts[0], s.prompts[1] + 1))
    contexts, chosen = work.option_contexts(s), work.option_rows(s)
    assert contexts.shape == (s.comparisons * 2 * s.principles, s.conversation + 2 * s.response + s.question)
    assert (chosen[::2, : -s.option] == contexts).all() and (chosen[1::2, : -s.option] == contexts).all()
    for case in ("sft-equal", "sft-mixed"):
        assert max(map(len, work.examples(s, case))) <= (s.train_length if case == "sft-equal" else s.train_cap)
    for case in ("reward-equal", "dpo-mixed"):
        sizes = {len(p + said) for p, *two in work.pairs(s, case) for said in two}
        assert max(sizes) <= s.train_cap and (sizes == {s.train_length} or case == "dpo-mixed")


def test_every_case_has_contenders_and_a_definition():
    cases = {case for found in work.CASES.values() for case in found}
    assert cases == set(run.CONTENDERS) and all(work.definition(case, work.FULL) for case in cases)
    assert list(run.contenders("ppo-mixed", ["floor"])) == ["ours"]
    assert list(run.contenders("critique", ["torch", "floor"]))[:2] == ["ours", "floor: plain JAX"]


def test_the_model_is_one_that_we_read(tmp_path):
    from cai_jax.models import hf

    shape = work.SMALL.shape
    model.write(tmp_path, shape)
    cfg = hf.read_config(str(tmp_path))
    assert (cfg.vocab_size, cfg.width, cfg.num_layers, cfg.tied_embeddings) == (shape.vocab, shape.width, shape.layers, False)


@pytest.mark.parametrize("model", scaling.SPLIT)
def test_what_is_compiled_for_pods_fits_their_meshes_and_is_as_much_for_every_chip(model):
    for place in map(scaling.Place.of, scaling.TOPOLOGIES):
        cfg = resolve(scaling.config(model, place.chips()))
        data, fsdp, parts = cfg.mesh
        assert data * fsdp * parts == place.chips() and data % place.slices == 0
        check_batches(cfg, data * fsdp)
        assert (cfg.sft.rows, cfg.ppo.batch_size, cfg.critique.sampling.batch_size) == tuple(
            n * place.chips() for n in (1, 8, 4)
        )
    assert scaling.Place.of("2 x v5e:16x16") == ("v5e:16x16", 2) and str(scaling.Place("v5e:16x16", 2)) == "2 x v5e:16x16"


def test_what_is_sent_is_counted_as_the_table_of_the_docs_says():
    """Llama 3.2 1B has 973,078,528 weights in the matrices of its layers and a table of 128,256 x 2,048."""
    row = {"model": "Llama-3.2-1B", "place": "v5e:8x8", "mesh": [8, 8, 1], "stage": "sft", "step": "train"}
    row["sizes"] = "64 rows of 2,048 tokens"
    W, E = 2 * 973_078_528, 128_256 * 2_048
    data = 2 * 7 / 8 * (W / 8 + 2 * 4 * E / 8)
    assert scaling.sent_by_formula(row) == pytest.approx(3 * 7 / 8 * W + 7 / 8 * 8 * E + data)
    slices = scaling.sent_by_formula(row | {"place": "2 x v5e:4x8"})  # four along data within each slice
    assert slices == pytest.approx(3 * 7 / 8 * W + 7 / 8 * (8 + 2 * 4) * E + data * (3 / 4) / (7 / 8))
    ring = scaling.sent_by_formula(row | {"mesh": [1, 8, 1], "sizes": "8 rows of 2,048 tokens"})
    assert ring == pytest.approx((2 * 9 + 7) / 8 * W + 7 / 8 * 8 * E)
    alone = scaling.sent_by_formula(row | {"place": "v5p:2x2x2", "mesh": [1, 8, 1], "sizes": "8 rows of 2,048 tokens"})
    assert alone - ring == pytest.approx(7 / 8 * 4 * E)
    tiles = scaling.sent_by_formula(row | {"mesh": [4, 16, 1]})  # 128 of the width a device; o and down of 16 layers
    wide = 3 * 15 / 16 * W + 15 / 16 * 8 * E + 2 * 3 / 4 * (W / 16 + 2 * 4 * E / 16)
    assert tiles - wide == pytest.approx(15 / 16 * 2 * 16 * (2048 * 2048 + 8192 * 2048))
    split = scaling.sent_by_formula(row | {"mesh": [8, 4, 2]})  # 4,096 tokens of a device
    assert split == pytest.approx(3 / 4 * (3 * W / 2 + 8 * E / 2) + 7 / 4 * (W / 8 + 8 * E / 8) + 5 * 4096 * 2048 * 2 * 16)
    assert scaling.sent_by_formula(row | {"step": "decode", "sizes": "a token in 32 slots of 1,280"}) == 0


def test_a_row_of_pods_says_what_does_not_fit():
    row = {"model": "Llama-3.2-1B", "place": "v5e:2x4", "mesh": [1, 8, 1], "stage": "sft", "step": "train", "hbm": 2**34}
    row["sizes"] = "8 rows of 2,048 tokens"
    sent = [
        {"kind": "all-gather", "between_slices": False, "bytes": 2e9},
        {"kind": "all-reduce", "between_slices": True, "bytes": 1e9},
    ]
    seconds = {"links": 0.02, "network": 0.01, "step": 0.1}
    whole = row | {"fits": True, "memory": {"needs": 2**33}, "flops": 3e12, "collectives": sent, "seconds": seconds}
    assert scaling.cells(whole) == ["v5e:2x4", "SFT", "1x8x1", "8.0 (50%)", "3", "3", "0.38", "1", "100", "30%"]
    assert scaling.cells(row | {"fits": False, "memory": {"needs": 2**35}})[3:5] == ["**32.0 (200%)**", "-"]
    assert scaling.cells(row | {"fits": False, "error": "no"})[3] == "refused"
    assert "v5e:2x4" in scaling.report([whole], ["Llama-3.2-1B"])
