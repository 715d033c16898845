"""Studies: what variants are, what of a run's results a claim may speak of, and that all seeds run and are put together."""

import dataclasses
import importlib.util
import json
import re
import shlex

import pytest
from test_readme import ROOT, TEXT

from cai_jax import checks, outcomes, records, study
from cai_jax.config import default
from cai_jax.data import load_prompts
from cai_jax.errors import InputError
from cai_jax.evals import claims
from cai_jax.evals.claims import Side
from cai_jax.evaluation import verdict
from cai_jax.sections import changed
from cai_jax.workdir import write_json

SL = "stages=('critique','sft','evaluate')"


def config_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def config(*variants, claims=(), **keys):
    cfg = default()
    cfg.study.update(variants=variants, claims=claims, **keys)
    return checks.resolve(cfg)


# Variants


def test_a_variant_is_its_overrides_and_nothing_else():
    cfg = config("plain", f"four {SL} critique.rounds=4 --config.ppo.kl_coef=1", "direct critique.direct=True", seeds=3)
    found = study.variants(cfg)
    assert list(found) == ["plain", "four", "direct"]
    plain = dataclasses.replace(cfg, study=type(cfg.study)())
    assert found["plain"] == plain and found["direct"] == changed(plain, "critique.direct", "True")
    four = found["four"]
    assert (four.stages, four.critique.rounds, four.ppo.kl_coef) == (("critique", "sft", "evaluate"), 4, 1.0)
    assert dataclasses.replace(four, stages=plain.stages, critique=plain.critique, ppo=plain.ppo) == plain


@pytest.mark.parametrize(
    "variants, words",
    [
        (("a", "a"), "wanted a name of its own"),
        (("../a",), "wanted a name of its own"),
        (("",), "wanted a name"),
        (("a critique.rounds",), "wanted KEY=VALUE"),
        (("a study.seeds=3",), "not of seed or a key of study"),
        (("a seed=3",), "not of seed or a key of study"),
        (("a critique.round=3",), "unknown configuration key 'critique.round'; did you mean critique.rounds?"),
        (("a critique=3",), "unknown configuration key 'critique'"),
        (("a critique.rounds.x=3",), "unknown configuration key"),
        (("a critique.rounds=two",), "critique.rounds='two': wanted a int"),
        (("a critique.rounds=1.5",), "wanted a int"),
        (("a critique.rounds=True",), "wanted a int"),
        (("a critique.direct=__import__('os')",), "wanted a bool"),
        (("a critique.rounds=-1",), "'a critique.rounds=-1': --config.critique.rounds=-1: wanted zero or more"),
        (("a", "b stages=('ppo',)"), "which ppo reads"),
    ],
)
def test_a_variant_that_cannot_be_is_named_before_anything_runs(tmp_path, variants, words):
    def run(*_):
        raise AssertionError

    with pytest.raises(InputError) as error:
        study.run(config(*variants), tmp_path, run)
    assert "--config.study.variants" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "claim, words",
    [
        ("x: harms sl_cai > harm base", "'harms' is not there; wanted one of coherent, evasive"),
        ("x: harm dpo_cai > harm base", "'dpo_cai' is not there; wanted one of base, base-greedy"),
        ("x: harm revision-3 > harm base", "'revision-3' is not there"),
        ("x: flip-rate run @ sl > harm base", "'flip-rate' is not there; wanted one of diversity, drop-1, drop-2"),
        ("x: harm best_of_4 > harm base", "'best_of_4' is not there"),
        ("x: harm eroded-25 > harm base", "'eroded-25' is not there"),
        ("x: drop-1 run @ cut > harm base", "'drop-1' is not there; wanted one of diversity"),
        ("x: harm rl_cai @ sl > harm base", "'rl_cai' is not there"),
    ],
)
def test_a_claim_about_what_no_run_has_is_refused_before_anything_runs(tmp_path, claim, words):
    with pytest.raises(InputError) as error:
        study.run(config("plain", f"sl {SL}", "cut stages=('critique',)", claims=(claim,)), tmp_path, None)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "keys, words",
    [({"seeds": 0}, "study.seeds=0"), ({"claims": ("x",)}, "study.variants too"), ({"variants": (1,)}, "texts in quotes")],
)
def test_a_study_that_cannot_be_names_its_flag(keys, words):
    cfg = default()
    cfg.study.update(**keys)
    with pytest.raises(checks.ConfigError, match=words.replace("(", "\\(")):
        checks.resolve(cfg)


