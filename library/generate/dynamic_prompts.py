r"""Dynamic prompts: {a|b} stands for one of its variants, drawn anew for each picture.

    {[E$$][count$$][separator$$]variant|variant|...}

"E" or "e" asks for a picture of every combination instead of a drawn one. A count "n" or "n-m" says how many different
variants are taken at once; they are joined by the separator, which is ", " where none is given. Groups nest, variants
may be empty and may hold options of the line, and \{ and \} are braces as text. A brace without its partner is text.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from library.options import OptionError, require

SEPARATOR = ", "
MOST_COMBINATIONS = 10_000
DEEPEST = 50  # groups inside each other
# the beginning of a group: what stands before "$$" is no variant
HEADER = re.compile(r"(?:\s*([Ee])\s*\$\$)?(?:\s*(\d+)\s*(?:-\s*(\d+)\s*)?\$\$)?(?:((?:(?!\$\$)[^{}])*)\$\$)?")
TOKEN = re.compile(r"\\[\\{}]|[{}|]|[^\\{}|]+|\\")
ESCAPED = {r"\{": "{", r"\}": "}"}

Sequence = tuple["str | Group", ...]  # a text in which groups stand


@dataclass(frozen=True)
class Group:
    """One pair of braces."""

    variants: tuple[Sequence, ...]
    is_enumerated: bool = False
    least: int = 1  # variants taken at once, 0 <= least <= most <= number of variants
    most: int = 1
    separator: str = SEPARATOR


@dataclass(frozen=True)
class DynamicPrompt:
    """A line as it was written, and what it can become."""

    parts: Sequence

    @property
    def is_dynamic(self) -> bool:
        return any(isinstance(part, Group) for part in self.parts)

    @property
    def is_enumerated(self) -> bool:
        """Whether there is a group of which every combination is asked for."""
        return _has_enumerated(self.parts)

    @property
    def outside(self) -> str:
        """The text outside of all groups."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def drawn(self, draw: random.Random) -> str:
        """One text: each group draws for itself, in the order in which they stand."""
        return _drawn(self.parts, draw)

    def combinations(self, seed: int) -> Iterator[str]:
        """A text for every combination of enumerated groups, the first group's variants changing last.

        The other groups draw from `seed` alike for each of them, so that nothing else differs.
        """
        return (_drawn(parts, random.Random(seed)) for parts in _enumerated(self.parts))

    @property
    def num_combinations(self) -> int:
        return _count(self.parts)


def parse_dynamic_prompt(line: str, where: str) -> DynamicPrompt:
    """Find a line's groups. OptionError, which names `where`, for groups that nest too deep or enumerate too much."""
    levels: list[_Level] = [_Level()]
    position = 0
    while match := TOKEN.match(line, position):
        token, level = match.group(), levels[-1]
        position = match.end()
        if token == "{":
            header = HEADER.match(line, position)
            assert header is not None  # all of it is optional
            levels.append(_Level(header))
            position = header.end()
            require(len(levels) <= DEEPEST + 1, where, f"its braces nest deeper than {DEEPEST}")
        elif token == "}" and len(levels) > 1:
            levels.pop()
            levels[-1].add(level.group())
        elif token == "|" and len(levels) > 1:
            level.variants.append([])
        else:
            level.add(ESCAPED.get(token, token))
    whole, *left_open = levels
    for level in left_open:
        whole.variants[0] += level.as_text()
    prompt = DynamicPrompt(_joined(whole.variants[0]))
    _check_combinations(prompt, where)
    return prompt


def _check_combinations(prompt: DynamicPrompt, where: str) -> None:
    number = prompt.num_combinations
    if number > MOST_COMBINATIONS:
        shown = f"{number}" if number < 10**9 else f"10^{math.floor(math.log10(number))}"
        problem = f"its braces enumerate {shown} combinations"
        raise OptionError(where, problem, f"{MOST_COMBINATIONS} is the limit; leave out an E$$, and one is drawn")


class _Level:
    """A group that is being read; the lowest level is the line itself, whose only variant is the text."""

    def __init__(self, header: re.Match[str] | None = None) -> None:
        self.header = header
        self.variants: list[list[str | Group]] = [[]]

    def add(self, part: str | Group) -> None:
        self.variants[-1].append(part)

    def group(self) -> Group:
        assert self.header is not None
        enumerated, first, second, separator = self.header.groups()
        counts = sorted(int(count) for count in (first or "1", second or first or "1"))
        least, most = (min(count, len(self.variants)) for count in counts)
        return Group(
            variants=tuple(map(_joined, self.variants)),
            is_enumerated=enumerated is not None,
            least=least,
            most=most,
            separator=SEPARATOR if separator is None else separator,
        )

    def as_text(self) -> list[str | Group]:
        """What was taken for a group, but is never closed."""
        assert self.header is not None
        parts: list[str | Group] = ["{" + self.header.group()]
        for index, variant in enumerate(self.variants):
            parts += (["|"] if index else []) + variant
        return parts


def _joined(parts: list[str | Group]) -> Sequence:
    """The same with neighbouring texts as one."""
    runs = itertools.groupby(parts, lambda part: isinstance(part, str))
    joined: list[str | Group] = []
    for is_text, run in runs:
        joined += ["".join(str(part) for part in run)] if is_text else run
    return tuple(joined)


def _drawn(parts: Sequence, draw: random.Random) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        else:
            chosen = draw.sample(part.variants, draw.randint(part.least, part.most))
            texts.append(part.separator.join(_drawn(variant, draw) for variant in chosen))
    return "".join(texts)


def _has_enumerated(parts: Sequence) -> bool:
    groups = [part for part in parts if isinstance(part, Group)]
    return any(group.is_enumerated or any(map(_has_enumerated, group.variants)) for group in groups)


def _enumerated(parts: Sequence) -> Iterator[Sequence]:
    """`parts` for each combination of the enumerated groups in them; what remains is drawn."""
    choices = [[(part,)] if isinstance(part, str) else list(_group_enumerated(part)) for part in parts]
    return (sum(combination, ()) for combination in itertools.product(*choices))


def _group_enumerated(group: Group) -> Iterator[Sequence]:
    if not group.is_enumerated:  # but there may be some in it
        for variants in itertools.product(*map(_enumerated, group.variants)):
            yield (replace(group, variants=variants),)
        return
    for count in range(group.least, group.most + 1):
        for chosen in itertools.combinations(group.variants, count):
            for variants in itertools.product(*map(_enumerated, chosen)):
                separated = [part for variant in variants for part in (*variant, group.separator)]
                yield tuple(separated[:-1])


def _count(parts: Sequence) -> int:
    """How many combinations `_enumerated` goes through."""
    return math.prod(_group_count(part) for part in parts if isinstance(part, Group))


def _group_count(group: Group) -> int:
    counts = [_count(variant) for variant in group.variants]
    if not group.is_enumerated:
        return math.prod(counts)
    sums = [1] + [0] * group.most  # of the products of k counts, k = 0, 1 ... : elementary symmetric polynomials
    for count in counts:
        for k in range(group.most, 0, -1):
            sums[k] += count * sums[k - 1]
    return sum(sums[group.least :])
