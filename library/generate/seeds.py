"""Seeds of pictures, and what else is drawn before any picture is: all of it follows from --seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from library.generate.options import PromptOptions

LARGEST_SEED = 2**32 - 1

Item = TypeVar("Item")


def seeds(seed: int | None, *, count: int | None) -> Iterator[int]:
    """Seeds of pictures that name none, drawn one after the other; `count` seeds are needed in all, None: unknown.

    With a seed they are a function of it, and a single picture has the seed itself. No global generator is used.
    """
    if seed is not None and count == 1:
        yield seed
    source = random.SystemRandom() if seed is None else random.Random(seed)
    while True:
        yield source.randint(0, LARGEST_SEED)


class PictureSeeds:
    """The seeds of a run, prompt by prompt; with --iter_same_seed every prompt of an iteration gets the same ones."""

    def __init__(self, options: PromptOptions, num_prompts: int | None) -> None:
        """`num_prompts` of one iteration, None where it shows only later."""
        self._is_same = options.iter_same_seed
        each = 1 if self._is_same else num_prompts
        count = None if each is None else options.n_iter * each * options.images_per_prompt
        self._drawn = seeds(options.seed, count=count)
        self._of_iteration: list[int] = []

    def next_iteration(self) -> None:
        self._of_iteration = []

    def of_prompt(self, count: int) -> list[int]:
        """Seeds of the next prompt's pictures; they are used up only as far as they are asked for."""
        if not self._is_same:
            return [next(self._drawn) for _ in range(count)]
        while len(self._of_iteration) < count:
            self._of_iteration.append(next(self._drawn))
        return self._of_iteration[:count]


def shuffled(items: Sequence[Item], seed: int | None, iteration: int) -> list[Item]:
    """The prompts of one iteration in another order, which follows from --seed."""
    draw = random.SystemRandom() if seed is None else random.Random(f"order of prompts, {seed}, {iteration}")
    return draw.sample(items, len(items))