# Results

PROMPTS = load_prompts(default().evaluate.heldout, 0, "x")
HARMFUL = [p for p in PROMPTS if p["kind"] == "harmful"][:20]
NO = "Let us talk about something else."


def fake(ran, refuses):
    """A run whose models refuse, evasively, a share of the harmful prompts: refuses(config) of sl_cai, none of the base's."""

    def run(cfg, folder):
        ran.append(folder.name)
        rows = []
        for model in ("base", "sl_cai"):
            for n, p in enumerate(HARMFUL):
                said = NO if model == "sl_cai" and n < refuses(cfg) else "First."
                harm = {"harm": 0 if said == NO else 4}
                for mode in ("sampled", "greedy"):
                    seen = dataclasses.asdict(verdict(p, said)) | harm
                    rows.append(p | {"model": model, "set": "heldout", "mode": mode, "verdict": seen})
                rows.append(rows[-1] | {"set": "redteam", "id": f"red {p['id']}", "verdict": rows[-1]["verdict"] | {"harm": 3}})
        (folder / "evaluate").mkdir(parents=True, exist_ok=True)
        (folder / "critique").mkdir(exist_ok=True)
        records.write(folder / "evaluate/transcripts.jsonl", rows)
        spent = {"start": {"mean": 1.5 + 0.1 * cfg.seed, "interval": None}}
        write_json(folder / "evaluate/results.json", {"models": {"base": {}, "sl_cai": {"kl": spent}}})
        write_json(folder / "evaluate/rounds.json", {"harm_rate": [1.0, 0.4, 0.3][: cfg.critique.rounds + 1]})
        turns = [[{"revision": NO}, {"revision": "First. Then." if n % 2 else NO}] for n in range(len(HARMFUL))]
        revised = [p | {"response": "First.", "rounds": said} for p, said in zip(HARMFUL, turns, strict=True)]
        records.write(folder / "critique/revisions.jsonl", revised)

    return run


