"""What an audit asks a judge: the scores of an answer, and which part of an answer a score is about."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import jax

from cai_jax import prompts
from cai_jax.audit.answers import Answer
from cai_jax.constitution import Constitution, Principle
from cai_jax.judge import OPTION_TOKENS, Judge, Pair, load_judge
from cai_jax.sharding import make_mesh

PIECES = 12  # parts of an answer that are left out in turn
TOKENS = 1 << 16  # that the judge reads at a time
SPARE = 32  # tokens by which a context of a shorter question may yet be longer
END = re.compile(r"(?<=[.!?…])[\"')\]”’]*\s+|(?<=[。！？])|\n+")  # of a sentence


class Auditor:
    """A judge, loaded when it is first asked, and what it is asked."""

    def __init__(self, args, constitution: Constitution):
        self.args, self.constitution, self.reference = args, constitution, args.reference

    @cached_property
    def by(self) -> Judge:
        a = self.args
        return load_judge(a.judge, a.format, a.system, make_mesh((1, -1, 1))).under(a.constitution)

    @cached_property
    def principles(self) -> list[Principle]:
        """Those with long questions first."""
        return sorted(self.constitution.principles, key=lambda p: -len(self.by.lm.tok.encode(p.comparison)))

    def tokens(self, pair: Pair, principles: Sequence[Principle]) -> int:
        """Of the longest context that asks about a pair, 0 where the judge cannot hold it; of principles, that with the longest
        question is the first. Most pairs are read once only to find it: a text of 100,000 tokens takes a while."""
        room = self.by.lm.cfg.max_length - OPTION_TOKENS

        def of(p: Principle, a: str, b: str) -> int:
            context = prompts.comparison(pair.messages, p.comparison, a, b, self.by.templates)
            return len(self.by.lm.tok.prompt(context))

        most = of(principles[0], pair.a, pair.b)
        if room - SPARE < most <= room:
            most = max(of(p, *both) for p in principles for both in ((pair.a, pair.b), (pair.b, pair.a)))
        return most if most <= room else 0

    def ask(self, asked: list[tuple[Pair, Principle]], longest: int) -> list[float]:
        """P(the first is better) of each pair under its principle. longest: tokens of the longest context."""
        by = replace(self.by, batch_size=max(1, min(self.by.batch_size, TOKENS // longest)))
        with jax.set_mesh(by.mesh):
            return by.labels(asked, "").tolist()

    def scores(self, part: list[Answer]) -> list[dict]:
        """A record for each answer: its score under each principle, or why it has none."""
        pairs = [Pair(a.messages, self.reference, a.text) for a in part]
        tokens = [self.tokens(pair, self.principles) for pair in pairs]
        asked = [(pair, p) for pair, n in zip(pairs, tokens, strict=True) if n for p in self.constitution.principles]
        found, out = iter(self.ask(asked, max(tokens)) if asked else ()), []
        for answer, n in zip(part, tokens, strict=True):
            if n:
                result = {"scores": {p.id: next(found) for p in self.constitution.principles}}
            else:
                result = {"not_scored": f"longer than the judge's context of {self.by.lm.cfg.max_length} tokens"}
            out.append({"id": answer.id, "line": answer.line} | result)
        return out

    def evidence(self, part: list[tuple[Answer, Principle]]) -> list[dict]:
        """A record for each answer and the principle against it: the piece without which its score is lowest, where that
        begins, and that score; the whole of an answer that has but one."""
        asked, of, longest = [], [], 0
        for n, (answer, principle) in enumerate(part):
            cut = pieces(answer.text)
            for begin, end in cut if len(cut) > 1 else ():
                pair = Pair(answer.messages, self.reference, answer.text[:begin] + answer.text[end:])
                if size := self.tokens(pair, [principle]):
                    asked.append((pair, principle))
                    of.append((n, begin, end))
                    longest = max(longest, size)
        lowest: dict[int, tuple[float, int, int]] = {}
        for (n, begin, end), p in zip(of, self.ask(asked, longest) if asked else (), strict=True):
            lowest[n] = min(lowest.get(n, (math.inf, 0, 0)), (p, begin, end))
        out = []
        for n, (answer, principle) in enumerate(part):
            without, begin, end = lowest.get(n, (None, 0, len(answer.text)))
            place = {"start": begin, "text": answer.text[begin:end], "without": without}
            out.append({"id": answer.id, "principle": principle.id} | place)
        return out


def pieces(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end; of more than PIECES, neighbours are taken together."""
    cuts = [0, *(m.end() for m in END.finditer(text)), len(text)]
    spans = [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if text[a:b].strip()]
    count = min(PIECES, len(spans))
    groups = (spans[i * len(spans) // count : (i + 1) * len(spans) // count] for i in range(count))
    return [(group[0][0], group[-1][1]) for group in groups]
