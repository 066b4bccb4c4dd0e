"""Requests: one picture's full specification, their seeds, and which of them are computed together."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from library.diffusion.samplers import SAMPLERS
from library.generate.options import PictureOptions, PromptOptions, check_seed, check_size
from library.generate.prompt_line import PromptLine
from library.options import require
from library.text.prompt_weights import LARGEST_EMPHASIS, parse_prompt_weights

logger = logging.getLogger(__name__)

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class GenerationRequest:
    """One picture. Equal requests make equal pictures, whatever else is computed with them."""

    prompt: str
    negative_prompt: str
    width: int  # pixels, a multiple of 8
    height: int
    steps: int
    scale: float  # classifier-free guidance; 1 or less: off
    seed: int
    sampler: str = "ddim"
    clip_skip: int | None = None
    max_windows: int = 1  # of 75 content tokens; what goes beyond is cut off
    guide_images: tuple[str, ...] = ()  # files: one for each network that sees them, in their order
    is_controlled: bool = True  # ControlNets take part; not so where only details are drawn
    clip_prompt: str | None = None  # what CLIP guidance compares the picture with; None: the prompt

    @property
    def is_guided(self) -> bool:
        return self.scale > 1

    @property
    def texts(self) -> tuple[str, ...]:
        """What the U-Net is asked about side by side, see library.generate.guidance."""
        return (self.negative_prompt, self.prompt) if self.is_guided else (self.prompt,)

    @property
    def batch_key(self) -> Hashable:
        """Requests with equal keys can be one batch, as far as the request alone tells."""
        return (self.width, self.height, self.steps, self.scale, self.sampler, self.clip_skip, len(self.texts),
                self.is_controlled)  # fmt: skip


def make_requests(
    lines: Sequence[PromptLine], prompts: PromptOptions, picture: PictureOptions
) -> list[GenerationRequest]:
    """One request per picture: the whole list `n_iter` times, `images_per_prompt` pictures of each prompt in a row.

    Raises OptionError where a line asks for a size, a seed or an emphasis that can't be had.
    """
    lines = [checked_line(line, picture.sampler) for line in lines]
    drawn = seeds(prompts.seed, count=prompts.n_iter * len(lines) * prompts.images_per_prompt)
    return [
        request_of(line, picture, _own_seed(line, index, drawn))
        for _ in range(prompts.n_iter)
        for line in lines
        for index in range(prompts.images_per_prompt)
    ]


def checked_line(line: PromptLine, sampler: str) -> PromptLine:
    """The line with steps that the sampler can take; raises OptionError, which names the line, for anything else.

    `sampler` is that of lines that name none. The trade clamps steps, so files of prompts may rely on it.
    """
    if line.width is not None:
        check_size(f"{line.where}: --w", line.width)
    if line.height is not None:
        check_size(f"{line.where}: --h", line.height)
    for seed in line.seeds:
        check_seed(f"{line.where}: --d", seed)
    for text in (line.prompt, line.negative_prompt):
        check_emphasis(line.where, text)
    if line.steps is None:
        return line
    sampler = line.sampler or sampler
    row = SAMPLERS[sampler]
    steps = min(max(line.steps, row.least_steps), row.most_steps)
    if steps != line.steps:
        logger.warning("%s: --s %d is taken as %d, the nearest that %s can", line.where, line.steps, steps, sampler)
    return replace(line, steps=steps)


def check_emphasis(where: str, text: str) -> None:
    """Raise OptionError for brackets that multiply to weights beyond all arithmetic."""
    largest = max(abs(weight) for _, weight in parse_prompt_weights(text))
    problem = f"its brackets make an emphasis of {largest:.3g}"
    require(largest <= LARGEST_EMPHASIS, where, problem, f"{LARGEST_EMPHASIS:g} is the limit, 0.5 to 1.5 is usual")


def seeds(seed: int | None, *, count: int) -> Iterator[int]:
    """Seeds of pictures that name none, drawn one after the other; `count` pictures are made in all.

    With a seed they are a function of it, and a single picture has the seed itself. No global generator is used.
    """
    if seed is not None and count == 1:
        yield seed
    source = random.SystemRandom() if seed is None else random.Random(seed)
    while True:
        yield source.randint(0, LARGEST_SEED)


def batches(
    requests: Iterable[GenerationRequest], size: int, windows: Callable[[GenerationRequest], int]
) -> Iterator[list[GenerationRequest]]:
    """Consecutive requests that can be computed together, at most `size` of them.

    `windows` tells how many windows of text a request needs: padding it for a longer neighbour would change it.
    """
    pending: list[GenerationRequest] = []
    pending_key: Hashable = None
    for request in requests:
        key = (request.batch_key, windows(request))
        if pending and (key != pending_key or len(pending) == size):
            yield pending
            pending = []
        pending_key = key
        pending.append(request)
    if pending:
        yield pending


def _own_seed(line: PromptLine, index: int, drawn: Iterator[int]) -> int:
    return line.seeds[min(index, len(line.seeds) - 1)] if line.seeds else next(drawn)


def request_of(line: PromptLine, picture: PictureOptions, seed: int) -> GenerationRequest:
    """One picture of a checked line; `picture` says what the line does not."""
    return GenerationRequest(
        prompt=line.prompt,
        negative_prompt=line.negative_prompt,
        width=picture.width if line.width is None else line.width,
        height=picture.height if line.height is None else line.height,
        steps=picture.steps if line.steps is None else line.steps,
        scale=picture.scale if line.scale is None else line.scale,
        seed=seed,
        sampler=line.sampler or picture.sampler,
        clip_skip=picture.clip_skip,
        max_windows=picture.windows,
        clip_prompt=line.clip_prompt,
    )