def test_all_variants_run_at_all_seeds_and_claims_are_decided(tmp_path, capsys):
    texts = (
        "refusing helps: harm sl_cai < harm base",
        "fewer rounds are worse: harm sl_cai @ one > harm sl_cai",
        "all evade: evasive sl_cai ~0.05 evasive sl_cai @ one",
        "greedy is the same: harm sl_cai-greedy ~0.01 harm sl_cai",
        "less each time: drop-1 run > drop-2 run",
        "fraud is left: harm.fraud sl_cai > harm.fraud base",
        "of nothing: help sl_cai > harm base",
        "not there: drop-2 run @ one > drop-1 run",
    )
    cfg = dataclasses.replace(config(f"two {SL}", f"one {SL} critique.rounds=1", claims=texts, seeds=2), seed=5)
    ran = []
    study.run(cfg, tmp_path, fake(ran, lambda c: 16 if c.critique.rounds == 2 else 8 + c.seed % 2))
    assert ran == ["two-5", "one-5", "two-6", "one-6"]
    found = json.loads((tmp_path / "study.json").read_text())
    decided = {c["text"]: c["found"] for c in found["claims"]}
    assert [of["verdict"] for of in decided.values()] == [
        "reproduced", "reproduced", "not reproduced", "reproduced", "reproduced", "not reproduced", "unclear", "unclear"
    ]  # fmt: skip
    assert decided["not there"]["difference"] is None and "| no such answers | unclear |" in (tmp_path / "study.md").read_text()
    assert decided["refusing helps"]["difference"] == pytest.approx(-0.8) and decided["refusing helps"]["prompts"] == 20
    assert decided["fewer rounds are worse"]["difference"] == pytest.approx((7 + 8) / 2 / 20)
    less = decided["less each time"]
    assert (less["left"], less["right"]) == pytest.approx((0.6, 0.1)) and less["seeds"] == 2
    rows = {(r["variant"], r["who"]): r for r in found["answers"]}
    assert rows["one", "sl_cai"]["harm"] == pytest.approx([11 / 20, 12 / 20]) and rows["two", "base"]["help"] == []
    assert (
        rows["two", "revision-1"]["evasive"] == [1.0, 1.0] != rows["two", "revision-2"]["evasive"]
        and ("two", "sl_cai-greedy") not in rows
    )
    assert found["run"]["two"][0]["diversity"] == 2 / 20 and found["seeds"] == [5, 6]
    page, said = (tmp_path / "study.md").read_text(), capsys.readouterr().err
    assert page.count("| base |") == 2 and page.count("| sl_cai |") == 4  # the base, the same in both, once a table
    assert rows["two", "sl_cai"]["kl"] == [2.0, 2.1] and found["run"]["one"][1]["kl"] == 2.1
    assert (
        "| one | sl_cai | 57.5 ± 31.8 |" in page
        and "| 2.05 ± 0.64 |" in page
        and "| refusing helps | harm sl_cai @ two < harm base @ two |" in page
    )
    table = page.split("\n\n")[1].splitlines()  # that of the journal paper
    categories = sorted({p["category"] for p in HARMFUL})
    assert table[0] == f"| variant | model | {' | '.join(categories)} | mean | labels by AI | by people | minutes |"
    assert [line.split(" | ")[:2] for line in table[2:]] == [["| two", "base"], ["| two", "sl_cai"], ["| one", "sl_cai"]]
    assert table[2].split(" | ")[2 + len(categories)] == "1.00" and table[3].split(" | ")[2 + len(categories)] == "4.20"
    assert "not reproduced: all evade" in said and "one, seed 6 (4 of 4)" in said


def test_a_run_that_cannot_be_keeps_no_other_from_running(tmp_path):
    claims_ = ("a: harm sl_cai < harm base", "b: harm sl_cai @ bad < harm base")
    cfg = config(f"two {SL}", f"bad {SL} critique.rounds=1", f"last {SL} critique.rounds=3", claims=claims_, seeds=2)
    ran = []
    good = fake(ran, lambda c: 10)

    def run(of, folder):
        if of.critique.rounds == 1:
            raise (checks.ConfigError if of.seed else InputError)("nothing to compare")
        good(of, folder)

    with pytest.raises(InputError, match="(?s)bad, seed 0: nothing to compare.*bad, seed 1: nothing"):
        study.run(cfg, tmp_path, run)
    assert ran == ["two-0", "last-0", "two-1", "last-1"]
    found = json.loads((tmp_path / "study.json").read_text())
    assert [c["found"]["verdict"] for c in found["claims"]] == ["reproduced", "unclear"]
    assert {r["variant"] for r in found["answers"]} == {"two", "last"}


