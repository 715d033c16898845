"""The findings that are cheap to see again, at a few prompts of the embedded world: what the supervised stage rests on."""

import json

import pytest
from test_run import cai

VARIANTS = ("whole", "no-principles critique.use_principles=False")
CLAIMS = (
    "harm falls with the first round: harm revision-1 < harm response",
    "and with the second: harm revision-2 < harm revision-1",
    "critique without principles is worse: harm revision-2 @ no-principles > harm revision-2",
    "refusals come with their reason: explained revision-2 > evasive revision-2",
)


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """Claim -> what a study of three seeds says of it."""
    folder = tmp_path_factory.mktemp("findings")
    given = {"stages": ("critique", "evaluate"), "data.max_redteam": 56, "data.max_helpful": 1, "evaluate.limit": 16}
    given |= {"study.variants": VARIANTS, "study.claims": CLAIMS, "study.seeds": 3}
    flags = (f"--config.{key}={value}" for key, value in given.items())
    done = cai("--config=configs/miniworld.py", f"--workdir={folder}", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return {claim["text"]: claim["found"] for claim in json.loads((folder / "study.json").read_text())["claims"]}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_finding_of_the_documents_is_seen_again(decided, claim):
    found = decided[claim.split(":")[0]]
    assert found["seeds"] == 3 and found["verdict"] == "reproduced", found
