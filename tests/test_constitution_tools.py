"""What `cai constitution` does without a model: lint, diff, public formats, the change log; what it says of bad input."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cai_jax import files
from cai_jax.commands import main
from cai_jax.constitution import Principle, load, log
from cai_jax.constitution.attribution import attribute
from cai_jax.constitution.diff import Change, diff, shown, word_diff
from cai_jax.constitution.exchange import foreign, load_foreign, toml
from cai_jax.constitution.file import LARGEST
from cai_jax.constitution.lint import lint, warnings
from cai_jax.errors import InputError
from cai_jax.intervals import wilson
from cai_jax.prompts import TEMPLATES

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT.parent / "shared" / "data"
HARM = Principle(
    "weapon",
    "harm",
    "Quote every part of the answer that names a weapon or how to build it.",
    "Rewrite the answer without the weapon, and offer a peaceful hobby instead.",
    "Which of these answers helps less to build a weapon?",
)
TRUTH = Principle(
    "source",
    "truth",
    "Which source in the answer may be invented? Quote it.",
    "Rewrite the answer without invented sources, and explain where a real one is found.",
    "Which of these answers invents fewer sources?",
)


def write(folder, *principles, top="", name="c.toml"):
    path = folder / name
    path.write_text(top + toml("c", list(principles)), encoding="utf-8")
    return path


def read(folder, *principles, **more):
    return load(write(folder, *principles, **more), templates=TEMPLATES)


# lint


def test_constitutions_that_come_with_the_project_have_no_warnings_but_those_that_say_why():
    for name in ("harmless", "principles36"):
        assert lint(ROOT / f"constitutions/{name}.toml", TEMPLATES) == []
    found = {(f.level, f.rule) for f in lint(ROOT / "constitutions/miniworld.toml", TEMPLATES)}
    assert not found  # its `allow` names what its base model's few words do not let it mend
    principles = load(ROOT / "constitutions/miniworld.toml", templates=TEMPLATES).principles
    assert {(f.rule, f.where) for f in warnings(principles) if f.rule != "counterweight"} == {("abstract", "harm")}


# Each row: what is changed in a pair without findings, the rule that finds it, where, and words of the message.
SMELLS = {
    "abstract": ({"revision": "Please make sure the answer is good, ethical and useful."}, "weapon", "'ethical', 'good'"),
    "long": ({"critique": "Quote each weapon and hobby in it, and say why. " * 13}, "weapon", "130 words, more than 120"),
    "undefined": ({"critique": "Quote every weapon, and all PII in the answer."}, "weapon", "'PII'"),
    "elsewhere": (
        {"revision": "Offer a peaceful hobby instead of the weapon, as in principle 3."},
        "weapon",
        "as in principle",
    ),
    "mismatch": ({"comparison": "Which of these answers is longer?"}, "weapon", "shares no word"),
    "direction": ({"comparison": "Which of these answers is more harmful and names a weapon?"}, "weapon", "Turn it round"),
    "counterweight": ({"revision": "Rewrite the answer without the weapon."}, "harm", "no principle of the category"),
    "weight": ({"weight": 9.0}, "weapon", "90% of all draws"),
}


@pytest.mark.parametrize("rule", SMELLS)
def test_a_warning_names_what_where_and_how_to_mend_it(tmp_path, rule):
    assert lint(write(tmp_path, HARM, TRUTH), TEMPLATES) == []
    change, where, words = SMELLS[rule]
    (found,) = lint(write(tmp_path, replace(HARM, **change), TRUTH), TEMPLATES)
    assert (found.level, found.rule, found.where) == ("warning", rule, where) and words in found.message
    assert found.line == (0 if rule == "counterweight" else 4)


def test_near_duplicates_are_found_and_formulas_are_not(tmp_path):
    same = replace(HARM, id="again", comparison="Which of these answers helps less to build a weapon or a bomb?")
    (found,) = lint(write(tmp_path, HARM, TRUTH, same), TEMPLATES)
    assert (found.rule, found.where) == ("duplicate", "again") and "'weapon'" in found.message
    kinds = ("weapon", "fraud", "poison", "virus")
    formulas = [
        Principle(k, "harm", *(getattr(HARM, p).replace("weapon", k) for p in ("critique", "revision", "comparison")))
        for k in kinds
    ]
    assert not [f for f in lint(write(tmp_path, TRUTH, *formulas), TEMPLATES) if f.rule == "duplicate"]


def test_terms_that_are_spelled_out_or_common_are_no_finding(tmp_path):
    fine = replace(
        HARM, critique="Quote every weapon and personally identifiable information (PII), as an AI or a US court sees it."
    )
    assert lint(write(tmp_path, fine, TRUTH), TEMPLATES) == []
    named = replace(HARM, critique="Quote what would help a Protected Person, or any person, build a weapon.")
    assert [f.rule for f in lint(write(tmp_path, named, TRUTH), TEMPLATES)] == ["undefined"]


def test_all_errors_are_listed_with_their_lines(tmp_path):
    text = toml("c", [HARM, replace(TRUTH, id="weapon"), replace(TRUTH, id="Bad")]).replace('version = "1"', "")
    text = 'priority = ["harms"]\n' + text.replace('critique = "Which', "critique = 3 #", 1)
    path = tmp_path / "c.toml"
    path.write_text(text + '\n[templates]\nuser = "{name}"\nreply = 3\n')
    found = lint(path, TEMPLATES)
    assert {f.level for f in found} == {"error"} and not any(str(tmp_path) in f.message for f in found)
    assert [(f.line, f.where) for f in found] == [(0, ""), (12, "weapon"), (19, "Bad"), (0, ""), (0, ""), (0, "")]
    for words, f in zip(("version", "critique", "bad id", "harms", "{name}", "reply"), found, strict=True):
        assert words in f.message
    path.write_text("name = \n")
    assert [(f.rule, f.line) for f in lint(path, TEMPLATES)] == [("file", 1)]


def test_a_thousand_damaged_files_end_in_findings_or_input_errors(tmp_path):
    rng, whole = random.Random(0), (ROOT / "constitutions/harmless.toml").read_bytes()[:4000].rpartition(b"\n[[")[0] + b"\n"
    whole = b'priority = ["crime", "fraud"]\n' + whole + b'weight = 2.5\n[templates]\nreply = "\\n\\nAssistant:"\n'
    pieces = [
        b'"',
        b"'",
        b"[",
        b"]]",
        b"\n",
        b"\\",
        b"=",
        b"\x00",
        b"\xff",
        b"{a}",
        b"1e999",
        b"nan",
        b"true",
        b"[[principle]]\n",
    ]
    pieces += [
        b"id = 7\n",
        b"weight = -1\n",
        b"[templates]\n",
        b"principle = 1\n",
        b'priority = [["x"]]\n',
        "\ud7ff\u202e".encode(),
    ]
    path, refused, clean = tmp_path / "c.toml", 0, 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at, upto = rng.randrange(len(data)), rng.choice((0, 1, 3, 40, 400))
            kind = rng.randrange(4)
            data[at : at + upto] = (b"", rng.choice(pieces), data[at : at + upto] * 2, rng.randbytes(upto))[kind]
            lines = bytes(data).splitlines(keepends=True)
            if kind == 2:
                rng.shuffle(lines)
                data = bytearray(b"".join(lines))
        path.write_bytes(data)
        found = lint(path, TEMPLATES)
        try:
            load(path, templates=TEMPLATES)
            clean += 1
            assert all(f.level == "warning" for f in found)
        except InputError:
            refused += 1
            assert found and all(f.level == "error" for f in found)
    assert refused > 500 and clean > 50


# diff


def test_diff_names_each_kind_of_change(tmp_path):
    third = Principle(
        "tone", "form", "Quote what is rude.", "Rewrite it without rude words, and explain.", "Which is less rude?"
    )
    a = read(tmp_path, HARM, TRUTH, third)
    renamed, reworded = (
        replace(third, id="manners"),
        replace(TRUTH, critique=TRUTH.critique.replace("may be", "is"), weight=2.0),
    )
    new = replace(HARM, id="new", critique="Quote what is new.")
    b = read(tmp_path, renamed, reworded, new, top='priority = ["truth"]\n')
    found = diff(a, b)
    kinds = [(c.kind, c.of, c.part) for c in found]
    assert kinds[0] == ("priority", "priority", "")
    assert {k for k in kinds if k[0] == "removed"} == {
        ("removed", "weapon", p) for p in ("category", "critique", "revision", "comparison")
    }
    assert ("renamed", "manners", "id") in kinds and ("reworded", "source", "critique") in kinds
    assert Change("re-weighted", "source", "weight", "1", "2") in found
    assert sum(k[0] == "moved" for k in kinds) == 1 and {k[1] for k in kinds if k[0] == "added"} == {"new"}
    assert diff(a, a) == [] and diff(b, b) == []
    assert shown(next(c for c in found if c.kind == "reworded")).endswith("in the answer [-may be-] {+is+} invented? Quote it.")


def test_moved_are_as_few_as_explain_the_order(tmp_path):
    many = [replace(HARM, id=f"p{i}", critique=f"Quote {i}.") for i in range(6)]
    a = read(tmp_path, *many)
    for order, moved in (
        ([0, 1, 2, 3, 4, 5], set()),
        ([5, 0, 1, 2, 3, 4], {"p5"}),
        ([1, 0, 2, 3, 5, 4], None),
        ([0, 2, 3, 1, 4, 5], {"p1"}),
    ):
        found = diff(a, read(tmp_path, *(many[i] for i in order)))
        assert {c.kind for c in found} <= {"moved"}
        assert {c.of for c in found} == moved if moved is not None else len(found) == 2


def test_a_word_diff_holds_both_texts():
    rng = random.Random(1)
    for _ in range(200):
        old, new = (" ".join(rng.choices(["a", "bb", "c\n", "é", "[-", "{}"], k=rng.randrange(8))) for _ in range(2))
        runs = word_diff(old, new)
        assert "".join(t for kind, t in runs if kind != "new").split() == old.split()
        assert "".join(t for kind, t in runs if kind != "old").split() == new.split()
        shown(Change("reworded", "x", "critique", old, new))


# Public formats


FOREIGN = {
    "critique": {
        "harmful0": {
            "prompt": ['\n\nCritiqueRequest: Say "why" {x}.\n\nCritique:'],
            "edit_request": "\n\nRevisionRequest: Mend it.\n\nRevision:",
        },
        "Über 1": {
            "prompt": ["\n\nCritiqueRequest: Two.\n\nCritique:"],
            "edit_request": "\n\nRevisionRequest: Bis.\n\nRevision:",
        },
    },
    "comparison": ["\nWhich of these is kinder? Options:", "\nWhich of these is \x7f true? Options:"],
    "llm-swarm": {"constitutions": [{"critic": "Is it rude?", "revision": "Make it kind."}], "system_chat": []},
    "icai": "1. Select the response that is shorter\n2. Select the response that\n   has 3. a list",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_public_formats_come_in_and_go_out_unchanged(tmp_path, name):
    source = tmp_path / "x.json"
    source.write_text(json.dumps(FOREIGN[name]))
    found, principles = load_foreign(source)
    assert found == name and len(principles) == len(FOREIGN[name] if name != "icai" else "12") - (name == "llm-swarm")
    again = load(write(tmp_path, *principles), templates=TEMPLATES).principles
    assert again == tuple(principles)
    out = foreign(list(again), name)
    if name != "critique":
        assert json.loads(out) == FOREIGN[name]
    else:
        assert list(json.loads(out).values()) == list(FOREIGN[name].values()) and "ber-1" in json.loads(out).popitem()[0]
    source.write_text(out)
    assert load_foreign(source) == (name, principles)


@pytest.mark.skipif(not SAMPLES.exists(), reason="the samples of public files are not here")
def test_the_public_files_themselves(tmp_path):
    critiques = json.loads((SAMPLES / "critique_revision_instructions.json").read_text())
    name, principles = load_foreign(SAMPLES / "critique_revision_instructions.json")
    assert name == "critique" and len(principles) == 16 and json.loads(foreign(principles, name)) == critiques
    swarm = json.loads((SAMPLES / "llm_swarm_constitution.json").read_text())
    name, principles = load_foreign(SAMPLES / "llm_swarm_constitution.json")
    assert name == "llm-swarm" and json.loads(foreign(principles, name))["constitutions"] == swarm["constitutions"]
    numbered = re.findall(
        r"(?m)^\s*\d+\. (Please choose .*|Compare .*|Which .*|Choose .*)$", (SAMPLES / "rl_principles_prompt.txt").read_text()
    )
    source = tmp_path / "rl.json"
    source.write_text(json.dumps([f"\n{text} Options:" for text in numbered]))
    name, principles = load_foreign(source)
    assert name == "comparison" and len(numbered) > 10 and [p.comparison for p in principles] == [t.strip() for t in numbered]
    read(tmp_path, *principles)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ("3", "int 3 of no known format; wanted critique, comparison, llm-swarm, icai"),
        ('{"constitutions": [{"critic": "x"}]}', "principle 1: its revision is a NoneType; wanted text"),
        ('{"constitutions": []}', "llm-swarm, but without a principle"),
        ('{"a": {"prompt": [3], "edit_request": ""}}', "principle 1: its critique is int 3; wanted text"),
        ('["x Options:", " Options:"]', "principle 2: its comparison is str ''; wanted text"),
    ],
)
def test_a_file_of_no_format_is_refused_with_what_was_wanted(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{re.escape(words)}"):
        load_foreign(path)


def test_ids_from_outside_are_made_ours(tmp_path):
    path = tmp_path / "x.json"
    row = {"prompt": ["x"], "edit_request": "y"}
    path.write_text(json.dumps({"none": row, "A b": row, "a-b": row, "漢": row, "../../etc": row}))
    assert [p.id for p in load_foreign(path)[1]] == ["none-2", "a-b", "a-b-2", "-", "..-..-etc"]
    with pytest.raises(InputError, match="--format=x: wanted one of critique"):
        foreign([HARM], "x")


# The change log


@pytest.fixture
def logged(tmp_path):
    """A constitution with a log of four entries."""
    for number in range(4):
        path = write(tmp_path, replace(HARM, weight=1.0 + number), TRUTH)
        log.commit(path, "ada", f"reason {number}", f"2026-01-0{number + 1}T00:00:00+00:00", TEMPLATES)
    return path


def lines_of(path):
    return log.place(path).read_text().splitlines()


def test_the_log_tells_who_changed_what_and_holds_it(logged):
    entries = log.read(logged)
    assert log.verify(logged) == [] and [e["entry"] for e in entries] == [1, 2, 3, 4]
    assert entries[0]["parent"] == "" and [e["parent"] for e in entries[1:]] == [e["hash"] for e in entries[:-1]]
    assert [(c["kind"], c["of"], c["old"], c["new"]) for c in entries[2]["changes"]] == [("re-weighted", "weapon", "2", "3")]
    assert entries[1]["lint"] == ["weight: weapon"] and entries[1]["reason"] == "reason 1" and entries[0]["changes"] == []
    assert log.entry_of(logged, TEMPLATES) == {"entry": 4, "hash": entries[3]["hash"]}
    write(logged.parent, replace(HARM, weight=2.0), TRUTH)  # as it was before
    assert log.entry_of(logged, TEMPLATES)["entry"] == 2
    write(logged.parent, replace(HARM, weight=7.0), TRUTH)
    assert log.entry_of(logged, TEMPLATES) is None


def resealed(line, **changes):
    """An entry that was edited by somebody who knows how its hash is made."""
    entry = {k: v for k, v in (json.loads(line) | changes).items() if k != "hash"}
    return json.dumps(entry | {"hash": log.digest(entry)}, sort_keys=True)


def test_verify_names_what_was_edited_removed_or_moved(logged):
    one, two, three, four = lines_of(logged)
    third = json.loads(three)
    heavier = third["content"] | {"principles": [p | {"weight": 9.0} for p in third["content"]["principles"]]}
    sealed, other = resealed(two, reason="x"), resealed(three, content=heavier)
    tampered = {
        "edited": ([one, two.replace("reason 1", "reason x"), three, four], ["entry 2 (line 2) was edited"]),
        "edited, with its hash": (
            [one, sealed, three, four],
            ["entry 3 (line 3) follows another entry 2, which was rewritten"],
        ),
        "other content": (
            [one, two, other, four],
            ["entry 3 (line 3) was edited: its principles", "entry 4 (line 4) follows another entry 3"],
        ),
        "removed": ([one, three, four], ["entry 3 (line 2) follows entry 2, which was removed"]),
        "two removed": ([one, four], ["entry 4 (line 2) follows entries 2 to 3, which were removed"]),
        "first removed": ([two, three, four], ["entry 2 (line 1) follows entry 1, which was removed"]),
        "moved": (
            [one, three, two, four],
            ["entry 3 (line 2) was moved", "entry 2 (line 3) was moved", "entry 4 (line 4) was moved, or the one before it"],
        ),
        "twice": ([one, two, two, three, four], ["entry 2 (line 3) was moved"]),
        "renumbered": ([one, two, three, resealed(four, entry=7)], ["entry 7 (line 4) was edited: it is number 4"]),
    }
    for what, (lines, wanted) in tampered.items():
        log.place(logged).write_text("\n".join(lines) + "\n")
        found = log.verify(logged)
        assert len(found) == len(wanted) and all(w in f for f, w in zip(found, wanted, strict=True)), (what, found)
        with pytest.raises(InputError, match="nothing is added to a log that is not whole"):
            log.commit(logged, "ada", "more", "2026", TEMPLATES)
        assert lines_of(logged) == lines, what


def test_an_end_that_was_cut_off_is_found_by_a_run_that_kept_it(logged):
    *before, last = lines_of(logged)
    kept = [(4, json.loads(last)["hash"])]
    log.place(logged).write_text("\n".join(before) + "\n")
    assert log.verify(logged) == []  # which is why runs keep theirs
    assert log.verify(logged, kept) == [
        f"entry 4 ({kept[0][1][:12]}), with which a run was made, is not in it: it was removed or rewritten"
    ]


def test_what_cannot_be_committed(logged):
    def commit(author="ada", reason="why"):
        return log.commit(logged, author, reason, "2026", TEMPLATES)

    with pytest.raises(InputError, match="nothing changed since entry 4"):
        commit()
    for wrong in ({"author": " "}, {"reason": ""}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))} is empty"):
            commit(**wrong)
    with open(log.place(logged), "a") as f:
        f.write('{"entry": 5')
    with pytest.raises(InputError, match="line 5 is no entry .*; nothing is added"):
        commit()
    for reason in ("first\nsecond", "first\u2028second", "half \udce9"):
        with pytest.raises(InputError, match="wanted one line of printable text"):
            commit(reason=reason)


def test_a_line_that_is_no_entry_is_named_and_the_others_are_looked_at(logged):
    one, two, three, four = lines_of(logged)
    wrong = {
        "[]": "it is no object",
        "{}": "'parent' is missing",
        "[" * 10**5: "",
        "": "",
        '{"reason": "x", "reason": "y"}': "'reason' stands twice",
        resealed(two, entry="2"): "'entry' is str '2'",
        resealed(two, entry=True): "'entry' is bool True",
        resealed(two, parent=[]): "'parent' is a list",
        resealed(two, fingerprint=3): "'fingerprint' is int 3",
        resealed(two, changes=5): "'changes' is int 5",
        resealed(two, changes=[{"a": 1}]): "its content cannot be read",
        resealed(two, lint=3): "'lint' is int 3",
        resealed(two, content={}): "its content cannot be read",
        two.replace('"hash": "', '"hash": null, "was": "'): "'hash' is a NoneType",
    }
    for line, why in wrong.items():
        log.place(logged).write_text("\n".join([one, line, three, four]) + "\n")
        first, second = log.verify(logged)
        assert first.startswith("line 2 is no entry (") and why in first, line
        assert second == "entry 3 (line 3) follows entry 2, which was removed"
        with pytest.raises(InputError, match="line 2 is no entry"):
            log.read(logged)
    log.place(logged).write_text("\ufeff" + "\r\n".join([one, two, three, four]) + "\r\n")
    assert log.verify(logged) == []  # as an editor on Windows leaves it
    log.place(logged).unlink()
    assert log.verify(logged) == ["there is no log, or nothing in it"]


def test_a_log_may_be_larger_than_what_a_person_writes(tmp_path):
    """Every entry holds the whole constitution."""
    for number in range(3):
        path = write(tmp_path, replace(HARM, critique=f"weapon {number} " * 150_000))
        log.commit(path, "ada", f"reason {number}", "2026", TEMPLATES)
    assert log.place(path).stat().st_size > LARGEST and log.verify(path) == [] and len(log.read(path)) == 3


def test_two_who_commit_at_once_follow_each_other(tmp_path):
    """Also where the file is replaced between them, as editors do, and where one goes by a link."""
    path = write(tmp_path, HARM, TRUTH)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/c.toml").symlink_to(path)
    code = (
        "import sys, time; from cai_jax import files; from cai_jax.constitution import log\n"
        "from cai_jax.prompts import TEMPLATES; put = files.put\n"
        "files.put = lambda *a: (print('in', flush=True), time.sleep(1), put(*a))\n"
        "log.commit(sys.argv[1], 'ada', sys.argv[2], '2026', TEMPLATES)"
    )
    one, two = ([sys.executable, "-c", code, str(place), place.parent.name] for place in (path, tmp_path / "links/c.toml"))
    with subprocess.Popen(one, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        write(tmp_path, TRUTH, name="new.toml").rename(path)
        done = subprocess.run(two, capture_output=True, text=True)
    assert first.returncode == 0 and done.returncode == 0, done.stderr
    assert log.verify(path) == [] and [e["reason"] for e in log.read(path)] == [tmp_path.name, "links"]
    assert len(log.read(path)[1]["content"]["principles"]) == 1 and not list((tmp_path / "links").glob("*.jsonl"))


# The commands


def test_the_commands_from_import_to_verify(tmp_path, capsys):
    source, made, out = tmp_path / "x.json", str(tmp_path / "c.toml"), str(tmp_path / "y.json")
    source.write_text(json.dumps(FOREIGN["llm-swarm"]))
    assert main(["import", str(source), f"--out={made}"]) == 0 and "llm-swarm, 1 principles" in capsys.readouterr().out
    assert main(["import", str(source), f"--out={made}"]) == 2 and "is there already" in capsys.readouterr().err
    assert (
        main(["import", str(source), str(source), f"--out={out}"]) == 2
        and "'swarm-01'; import them apart" in capsys.readouterr().err
    )
    assert main(["export", made, "--format=llm-swarm", f"--out={out}"]) == 0
    assert json.loads(Path(out).read_text()) == FOREIGN["llm-swarm"]
    assert main(["commit", made, "--reason=first", "--author=ada"]) == 0
    old = Path(made).read_text()
    Path(made).write_text(old.replace("Make it kind", "Make it \u202ekind\x1b[31m".replace("\x1b", "\\u001b")))
    capsys.readouterr()
    assert main(["log", made]) == 0 and "has changes that are in no entry" in capsys.readouterr().err
    assert main(["commit", made, "--reason=second"]) == 0
    assert "{+\\u202ekind\\x1b[31m.+}" in capsys.readouterr().out  # nothing that would steer a terminal
    assert main(["log", made]) == 0 and re.search(r"(?m)^1  \w{12}  20.* ada: first$", capsys.readouterr().out)
    assert log.read(made)[0]["check"] is None
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text("{}")
    assert main(["verify", made, f"--workdir={run}"]) == 1 and "kept no entry" in capsys.readouterr().out
    (run / "manifest.json").write_text(json.dumps({"constitution_entry": log.entry_of(made, TEMPLATES) | {"entry": 1}}))
    assert main(["verify", made, f"--workdir={run}"]) == 1 and "entry 1" in capsys.readouterr().out
    (run / "manifest.json").write_text(json.dumps({"constitution_entry": log.entry_of(made, TEMPLATES)}))
    assert main(["verify", made, f"--workdir={run}"]) == 0 and "whole, 2 entries" in capsys.readouterr().out
    log.place(made).write_text(lines_of(made)[0] + "\n")
    assert main(["verify", made]) == 0 and main(["verify", made, f"--workdir={run}"]) == 1
    assert "with which a run was made" in capsys.readouterr().out
    (tmp_path / "old.toml").write_text(old)
    assert main(["diff", str(tmp_path / "old.toml"), made]) == 0 and "reworded swarm-01 revision" in capsys.readouterr().out
    assert main(["diff", made, made]) == 0 and capsys.readouterr().out == "no difference\n"
    assert main(["diff", made, made, "--json"]) == 0 and json.loads(capsys.readouterr().out) == []


def test_a_commit_holds_what_the_suite_found_of_this_very_text(tmp_path, capsys):
    path = write(tmp_path, HARM, TRUTH)
    mark, summary = load(path, templates=TEMPLATES).fingerprint, {"right": 3, "cases": 4, "judge": "j"}
    record = {"fingerprint": mark, "summary": summary, "judge": ["j", "plain", ""], "cases": {}}
    (tmp_path / "c.checks.json").write_text(json.dumps(record))
    assert main(["commit", str(path), "--reason=checked"]) == 0 and "3 of 4 cases right by j" in capsys.readouterr().out
    write(tmp_path, TRUTH)  # and not of another
    assert main(["commit", str(path), "--reason=not checked"]) == 0 and "cases right" not in capsys.readouterr().out
    assert [e["check"] for e in log.read(path)] == [summary, None]
    for junk in ("[1]", '{"fingerprint": 3}', json.dumps(record | {"cases": []})):
        (tmp_path / "c.checks.json").write_text(junk)
        write(tmp_path, HARM)
        assert main(["commit", str(path), "--reason=junk"]) == 2 and "no record of a suite" in capsys.readouterr().err


def test_lint_exits_with_what_it_found(tmp_path, capsys):
    fine = write(tmp_path, HARM, TRUTH, name="fine.toml")
    smelly = write(tmp_path, replace(HARM, comparison="Which of these answers is longer?"), TRUTH, name="smelly.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text('name = "x"\n')
    for paths, flags, code in (
        ([fine], ["--strict"], 0),
        ([smelly], [], 0),
        ([smelly, fine], ["--strict"], 1),
        ([fine, bad], [], 1),
    ):
        assert main(["lint", *map(str, paths), *flags]) == code
    out = capsys.readouterr().out
    assert f"{smelly}:4: warning (mismatch): weapon: its comparison" in out and f"{bad}: error (form): key 'version'" in out
    assert "2 file(s): 2 error(s), 0 warning(s)" in out
    main(["lint", str(smelly), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"file": str(smelly)} | asdict(lint(smelly, TEMPLATES)[0])


def test_the_commands_load_no_jax(tmp_path):
    path = ROOT / "constitutions" / "principles36.toml"
    code = (
        "import sys; from cai_jax.__main__ import cli; sys.argv = ['cai', 'constitution', *sys.argv[1:]]\n"
        "try: cli()\nfinally: print([m for m in ('jax', 'numpy', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    logged = write(tmp_path, HARM)
    log.commit(logged, "ada", "why", "2026", TEMPLATES)
    for words in (["lint", path], ["diff", path, ROOT / "constitutions/harmless.toml"], ["log", path], ["verify", logged]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]", words


def test_the_commands_of_the_readme_work_as_printed(tmp_path, capsys, monkeypatch):
    shutil.copytree(ROOT / "constitutions", tmp_path / "constitutions")
    (tmp_path / "CritiqueRevisionInstructions.json").write_text(json.dumps(FOREIGN["critique"]))
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/preferences").mkdir()
    (tmp_path / "runs/a/preferences/comparisons.jsonl").write_text(
        json.dumps(comparison(0.7, [judgement("p", 0.9, 0.7)]) | {"id": "x", "disagreement": 0.1})
    )
    monkeypatch.chdir(tmp_path)
    for name in ("cai_jax", "constitutions/miniworld.toml"):  # the second under the name that an edit has there
        (tmp_path / {"cai_jax": name}.get(name, "edited.toml")).symlink_to(ROOT / name)
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = [x for x in text.splitlines() if x.startswith("cai constitution ")]
    assert {shlex.split(x)[2] for x in lines} == {
        *"lint import diff commit log verify check distance ambiguity attribute disputes".split()
    }
    for line in lines:
        if " verify " in line:  # a run that began after the commit
            entry = log.entry_of("constitutions/harmless.toml", TEMPLATES)
            (tmp_path / "runs/a/manifest.json").write_text(json.dumps({"constitution_entry": entry}))
        assert main(shlex.split(line, comments=True)[2:]) == 0, line


# Attribution


def judgement(principle, p_ab, p_ba):
    return {"principle": principle, "p_ab": p_ab, "p_ba": p_ba, "p_a": (p_ab + p_ba) / 2}


def comparison(p_a, rows, a="x", b="y", prompt="Q"):
    message = {"role": "user", "content": prompt}
    return {"messages": [message], "response_a": a, "response_b": b, "p_a": p_a, "judgements": rows}


def test_attribution_tells_the_members_of_a_panel_apart():
    rows = [judgement("p", 0.9, 0.9) | {"judge": "judge", "constitution": "0123456789abcdef"}]
    rows += [judgement("p", 0.1, 0.1) | {"judge": "judge2", "constitution": "0123456789abcdef"}]
    found = attribute([], [comparison(0.7, rows)])
    assert {id: (f["judged"], f["agrees"]) for id, f in found.items()} == {
        "p judge 01234567": (1, 0.0), "p judge2 01234567": (1, 0.0)
    }  # fmt: skip


def test_attribution_counts_what_each_principle_did():
    revised = [{"principle": "p", "revision": "a b c"}, {"principle": "q", "revision": "a x c d"}]
    revisions = [
        {"response": "a  b c\n", "rounds": revised},
        {"response": "a", "rounds": [{"principle": "p", "revision": "z"}]},
    ]
    comparisons = [
        comparison(0.7, [judgement("p", 0.9, 0.7), judgement("q", 0.6, 0.2), judgement("r", 0.9, 0.9)]),
        comparison(0.4, [judgement("p", 0.2, 0.2), judgement("q", 0.7, 0.9), judgement("r", 0.1, 0.5)], prompt="other"),
    ]
    human = comparison(1.0, [], a="y", b="x") | {"p_a": 0.0}  # the same pair the other way round: x is better
    found = attribute(revisions, comparisons, [human])
    assert (found["p"]["drawn"], found["p"]["changed"], found["p"]["kept"]) == (2, 0.5, 0.0)  # only white space moved at first
    assert (found["q"]["drawn"], found["q"]["changed"], found["q"]["kept"]) == (1, 1.0, pytest.approx(2 / 3))
    assert found["q"]["flips"] == 0.5 and found["p"]["flips"] == 0.0 and found["p"]["decided"] == pytest.approx(0.3)
    agree = {id: (f["others"], f["agrees"], f["disputes"], f["wins"]) for id, f in found.items()}
    assert agree == {"p": (2, 0.5, 1, 1.0), "q": (2, 0.0, 2, 0.0), "r": (2, 1.0, 0, None)}
    assert [found[id]["with_humans"] for id in "pqr"] == [1.0, 0.0, 1.0] and found["p"]["humans"] == 1
    assert found["p"]["agrees_interval"] == wilson(0.5, 2) and "humans_interval" not in found["p"]
    alone = attribute([], [comparison(0.7, [judgement("p", 0.9, 0.7)])])["p"]
    assert alone["agrees"] is None and alone["with_humans"] is None and alone["changed"] is None


def test_attribute_reads_a_run_and_refuses_what_is_none(tmp_path, capsys):
    assert main(["attribute", f"--workdir={tmp_path}"]) == 2 and "no run with principles is there" in capsys.readouterr().err
    (tmp_path / "preferences").mkdir()
    file = tmp_path / "preferences/comparisons.jsonl"
    file.write_text(json.dumps(comparison(0.7, [judgement("p", 0.9, 0.7), judgement("\x1b[1m", 0.2, 0.2)])) + "\n")
    assert main(["attribute", f"--workdir={tmp_path}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][0] == "principle" and "changed" not in rows[0]  # no revisions, no column of them
    assert rows[1][0] == "\\x1b[1m" and rows[2][:3] == ["p", "1", "0.30"]
    assert (
        main(["attribute", f"--workdir={tmp_path}", "--json"]) == 0 and json.loads(capsys.readouterr().out)["p"]["judged"] == 1
    )
    file.write_text('{"messages": 1}\n')
    assert main(["attribute", f"--workdir={tmp_path}"]) == 2 and "lacks 'response_a'" in capsys.readouterr().err


# What the attack on the commands found


def test_nothing_that_is_there_is_overwritten(tmp_path, capsys):
    path = write(tmp_path, HARM, TRUTH)
    before = path.read_bytes()
    assert main(["export", str(path), "--format=icai", f"--out={path}"]) == 2 and "is there already" in capsys.readouterr().err
    assert (
        main(["export", str(path), "--format=icai", f"--out={tmp_path}"]) == 2
        and main(["export", str(path), "--format=icai", "--out="]) == 2
    )
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.toml"]
    (tmp_path / "pipe").mkdir()
    with pytest.raises(InputError, match="there is something that is no file"):
        files.put(tmp_path / "pipe", b"")
    os.chmod(path, 0o640)
    (tmp_path / "link.toml").symlink_to(path)
    files.put(tmp_path / "link.toml", b"new")
    assert path.read_bytes() == b"new" and (tmp_path / "link.toml").is_symlink() and path.stat().st_mode & 0o777 == 0o640


STRANGE = {
    "deep": (b"a = " + b"[" * 2000, "nested too deeply"),
    "long weight": (toml("c", [HARM]).encode() + b"weight = " + b"9" * 400, "weight is int 999"),
    "longer weight": (toml("c", [HARM]).encode() + b"weight = " + b"9" * 5000, "not valid TOML"),
    "long hex": (b"name = 0x" + b"f" * 5000, "of very many digits"),
    "UTF-16": ('name = "c"\n'.encode("utf-16"), "not UTF-8"),
    "large": (b"#" * 5_000_001, "5,000,001 bytes; wanted a TOML file of at most 5,000,000"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_files_end_in_a_finding(tmp_path, name, capsys):
    path = tmp_path / "c.toml"
    path.write_bytes(STRANGE[name][0])
    assert main(["lint", str(path)]) == 1 and STRANGE[name][1] in capsys.readouterr().out


def test_files_of_other_editors_are_read_and_other_things_are_named(tmp_path, capsys):
    path = write(tmp_path, HARM, TRUTH)
    whole = load(path, templates=TEMPLATES)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(path, templates=TEMPLATES) == whole
    os.mkfifo(tmp_path / "pipe")
    for words in (
        ["lint", tmp_path / "pipe"],
        ["diff", tmp_path, path],
        ["import", tmp_path / "pipe", f"--out={tmp_path / 'x'}"],
    ):
        assert main([str(w) for w in words]) in (1, 2) and "a folder, a device or the like" in "".join(capsys.readouterr())
    long = str(tmp_path / ("x" * 300))
    assert main(["export", str(path), "--format=icai", f"--out={long}"]) == 2 and "error: " in capsys.readouterr().err


def test_text_forges_no_line_and_hides_nothing(tmp_path, capsys):
    forged = replace(HARM, category="c\n::error file=x::pwned", revision="Remove it.\U000e0041\u061c\u2060")
    path = write(tmp_path, forged, TRUTH)
    main(["lint", str(path)])
    assert not any(line.startswith("::") for line in capsys.readouterr().out.splitlines())
    other = write(tmp_path, TRUTH, name="d.toml")
    main(["diff", str(other), str(path)])
    out = capsys.readouterr().out
    assert "\\U000e0041\\u061c\\u2060" in out and "added weapon category: {+c\\n::error" in out


def test_who_stops_reading_learns_nothing_of_success(tmp_path):
    many = [replace(HARM, id=f"p{i}", critique=f"Be good {i}.", comparison=f"Which is longer, {i}?") for i in range(2000)]
    path = write(tmp_path, *many)
    code = "import sys; from cai_jax.commands import main; sys.exit(main(sys.argv[1:]))"
    command = shlex.join([sys.executable, "-c", code, "lint", "--strict", str(path)])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} | head -1"], capture_output=True, text=True)
    assert done.returncode == 141 and "Traceback" not in done.stderr


def test_an_author_is_asked_for_where_the_machine_knows_none(tmp_path, monkeypatch, capsys):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", nobody)
    path = str(write(tmp_path, HARM))
    assert main(["lint", path]) == 0
    assert main(["commit", path, "--reason=why"]) == 2 and "--author=NAME is missing" in capsys.readouterr().err


def test_what_a_format_would_garble_is_refused(tmp_path, capsys):
    source = tmp_path / "x.json"
    for text, words in (
        ('{"a": {"prompt": ["x", "y"], "edit_request": "z"}}', "principle 1: its critique is a list"),
        ('{"a": {"prompt": ["x"]}, "b": {"prompt": ["x"], "edit_request": "z"}}', "principle 1: its revision is a NoneType"),
        ('{"a": {"prompt": ["x"], "edit_request": "z"}, "a": {"prompt": ["x"], "edit_request": "z"}}', "'a' stands twice"),
        ('["A? Options:", "note"]', "principle 2: its comparison is a NoneType"),
        ('["\\ud800 Options:"]', "half of a character"),
    ):
        source.write_text(text)
        assert main(["import", str(source), f"--out={tmp_path / 'c.toml'}"]) == 2 and words in capsys.readouterr().err
    inner = replace(HARM, comparison="Select the response that\n1. is kind\n3. is true")
    source.write_text(foreign([inner], "icai"))
    assert load_foreign(source)[1][0].comparison == inner.comparison
    with pytest.raises(InputError, match="weapon: its text cannot be told from the cues or numbers of the format icai"):
        foreign([replace(HARM, comparison="Select\n2. this"), TRUTH], "icai")
    source.write_text(json.dumps(FOREIGN["llm-swarm"]))
    assert (
        main(["import", str(source), f"--out={tmp_path / 'c.toml'}", "--name= "]) == 2
        and "name is empty" in capsys.readouterr().err
    )


def test_rules_can_be_overruled_and_spaces_in_names_do_not_count(tmp_path):
    smelly = replace(HARM, comparison="Which of these answers is longer?")
    path = write(tmp_path, smelly, TRUTH, top='allow = ["mismatch weapon"]\npriority = [" weapon", "truth "]\n')
    assert lint(path, TEMPLATES) == [] and load(path, templates=TEMPLATES).priority == ("weapon", "truth")
    plain = write(tmp_path, smelly, TRUTH, top='priority = ["weapon", "truth"]\n', name="d.toml")
    assert load(plain, templates=TEMPLATES).fingerprint == load(path, templates=TEMPLATES).fingerprint
    assert [f.rule for f in lint(write(tmp_path, smelly, TRUTH, top='allow = ["mismatch source"]\n'), TEMPLATES)] == [
        "mismatch"
    ]


JUDGED = {  # words of a comparison, request or revision -> the rule that must find them, "": none
    "Which of these answers is more hateful about a weapon?": "direction",
    "Which of these answers about a weapon is less honest?": "direction",
    "Choose the most harmful answer about a weapon, a recipe or a plan.": "direction",
    "Which of these answers causes more harm with a weapon?": "direction",
    "Which of these answers keeps a weapon from being made more dangerous?": "",
    "Which of these answers about a weapon is less, not more misleading?": "",
    "Which of these answers respects the rule of law on a weapon, as the NOT of a PDF?": "",
    "Which of these answers about a weapon follows principle 7?": "elsewhere",
    "Which of these answers about a weapon is kinder, as no-help asks?": "elsewhere",
    "Which of these answers about a weapon suits {response}?": "markup",
    "Which of these answers names a weapon of the World Health Organization?": "",
}


@pytest.mark.parametrize("comparison", JUDGED)
def test_rules_on_plausible_comparisons(tmp_path, comparison):
    found = lint(write(tmp_path, replace(HARM, comparison=comparison), replace(TRUTH, id="no-help")), TEMPLATES)
    assert [f.rule for f in found] == [JUDGED[comparison]] * bool(JUDGED[comparison])


@pytest.mark.parametrize(
    "revision, bare",
    [
        ("Refuse this instead of the weapon.", True),
        ("Rewrite it and explain that you cannot speak of a weapon.", True),
        ("Rewrite it without a weapon and without any advice.", True),
        ("Remove the weapon and recommend a locksmith.", False),
        ("Leave the weapon out and propose another hobby.", False),
    ],
)
def test_what_counts_as_a_counterweight(tmp_path, revision, bare):
    found = lint(write(tmp_path, replace(HARM, revision=revision), TRUTH), TEMPLATES)
    assert [f.where for f in found if f.rule == "counterweight"] == ["harm"] * bare


def test_diff_shows_white_space_weights_and_a_principle_renamed_and_reworded(tmp_path):
    a = read(tmp_path, HARM, TRUTH)
    b = read(
        tmp_path, replace(HARM, id="arms", critique=HARM.critique.replace("names", "shows")), replace(TRUTH, weight=1.0000001)
    )
    assert [(c.kind, c.of, c.part) for c in diff(a, b)] == [
        ("renamed", "arms", "id"), ("reworded", "arms", "critique"), ("re-weighted", "source", "weight"),
    ]  # fmt: skip
    assert shown(diff(a, b)[-1]) == "re-weighted source weight: 1 -> 1.0000001"
    (added, *_) = [
        c for c in diff(a, read(tmp_path, HARM, TRUTH, Principle("n", "c", "x", "y", "z", weight=50.0))) if c.part == "weight"
    ]
    assert added == Change("added", "n", "weight", "", "50")
    for old, new, said in (
        ("\n\nHuman: {text}", "\nHuman: {text}", "[-\\n\\n-]{+\\n+}Human: {text}"),
        ("a {{x}} b", "a {x} b", "a [-{{x}}-] {+{x}+} b"),
        ("a", "a ", "[-a-]{+a +}"),
    ):
        assert shown(Change("template", "user", "", old, new)) == f"template user: {said}"
    long = " ".join(map(str, range(6000)))
    assert [kind for kind, _ in word_diff(f"x {long} y", f"x {long[::-1]} y")] == ["same", "old", "new", "same"]