def test_what_a_side_is_of():
    rows = [(p["id"], p["kind"], p["category"], {"harm": 2, "explained": True, "helpful": 0.5}) for p in PROMPTS[:200]]
    of = {"answers": {"rl_cai": rows}, outcomes.RUN: {"kl": 0.7}}
    harmful = [r for r in rows if r[1] == "harmful"]
    assert outcomes.values(Side("harm", "rl_cai", ""), of) == {r[0]: 1.0 for r in harmful}
    assert outcomes.values(Side("harm-score", "rl_cai", ""), of) == {r[0]: 2.0 for r in harmful}
    assert outcomes.values(Side("help", "rl_cai", ""), of) == {r[0]: 0.5 for r in rows if r[1] == "benign"}
    assert outcomes.values(Side("explained.fraud", "rl_cai", ""), of) == {r[0]: 1.0 for r in harmful if r[2] == "fraud"}
    assert outcomes.values(Side("kl", outcomes.RUN, ""), of) == {outcomes.RUN: 0.7}
    told = {
        "answers": {
            "x": [("a", "harmful", "", {"harm": 4, "kind": "full"}), ("b", "harmful", "", {"harm": 2, "kind": "partial"})]
        }
    }
    told["answers"]["x"].append(("c", "harmful", "", {"harm": 0, "kind": "explained"}))
    assert outcomes.values(Side("partial-of-harm", "x", ""), told) == {"a": 0.0, "b": 1.0}
    rough = [("a", "harmful", "any", {"harm": 3.5}), ("b", "harmful", "any", {"harm": 0.5})]  # by the regressor of harm
    told = {"answers": {"rl_cai/direct": rough}, outcomes.RUN: {}}
    assert outcomes.values(Side("harm", "rl_cai/direct", ""), told) == {"a": 1.0, "b": 0.0}
    for metric in set(outcomes.OF_ANSWERS) - {"harm", "harm-score"}:
        assert outcomes.values(Side(metric, "rl_cai/direct", ""), told) == {}
    assert outcomes.values(Side("harm.frauds", "rl_cai", ""), of) == {} == outcomes.values(Side("drop-1", outcomes.RUN, ""), of)


# The findings


def test_the_findings_are_a_study_that_can_run():
    cfg = checks.resolve(config_of("findings"))
    todo = study.variants(cfg)
    for claim in (claims.parse(line, list(todo)) for line in cfg.study.claims):
        for side in (claim.left, claim.right):
            outcomes.check_side(side, todo[side.variant])
    first = next(iter(todo.values()))
    assert first == checks.resolve(default()) and cfg.study.seeds >= 5 and len(set(todo.values())) == len(todo)


COMMANDS = re.findall(r"^cai run .*?--config.study(?:.*\\\n)*.*$", TEXT.replace("\\\n ", ""), re.M)


def test_the_study_of_the_readme_can_run():
    (command,) = COMMANDS
    of = checks.resolve(default())
    for word in shlex.split(command):
        if word.startswith("--config."):
            key, _, text = word.removeprefix("--config.").partition("=")
            of = changed(of, key, text)
    todo = study.variants(of)
    found = [claims.parse(line, list(todo)) for line in of.study.claims]
    assert len(todo) == 2 and of.study.seeds == 3 and found[0].left == Side("harm", "sl_cai", "four")
    outcomes.check_side(found[0].left, todo["four"])


def test_the_overrides_of_the_readme_are_those_of_the_findings():
    """Each row of the table is a variant, but for the page that a study does not need."""
    rows = TEXT.split("| question | override |")[1].split("\n\n")[0].split("\n")[2:]
    todo = study.variants(checks.resolve(config_of("findings")))
    for row in rows:
        of = checks.resolve(default())
        for override in shlex.split(re.search(r"`(--.*?)`", row)[1]):
            key, _, text = override.removeprefix("--config.").partition("=")
            of = changed(of, key, text.replace(",'report')", ")"))
        assert any(close(of, v) for v in todo.values()), row


def close(a, b):
    """The same but for the stages behind the supervised one, of which some variants have no need, and for how many rounds."""
    plain = default_stages(a)
    return plain == default_stages(b) and set(b.stages) <= {*a.stages, "evaluate"}


def default_stages(cfg):
    rounds = dataclasses.replace(cfg.critique, rounds=2)
    return dataclasses.replace(cfg, stages=(), critique=rounds)
