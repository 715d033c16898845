"""The constitution file: what it accepts, what it says of what it refuses, its fingerprint, and the law of the draw."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cai_jax import constitution
from cai_jax.constitution import Principle, load, rank, sample
from cai_jax.constitution.few_shot import ComparisonBlock, CritiqueBlock, load_few_shot
from cai_jax.errors import InputError
from cai_jax.prompts import TEMPLATES

ROOT = Path(__file__).parent.parent
HEAD = 'name = "small"\nversion = "1"\n'
NEED = "id, category, critique, revision, comparison"


def principle(id="a", category="care", critique="C?", revision="R!", comparison="Which?"):
    fields = {"id": id, "category": category, "critique": critique, "revision": revision, "comparison": comparison}
    return "[[principle]]\n" + "".join(f'{k} = "{v}"\n' for k, v in fields.items() if v is not None)


def write(folder, text, name="c.toml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(folder, text, exclude=()):
    return load(write(folder, text), exclude, templates=TEMPLATES)


def many(n):
    principles = tuple(Principle(f"p{i}", f"c{i % 4}", "C?", "R!", "Which?") for i in range(n))
    return constitution.Constitution("many", "1", principles, dict(TEMPLATES), "0" * 64)


def test_reads_principles_in_order_and_strips_their_text(tmp_path):
    got = read(tmp_path, HEAD + principle("b", critique="\\n C? \\t") + principle("a.1_x-y", category="truth"))
    assert (got.name, got.version) == ("small", "1")
    assert got.principles == (Principle("b", "care", "C?", "R!", "Which?"), Principle("a.1_x-y", "truth", "C?", "R!", "Which?"))
    assert got.templates == TEMPLATES and got.templates is not TEMPLATES


def test_templates_of_the_file_replace_the_defaults_of_their_name_only(tmp_path):
    text = HEAD + '[templates]\nuser = "\\n\\nPerson: {text}"\n' + principle()
    assert read(tmp_path, text).templates == TEMPLATES | {"user": "\n\nPerson: {text}"}


# Each row: the file, and what the message says after the path.
BAD = {
    "no name": ('version = "1"\n' + principle(), ": key 'name' is missing; wanted name, version"),
    "version is a number": ('name = "x"\nversion = 1\n' + principle(), ": version is int 1; wanted text in quotes"),
    "unknown top key": (
        HEAD + "[[principles]]\n",
        ": unknown key 'principles' (did you mean 'principle'?); keys are name, version, priority, allow, templates, principle",
    ),
    "not UTF-8": (HEAD.encode() + b"\xff\xfe", ": not UTF-8 (invalid start byte at byte 29); wanted a TOML file in UTF-8"),
    "no principles": (HEAD, ": no [[principle]] table; wanted one or more"),
    "one table": (
        HEAD + principle().replace("[[principle]]", "[principle]"),
        ": principle is a dict; wanted a list of tables, each headed [[principle]]",
    ),
    "not a table": (HEAD + "principle = [3]\n", f": principle 1 is int 3; wanted a table with the keys {NEED}, weight"),
    "missing key": (
        HEAD + principle() + principle("b", revision=None),
        f": principle 2 ('b'): key 'revision' is missing; wanted {NEED}",
    ),
    "no id": (HEAD + principle(None), f": principle 1: key 'id' is missing; wanted {NEED}"),
    "unknown key": (
        HEAD + principle() + 'critic = "x"\n',
        f": principle 1 ('a'): unknown key 'critic' (did you mean 'critique'?); keys are {NEED}, weight",
    ),
    "ill-typed": (
        HEAD + principle(critique=None) + 'critique = ["x"]\n',
        ": principle 1 ('a'): critique is a list; wanted text in quotes",
    ),
    "empty": (HEAD + principle(comparison=" \\n "), ": principle 1 ('a'): comparison is empty; wanted text"),
    "bad id": (
        HEAD + principle("aB"),
        ": principle 1 ('aB'): bad id; wanted lower-case letters, digits, '_', '.' and '-' only",
    ),
    "id twice": (
        HEAD + principle("a") + principle("b") + principle("a"),
        ": principle 3 ('a'): this id is already that of principle 1; wanted a new one",
    ),
    "reserved id": (
        HEAD + principle("none"),
        ": principle 1 ('none'): this id is the id of the question without a principle; wanted a new one",
    ),
    "weight is text": (
        HEAD + principle() + 'weight = "2"\n',
        ": principle 1 ('a'): weight is str '2'; wanted a number above 0, as 2.0 for twice as often as others",
    ),
    "weight is nothing": (
        HEAD + principle() + "weight = 0\n",
        ": principle 1 ('a'): weight is int 0; wanted a number above 0, as 2.0 for twice as often as others",
    ),
    "priority is text": (
        'priority = "care"\n' + HEAD + principle(),
        ": priority is str 'care'; wanted a list of categories and ids, the highest first",
    ),
    "unknown priority": (
        'priority = ["cares"]\n' + HEAD + principle(),
        ": priority 1, 'cares': no category or id is called so (did you mean 'care'?)",
    ),
    "priority that is not reached": (
        'priority = ["care", "a"]\n' + HEAD + principle(),
        ": priority 2, 'a': never reached, what it names stands before it",
    ),
    "templates is text": (
        'templates = "x"\n' + HEAD + principle(),
        ": templates is str 'x'; wanted a table headed [templates]",
    ),
    "ill-typed template": (HEAD + "[templates]\nuser = 1\n" + principle(), ": template 'user' is int 1; wanted text in quotes"),
    "unknown template": (
        HEAD + '[templates]\ncritiques = "x"\n' + principle(),
        ": unknown template 'critiques' (did you mean 'critique'?); templates are " + ", ".join(TEMPLATES),
    ),
    "unknown placeholder": (
        HEAD + '[templates]\nuser = "{text} {name}"\n' + principle(),
        ": template 'user' has the unknown placeholder {name}; it may use {text}",
    ),
    "missing placeholder": (
        HEAD + '[templates]\ncomparison = "{conversation} {question} {a}"\n' + principle(),
        ": template 'comparison' lacks the placeholder {b}; it needs {a}, {b}, {conversation}, {question}",
    ),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD.keys())
def test_refuses_a_bad_file_and_says_where_and_why(tmp_path, text, message):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'c.toml') + message)}$"):
        read(tmp_path, text)


@pytest.mark.parametrize("line", ["[[principle]", 'name = "y"', 'id = "x', "id = x"])
def test_malformed_toml_names_the_file_and_the_line(tmp_path, line):
    path = write(tmp_path, HEAD + line + "\n")
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: not valid TOML: .+ \(at line 3, column \d+\)$"):
        load(path, templates=TEMPLATES)


def test_refuses_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path):
        words = f"{re.escape(str(path))} is a folder, .*" if path == tmp_path else f"missing file: {re.escape(str(path))}"
        with pytest.raises(InputError, match=f"^{words}; wanted a TOML file"):
            load(path, templates=TEMPLATES)
        with pytest.raises(InputError, match=f"^{words}"):
            load_few_shot(path)


def test_exclude_drops_principles_and_whole_categories(tmp_path):
    text = HEAD + principle("a", "care") + principle("b", "truth") + principle("c", "care")
    assert [p.id for p in read(tmp_path, text, ("care",)).principles] == ["b"]
    assert [p.id for p in read(tmp_path, text, ("a", "truth")).principles] == ["c"]
    words = (
        r"c\.toml: cannot exclude the unknown 'cares' \(did you mean 'care'\?\); wanted the id .*, or a category: care, truth$"
    )
    with pytest.raises(InputError, match=words):
        read(tmp_path, text, ("cares",))
    with pytest.raises(InputError, match=r"c\.toml: nothing left after excluding care, b; keep at least one principle$"):
        read(tmp_path, text, ("care", "b"))


def test_fingerprint_is_that_of_the_content(tmp_path):
    base = read(tmp_path, HEAD + principle("a") + principle("b")).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", base)
    backwards = ["[[principle]]\n" + "\n".join(reversed(p.splitlines()[1:])) + "\n" for p in map(principle, "ab")]
    same = {
        "comments and layout": HEAD + "# why\n\n" + principle("a").replace(" = ", "=") + "\n" + principle("b"),
        "key order": HEAD + "".join(backwards),
        "outer space": HEAD + principle("a", critique="C?\\n") + principle("b"),
        "principle order": HEAD + principle("b") + principle("a"),
        "labels": 'name = "other"\nversion = "2"\n' + principle("a") + principle("b"),
        "a template equal to the default": HEAD + '[templates]\nreply = "\\n\\nAssistant:"\n' + principle("a") + principle("b"),
    }
    other = {
        "text": HEAD + principle("a", critique="C!") + principle("b"),
        "category": HEAD + principle("a", "truth") + principle("b"),
        "id": HEAD + principle("a") + principle("c"),
        "fewer": HEAD + principle("a"),
        "texts exchanged": HEAD + principle("a", critique="R!", revision="C?") + principle("b"),
        "template": HEAD + '[templates]\nreply = "\\n\\nBot:"\n' + principle("a") + principle("b"),
    }
    for what, text in same.items():
        (tmp_path / what).mkdir()
        assert read(tmp_path / what, text).fingerprint == base, what
    changed = [read(tmp_path, text).fingerprint for text in other.values()]
    assert len({base, *changed}) == 1 + len(other)


def test_fingerprint_covers_what_is_in_force(tmp_path):
    text = HEAD + principle("a", "care")
    whole = read(tmp_path, text)
    assert read(tmp_path, text + principle("b", "truth"), ("truth",)).fingerprint == whole.fingerprint
    assert load(tmp_path / "c.toml", templates=TEMPLATES | {"reply": "\n\nBot:"}).fingerprint != whole.fingerprint


def test_a_fingerprint_is_the_same_on_every_machine(tmp_path):
    text = HEAD + principle(critique="Is \u201cthis\u201d \u00e9thical?")
    got = load(write(tmp_path, text), templates={"reply": "\n\nAssistant:"})
    assert got.fingerprint == "52ccece530efed43389bf9acaf1fffdf14dc35420805b4fe65977515d47204e2"


def test_sample_is_a_pure_function_of_its_address():
    c = many(16)
    draws = [sample(c, 7, "critique", f"r{i}", 0) for i in range(50)]
    again = [sample(c, 7, "critique", f"r{i}", 0) for i in reversed(range(50))]
    assert draws == again[::-1]
    ids = [p.id for i in range(8) for p in sample(c, 7, "critique", "r0", i)]
    assert ids == ["p9", "p9", "p15", "p9", "p13", "p2", "p8", "p2"]


def test_sample_does_not_depend_on_the_order_of_the_file():
    c = many(16)
    mixed = replace(c, principles=c.principles[::-1])
    assert all(sample(c, i, k=4) == sample(mixed, i, k=4) for i in range(50))


def test_every_part_of_the_address_counts_and_parts_do_not_run_together():
    c = many(1000)
    addresses = [(0, "s", "r", 1), (1, "s", "r", 1), (0, "t", "r", 1), (0, "s", "q", 1), (0, "s", "r", 2), (0, "s", "r")]
    addresses += [("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (1, 1), (11,)]
    assert len({sample(c, *a)[0].id for a in addresses}) == len(addresses)
    assert sample(c, np.int64(1)) == sample(c, 1)


def chi_square(counts):
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_sample_is_uniform_and_rounds_are_independent():
    c = many(16)
    draws = np.array([[int(sample(c, 0, "critique", f"r{i}", n)[0].id[1:]) for n in (0, 1)] for i in range(6400)])
    # 99.9 % points of chi-square: 37.7 with 15 degrees of freedom, 330.5 with 255.
    assert max(chi_square(np.bincount(drawn, minlength=16)) for drawn in draws.T) < 37.7
    assert chi_square(np.bincount(draws[:, 0] * 16 + draws[:, 1], minlength=256)) < 330.5


def test_k_principles_are_distinct_and_their_order_is_uniform():
    c = many(4)
    draws = [tuple(p.id for p in sample(c, 0, i, k=3)) for i in range(4800)]
    assert all(len(set(d)) == 3 for d in draws)
    kinds, counts = np.unique([".".join(d) for d in draws], return_counts=True)
    assert len(kinds) == 24 and chi_square(counts) < 49.7  # 99.9 % point with 23 degrees of freedom
    assert [d[:1] for d in draws[:50]] == [tuple(p.id for p in sample(c, 0, i)) for i in range(50)]


def test_weights_are_odds_and_those_of_one_leave_the_draw_as_it_was():
    c = many(4)
    heavy = replace(c, principles=(replace(c.principles[0], weight=3.0), *c.principles[1:]))
    draws = [tuple(p.id for p in sample(heavy, 0, i, k=2)) for i in range(6000)]
    weight = {"p0": 3, "p1": 1, "p2": 1, "p3": 1}  # the second in proportion among those left
    odds = {(a, b): weight[a] / 6 * weight[b] / (6 - weight[a]) for a in weight for b in weight if a != b}
    counts = {key: draws.count(key) for key in odds}
    expected = {key: 6000 * share for key, share in odds.items()}
    assert sum((counts[k] - expected[k]) ** 2 / expected[k] for k in odds) < 31.3  # 99.9 % point, 11 degrees of freedom
    moved = [(sample(c, 0, i)[0].id, sample(heavy, 0, i)[0].id) for i in range(500)]
    assert all(after in (before, "p0") for before, after in moved) and any(a != b for a, b in moved)


def test_weight_and_priority_are_read_ranked_and_part_of_the_fingerprint(tmp_path):
    text = HEAD + principle("a", "care") + principle("b", "truth") + principle("c", "truth") + principle("d", "form")
    plain = read(tmp_path, text)
    got = read(tmp_path, 'priority = ["c", "care", "truth"]\n' + text + "weight = 2\n")
    assert [p.weight for p in got.principles] == [1.0, 1.0, 1.0, 2.0]
    assert [rank(got, p) for p in got.principles] == [1, 2, 0, 3] and {rank(plain, p) for p in plain.principles} == {0}
    marks = [
        read(tmp_path, top + text + end).fingerprint for top in ("", 'priority = ["care"]\n') for end in ("", "weight = 2\n")
    ]
    assert len(set(marks)) == 4 and marks[0] == plain.fingerprint == read(tmp_path, text + "weight = 1\n").fingerprint
    assert read(tmp_path, 'priority = ["care", "truth"]\n' + text, ("care",)).priority == ("truth",)


def test_leaving_a_category_out_redraws_only_what_had_drawn_from_it():
    c = many(16)
    less = replace(c, principles=tuple(p for p in c.principles if p.category != "c0"))
    pairs = [(sample(c, i)[0], sample(less, i)[0]) for i in range(400)]
    assert all(before == after for before, after in pairs if before.category != "c0")
    assert sum(before.category == "c0" for before, _ in pairs) > 50


def test_sample_refuses_what_it_cannot_draw():
    c = many(4)
    assert {p.id for p in sample(c, 0, k=4)} == {"p0", "p1", "p2", "p3"}
    for k in (0, 5):
        with pytest.raises(InputError, match=f"^cannot draw {k} distinct .* 'many'; wanted 1 <= k <= 4$"):
            sample(c, 0, k=k)
    with pytest.raises(ValueError, match="empty address"):
        sample(c)
    with pytest.raises(TypeError):
        sample(c, 0.5)


FEW = (
    '[[critique]]\nuser = "Q"\nresponse = "A"\n'
    'critique_request = "CR"\ncritique = "C"\nrevision_request = "RR"\nrevision = "R"\n'
    '[[comparison]]\nuser = "Q"\na = "x"\nb = "y"\nbetter = "B"\n'
)
BAD_FEW = {
    "none": ("", ": no [[critique]] table; wanted one or more"),
    "no comparison": (FEW[: FEW.index("[[comp")], ": no [[comparison]] table; wanted one or more"),
    "unknown table": (
        FEW + "[[critics]]\n",
        ": unknown key 'critics' (did you mean 'critique'?); keys are critique, comparison",
    ),
    "missing": (
        FEW.replace('response = "A"\n', ""),
        ": critique 1: key 'response' is missing; "
        "wanted user, response, critique_request, critique, revision_request, revision",
    ),
    "empty": (FEW.replace('"R"', '""'), ": critique 1: revision is empty; wanted text"),
    "ill-typed": (FEW.replace('"y"', "2"), ": comparison 1: b is int 2; wanted text in quotes"),
    "unknown key": (FEW + 'c = "z"\n', ": comparison 1: unknown key 'c'; keys are user, a, b, better"),
    "better": (FEW.replace('"B"', '"(B)"'), ": comparison 1: better is '(B)'; wanted 'A' or 'B'"),
}


@pytest.mark.parametrize("text, message", BAD_FEW.values(), ids=BAD_FEW.keys())
def test_refuses_bad_few_shot_blocks(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + message)}$"):
        load_few_shot(path)


def test_few_shot_blocks_and_their_fingerprint(tmp_path):
    got = load_few_shot(write(tmp_path, FEW))
    assert got.critiques == (CritiqueBlock("Q", "A", "CR", "C", "RR", "R"),)
    assert got.comparisons == (ComparisonBlock("Q", "x", "y", "B"),)
    assert load_few_shot(write(tmp_path, "# note\n" + FEW, "b.toml")).fingerprint == got.fingerprint
    assert load_few_shot(write(tmp_path, FEW.replace('"B"', '"A"'))).fingerprint != got.fingerprint


def test_the_harmless_constitution():
    c = load(ROOT / "constitutions/harmless.toml", templates=TEMPLATES)
    assert len(c.principles) == 16 and len({p.category for p in c.principles}) == 8
    for use in ("critique", "revision", "comparison"):
        texts = [getattr(p, use) for p in c.principles]
        assert len(set(texts)) == 16
        assert not any(re.search(r"Options:|Human:|Assistant:|\n", text) for text in texts)
    assert all(p.comparison.endswith("?") for p in c.principles)


def test_the_few_shot_file():
    few = load_few_shot(ROOT / "constitutions/few_shot.toml")
    assert len(few.critiques) == 3 and len(few.comparisons) == 4
    assert sum(b.response == b.revision for b in few.critiques) == 1
    assert sorted(b.better for b in few.comparisons) == ["A", "A", "B", "B"]  # no lesson in a position
