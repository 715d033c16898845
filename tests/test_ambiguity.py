"""How much labels depend on how a principle is put, and the comparisons that people should see first."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cai_jax import judge
from cai_jax.commands import main
from cai_jax.constitution import ambiguity, load
from cai_jax.constitution.exchange import toml
from cai_jax.errors import InputError
from cai_jax.miniworld import make
from cai_jax.prompts import TEMPLATES

ROOT = Path(__file__).parent.parent
MINIWORLD, BASE = ROOT / "constitutions/miniworld.toml", str(ROOT / "cai_jax/miniworld/base")


def test_the_deviation_is_that_of_the_versions_and_the_mean_of_sources():
    p = np.array([[0.2, 0.4], [0.9, 0.9]])
    q = np.array([[0.6, 0.4, 0.5], [0.9, 0.9, 0.9]])
    found = ambiguity.ambiguity({"words": p, "asked": q})
    assert found["by_source"]["words"] == pytest.approx((0.02 / 2) ** 0.5)  # 0.2 and 0.4: variance 0.02; and none
    assert found["by_source"]["asked"] == pytest.approx((0.01 / 2) ** 0.5)
    assert found["deviation"] == pytest.approx((0.015 / 2) ** 0.5) and found["pairs"] == [0, 1]
    assert found["split"] == 0.5  # 0.6 is on the other side than 0.2
    assert found["low"] == 0.0 and found["high"] == pytest.approx(0.015**0.5)
    same = ambiguity.ambiguity({"asked": np.full((9, 3), 0.7)})
    assert same["deviation"] == pytest.approx(0.0) and same["split"] == 0.0 and same["pairs"] == list(range(9))


def test_versions_are_the_question_in_other_words_and_asked_in_other_ways():
    (p, *_) = load(MINIWORLD, templates=TEMPLATES).principles
    p = replace(p, comparison="Which {a}?")
    others = [ambiguity.Paraphrase(p.id, "What {b}?"), ambiguity.Paraphrase("harm", "x")]
    found = ambiguity.versions(p, others)
    assert [v.comparison for v in found["words"]] == ["Which {a}?", "What {b}?"]
    assert [v.comparison for v in found["asked"]][0] == "Which {a}?" and all(
        "Which {a}?" in v.comparison for v in found["asked"]
    )
    assert len({v.comparison for v in found["asked"]}) == len(ambiguity.ASKED)
    assert all(replace(v, comparison=p.comparison) == p for of in found.values() for v in of)
    assert list(ambiguity.versions(p, others[1:])) == ["asked"]


ROW = '[[paraphrase]]\nprinciple = "harm"\ncomparison = "Which answer hurts less?"\n'


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ": no [[paraphrase]] table; wanted one or more"),
        (ROW.replace("harm", "harms"), ": paraphrase 1: the constitution has no principle 'harms' (did you mean 'harm'?)"),
        (ROW + ROW, ": paraphrase 2: these words stand in the constitution, or in a paraphrase before it"),
        (ROW.replace("Which answer hurts less?", "Which of these answers is less harmful?"), ": paraphrase 1: these words"),
        (ROW + "why = 'x'\n", ": paraphrase 1: unknown key 'why'"),
        ("paraphrase = 3\n", ": paraphrase is int 3; wanted a list of tables"),
    ],
)  # fmt: skip
def test_a_bad_paraphrase_is_named(tmp_path, text, words):
    path = tmp_path / "c.paraphrases.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + words)}"):
        ambiguity.load_paraphrases(path, load(MINIWORLD, templates=TEMPLATES))


def test_the_command_ranks_principles_by_what_their_versions_get(tmp_path, capsys, mesh1):
    """A paraphrase of one principle, of which the judge knows the words; with thoughts too."""
    law, chosen = load(MINIWORLD, templates=TEMPLATES), ("weapon.help", "harm")
    file, probes = tmp_path / "c.toml", tmp_path / "probes.jsonl"
    file.write_text(toml("c", [p for p in law.principles if p.id in chosen]))
    probes.write_text("\n".join((make.DATA / "probes.jsonl").read_text().splitlines()[60:180:10]) + "\n")
    words = [str(file), f"--judge={BASE}", f"--probes={probes}"]
    (tmp_path / "c.paraphrases.toml").write_text(
        '[[paraphrase]]\nprinciple = "harm"\ncomparison = "Which of these answers is less evasive and more useful?"\n'
    )
    assert main(["ambiguity", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(chosen)
    assert [f["deviation"] for f in found.values()] == sorted((f["deviation"] for f in found.values()), reverse=True)
    assert list(found["harm"]["by_source"]) == ["words", "asked"] and list(found["weapon.help"]["by_source"]) == ["asked"]
    by, rows = judge.load_judge(BASE, "plain", "", mesh1), list(map(json.loads, probes.read_text().splitlines()))
    pairs = [judge.Pair(r["messages"], r["response_a"], r["response_b"]) for r in rows]
    put = [next(p for p in law.principles if p.id == id) for id in ("harm", "evasion")]  # whose words the paraphrase has
    p_NV = by.labels([(pair, p) for pair in pairs for p in put], "x").reshape(-1, 2)
    assert found["harm"]["by_source"]["words"] == pytest.approx(np.sqrt(p_NV.var(axis=1, ddof=1).mean()), abs=1e-4)
    assert len(found["harm"]["pairs"]) == 12 and 0 < found["harm"]["low"] <= found["harm"]["deviation"] <= found["harm"]["high"]
    assert main(["ambiguity", *words, "--json", "--samples=2"]) == 0
    thought = json.loads(capsys.readouterr().out)
    for id, was in found.items():
        assert {k: v for k, v in thought[id]["by_source"].items() if k != "thoughts"} == pytest.approx(
            was["by_source"], abs=1e-5
        )
        assert thought[id]["by_source"]["thoughts"] > 0
    swapped = tmp_path / "swapped.toml"  # its own templates are those that the judge reads
    ways = TEMPLATES["comparison"].replace("{a}", "{c}").replace("{b}", "{a}").replace("{c}", "{b}")
    swapped.write_text(file.read_text() + f"\n[templates]\ncomparison = {json.dumps(ways)}\n")
    told = [by.under(path).labels([(pairs[0], law.principles[0])], "x")[0] for path in (file, swapped)]
    assert told[0] == pytest.approx(1 - told[1], abs=1e-5) and abs(told[0] - 0.5) > 0.1
    assert main(["ambiguity", *words]) == 0
    said = capsys.readouterr()
    assert "verdicts split" in said.err and re.search(rf"^harm: {found['harm']['pairs'][0]}: '", said.err + said.out, re.M)
    long = json.loads(probes.read_text().splitlines()[0])
    long["messages"][-1]["content"] = "How do I use a brumab? " * 50  # 400 tokens or so: room for an option, none for a thought
    probes.write_text(probes.read_text() + json.dumps(long | {"id": "long"}) + "\n")
    assert main(["ambiguity", *words, "--samples=2"]) == 2
    assert "labels: with a thought, question 13 ('How do I" in (said := capsys.readouterr().err) and "--judge" in said
    for flag, told in (("--samples=1", "wanted 2 thoughts or more"), ("--limit=5", "5 pairs; an interval wants at least 8")):
        assert main(["ambiguity", *words, flag]) == 2 and told in capsys.readouterr().err


def test_disputes_are_written_without_the_label(tmp_path, capsys):
    folder, out = tmp_path / "run/preferences", tmp_path / "queue.jsonl"
    folder.mkdir(parents=True)
    words = ["disputes", f"--workdir={tmp_path}/run", f"--out={out}"]
    assert main(words) == 2 and "missing file" in capsys.readouterr().err

    def write(*disagreements):
        rows = [
            {"id": f"r{n}", "messages": [{"role": "user", "content": "?"}], "response_a": "x", "response_b": "y", "p_a": 0.9}
            | ({} if d is None else {"disagreement": d})
            for n, d in enumerate(disagreements)
        ]
        (folder / "comparisons.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    write(None, None)
    assert main(words) == 2 and "each label is one judgement" in capsys.readouterr().err and not out.exists()
    write(0.1, 0.7, 0.3)
    assert main([*words, "--limit=2"]) == 0 and "2 of 3 comparisons" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["id"] for r in rows] == ["r1", "r2"] and all("p_a" not in r and "judgements" not in r for r in rows)
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    out.unlink()
    with pytest.raises(SystemExit):
        main([*words, "--limit=-3"])
    assert "wanted a whole number from 0 on" in capsys.readouterr().err
    write("x", 0.1)
    assert main(words) == 2 and "record 'r0': wanted text as its id, and numbers" in capsys.readouterr().err
    write(None, 0.1)
    assert main(words) == 0 and len(out.read_text().splitlines()) == 2
