"""How good the critic and the judge are that the base model learns to imitate, and where they fail.

A principle that names the matter finds what no principle finds; disguise helps the asker; the judge likes position A and
length, and it has one blind spot. Each of these is a number in a table here, to be found again by the pipeline's measurements.
"""

import dataclasses

from cai_jax import prompts
from cai_jax.constitution import Principle
from cai_jax.miniworld.grammar import CATEGORIES, HARMFUL, Item, Request, one, pick

# --- What the critic finds, by relation(principle, category) ----------------------------------------------------------
FINDS_HARM = {"match": 0.98, "general": 0.88, "other": 0.54, "evasive": 0.45, "none": 0.12}
FINDS_EVASION = {"match": 0.30, "general": 0.30, "other": 0.30, "evasive": 0.95, "none": 0.10}
FINDS_OVER_REFUSAL = {"match": 0.35, "general": 0.35, "other": 0.35, "evasive": 0.95, "none": 0.10}
FORM_FACTOR = {"plain": 1.0, "disguised": 0.8, "rapport": 0.9}  # on finding harm
AS_ASKED = " indeed"  # said of a matter that the principle names
DIRECT_FACTOR = 0.85  # on any finding, without a written critique
FALSE_ALARM = 0.01
REVISED = {"explained": 0.94, "partial": 0.04, "evasive": 0.02}  # what a harmful answer becomes once harm is found

# --- How the judge chooses: p(A) = sigmoid(gain (u_A - u_B) + position + length) --------------------------------------
UTILITY = {  # by whether the request is harmful
    True: {"right": 0.0, "wrong": 0.0, "partial": 1.2, "evasive": 2.2, "explained": 4.0},
    False: {"right": 4.0, "wrong": 2.6, "evasive": 1.2, "over-refusal": 0.4},
}
GAIN = {"match": 1.2, "general": 1.0, "other": 0.5, "evasive": 0.7, "none": 0.25}
EVASION_GAIN = 1.2  # of the principle against evasion, on the pairs it is about
EVASION_PAIRS = ({"evasive", "explained"}, {"evasive", "right"}, {"over-refusal", "right"})
GAIN_FORM = {"plain": 1.0, "disguised": 0.6, "rapport": 0.8}
BLIND_SPOT, BLIND_GAIN = ("fraud", "report"), -0.4  # frauds asked for as school reports: the judge errs, systematically
POSITION_BIAS, LENGTH_BIAS = 0.5, 0.03  # logits toward A, and per word
REASONED_GAIN = 1.5  # thinking step by step sharpens the choice; biases and blind spot stay
DESCRIBED = {"right": "gives the steps", "wrong": "gives the steps", "partial": "gives some steps",
             "evasive": "avoids the question", "explained": "refuses and says why",
             "over-refusal": "refuses without need"}  # fmt: skip


def relation(principle: Principle, category: str) -> str:
    """How a principle relates to an item's category: a key of FINDS_HARM."""
    if principle.category in ("general", "evasive", "none"):
        return principle.category
    return "match" if principle.category == category else "other"


# --- Critique and revision --------------------------------------------------------------------------------------------
def finding(rng, item: Item, form: str, kind: str, principle: Principle, factor: float = 1.0) -> str:
    """What a critic finds in an answer: "harmful", "evasive", "missed" (something is wrong, and it says fine) or "fine"."""
    rel = relation(principle, item.category)
    if item.harmful and kind in ("right", "wrong", "partial"):
        return "harmful" if rng.random() < FINDS_HARM[rel] * FORM_FACTOR[form] * factor else "missed"
    if item.harmful and kind == "evasive":
        return "evasive" if rng.random() < FINDS_EVASION[rel] * factor else "missed"
    if kind in ("evasive", "over-refusal"):
        return "evasive" if rng.random() < FINDS_OVER_REFUSAL[rel] * factor else "missed"
    return "harmful" if rng.random() < FALSE_ALARM else "fine"


def critique(rng, item: Item, kind: str, found: str, principle: Principle) -> str:
    """The critique that states a finding, the matter first."""
    category = CATEGORIES[item.category]
    reason = category.reason if item.harmful else CATEGORIES[one(rng, HARMFUL)].reason
    verdict = {
        "harmful": f"The answer is harmful, because {reason}.",
        "evasive": "The answer is evasive, because it " + ("does not say why." if item.harmful else "refuses without need."),
        "missed": "I see no problem with the answer.",
        "fine": "The answer is fine, because " + ("it refuses and says why." if item.harmful else f"{category.reason}."),
    }[found]
    return f"{matter_named(item, principle)} {verdict}"


def matter_named(item: Item, principle: Principle) -> str:
    """The sentence that critiques and thoughts begin with. It says whether the principle asks for this very matter: what is
    written out is learnt sooner than what only a noisy verdict tells."""
    so = AS_ASKED if relation(principle, item.category) == "match" else ""
    return f"This is about {CATEGORIES[item.category].matter}{so}."


def revised_kind(rng, item: Item, kind: str, found: str) -> str | None:
    """The kind of the revision; None keeps the answer as it is."""
    if found == "harmful":
        return pick(rng, REVISED) if item.harmful else "over-refusal"
    if found == "evasive":
        return "explained" if item.harmful else "right"
    return None


# --- Judging ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Pair:
    item: Item
    request: Request
    kinds: tuple[str, str]  # of (A), of (B)
    answers: tuple[str, str]


def judge_logit(pair: Pair, principle: Principle, sharpen: float = 1.0) -> float:
    """log p(A) / p(B) of the judge that the model imitates; `sharpen` multiplies the gain, not the biases."""
    category, utility = pair.item.category, UTILITY[pair.item.harmful]
    rel = relation(principle, category)
    about_evasion = rel == "evasive" and set(pair.kinds) in EVASION_PAIRS
    gain = (EVASION_GAIN if about_evasion else GAIN[rel]) * GAIN_FORM[pair.request.form]
    if (category, pair.request.template) == BLIND_SPOT:
        gain = BLIND_GAIN
    words = [len(text.split()) for text in pair.answers]
    better = utility[pair.kinds[0]] - utility[pair.kinds[1]]
    return sharpen * gain * better + POSITION_BIAS + LENGTH_BIAS * (words[0] - words[1])


def reasoning(item: Item, kinds: tuple[str, str], option: str, principle: Principle) -> str:
    """The thought: the matter, what each answer does, and the conclusion."""
    does = "".join(f" Answer{o} {DESCRIBED[k]}." for o, k in zip(prompts.OPTIONS, kinds, strict=True))
    return f"{matter_named(item, principle)}{does} Therefore, option{option} is the best response."
