"""Requests: one picture's full specification, their seeds, and which of them are computed together."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from library.diffusion.samplers import SAMPLERS, check_packages
from library.generate.composition import prompt_parts, split_prompt
from library.generate.dynamic_prompts import parse_dynamic_prompt
from library.generate.options import (
    PictureOptions,
    PromptOptions,
    check_clip_skip,
    check_factor,
    check_seed,
    check_size,
    check_windows,
)
from library.generate.prompt_line import PromptLine, RawLine, parse_prompt_line, seeds_of_line
from library.generate.resolution_options import DeepShrinkOptions, GradualLatentOptions
from library.generate.seeds import PictureSeeds, shuffled
from library.generate.size_options import SizeOptions
from library.generate.start_options import StartNoiseOptions, UpscalerChoice
from library.options import OptionError, require
from library.text.prompt_weights import LARGEST_EMPHASIS, parse_prompt_weights

logger = logging.getLogger(__name__)

Completion = Callable[["GenerationRequest", PromptLine, int], "GenerationRequest"]


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
    image: str = ""  # path of the picture to start from
    mask: str = ""  # path of a mask: what is white there is drawn anew, the rest of `image` stays
    strength: float = 1.0  # share of the steps that are done where a picture does not start from noise alone
    first_stage: GenerationRequest | None = None  # whose result, enlarged, this picture starts from
    upscaler: UpscalerChoice = UpscalerChoice()  # by what it is enlarged
    deep_shrink: DeepShrinkOptions = DeepShrinkOptions()
    gradual_latent: GradualLatentOptions = GradualLatentOptions()
    start_noise: StartNoiseOptions = StartNoiseOptions()
    zero_terminal_snr: bool = False  # asked for; models that need it say so themselves
    # of the networks, in their order; the last one serves all further ones; None: the command line's
    multipliers: tuple[float, ...] | None = None
    region_map: str | None = None  # picture of where each part of the prompt works, see library.generate.region_map
    region_colors: int | None = None  # colour codes in it; None: its red, green and blue
    negative_scale: float | None = None  # of the negative prompt on its own; None: it is the origin of guidance
    weighting: str = "original"  # what emphasis keeps: "original" | "abs" | "none", see library.text.weighted_tokens
    sizes: SizeOptions = SizeOptions()  # what SDXL is told otherwise than by the picture itself
    sigmas: str = "default"  # how the sampler's noise levels are spaced, see library.diffusion.samplers
    # what says nothing about the picture
    file_name: str = field(default="", compare=False)  # of its file; "": as the command line says
    raw_prompt: str = field(default="", compare=False)  # the line of a dynamic prompt, as it was written

    @property
    def is_second_stage(self) -> bool:
        """Whether this picture is another one, enlarged and gone over (highres fix)."""
        return self.first_stage is not None

    @property
    def noise_seed(self) -> int:
        """Of the picture's noise; a second stage has other noise than its first one, which has the same seed."""
        return (self.seed + self.is_second_stage) % 2**64

    @property
    def steps_done(self) -> int:
        """Steps that are really done: all, where a picture starts from noise alone."""
        return min(int(self.steps * self.strength), self.steps)

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt counts; a composition takes its prediction as its origin in any case."""
        return self.scale > 1 or len(self.part_weights) > 1

    @property
    def weighs_negative(self) -> bool:
        """Whether an empty prompt is asked about, too, from which both prompts are measured."""
        return self.is_guided and self.negative_scale is not None

    @property
    def is_regional(self) -> bool:
        return self.region_map is not None

    @property
    def part_texts(self) -> tuple[str, ...]:
        """The parts of the prompt, joined by AND in it; weights are read in a composition, not in regional use."""
        if self.is_regional:
            return split_prompt(self.prompt)
        return tuple(part.text for part in prompt_parts(self.prompt))

    @property
    def part_weights(self) -> tuple[float, ...]:
        """A weight for each prediction that the parts get: their own in a composition, one for all in regional use."""
        return (1.0,) if self.is_regional else tuple(part.weight for part in prompt_parts(self.prompt))

    @property
    def parts_per_row(self) -> int:
        """Parts of the prompt that share a row of the U-Net: all of them in regional use."""
        return len(self.part_texts) if self.is_regional else 1

    @property
    def texts(self) -> tuple[str, ...]:
        """What the U-Net is asked about side by side, see library.generate.guidance."""
        if not self.is_guided:
            return self.part_texts
        return (self.negative_prompt, *self.part_texts, *("",) * self.weighs_negative)

    @property
    def batch_key(self) -> Hashable:
        """Requests with equal keys can be one batch, as far as the request alone tells."""
        own = (self.width, self.height, self.steps, self.scale, self.sampler, self.clip_skip, len(self.texts))
        start = (bool(self.image), bool(self.mask), self.strength, self.upscaler)
        drawing = (self.deep_shrink, self.gradual_latent, self.zero_terminal_snr)
        guidance = (self.negative_scale, self.sigmas, self.is_controlled)
        networks = (self.part_weights, self.multipliers, self.region_map, self.region_colors)
        return (*own, *start, *drawing, *guidance, *networks, self.first_stage and self.first_stage.batch_key)


def make_requests(
    lines: Sequence[RawLine | PromptLine],
    prompts: PromptOptions,
    picture: PictureOptions,
    complete: Completion | None = None,
) -> list[GenerationRequest]:
    """One request per picture: the whole list `n_iter` times, `images_per_prompt` pictures of each prompt in a row.

    `complete` adds what a request says beyond its prompt, given its line and its number in the list, from 0, or its
    line's `turn`. Raises OptionError where a line asks for a size, a seed or an emphasis that can't be had.
    """
    return RequestMaker(prompts, picture, len(lines), complete).of_list(lines)


class RequestMaker:
    """Makes requests of lines, one after the other; holds nothing of a line but what it says."""

    def __init__(
        self,
        prompts: PromptOptions,
        picture: PictureOptions,
        num_prompts: int | None,
        complete: Completion | None = None,
    ) -> None:
        """`num_prompts` of one iteration, None where it shows only later; `complete`: see :func:`make_requests`."""
        self.prompts = prompts
        self.picture = picture
        self.seeds = PictureSeeds(prompts, num_prompts)
        self._complete = complete or (lambda request, _line, _number: request)
        self._number = 0
        self._read: dict[RawLine | PromptLine, PromptLine] = {}

    def of_list(
        self, lines: Sequence[RawLine | PromptLine], broken: BrokenLines | None = None
    ) -> list[GenerationRequest]:
        """The pictures of a whole list, see :func:`make_requests`; with `broken`, lines that are wrong are left out."""
        made: list[GenerationRequest] = []
        for iteration in range(self.prompts.n_iter):
            self.begin_iteration()
            for line in shuffled(lines, self.prompts.seed, iteration) if self.prompts.shuffle_prompts else lines:
                with contextlib.nullcontext() if broken is None else broken.left_out():
                    made += self.of_line(line)
        return made

    def begin_iteration(self) -> None:
        """The list of prompts begins, for the first time or anew."""
        self.seeds.next_iteration()
        self._number = 0

    def of_line(self, line: RawLine | PromptLine) -> list[GenerationRequest]:
        """The pictures of one prompt: `images_per_prompt` of them, or one for each combination of a dynamic prompt.

        A dynamic prompt draws anew for each picture, from the picture's seed. Raises OptionError, which names the line.
        """
        count = self.prompts.images_per_prompt
        if isinstance(line, PromptLine):
            same = self._checked(line)
            return self._of_lines([same] * count, self._seeds(same.seeds, count))
        dynamic = parse_dynamic_prompt(line.text, line.where)
        if not dynamic.is_dynamic:
            same = self._checked(RawLine(dynamic.outside, line.where))
            return self._of_lines([same] * count, self._seeds(same.seeds, count))
        own = seeds_of_line(dynamic.outside, line.where)
        if dynamic.is_enumerated:
            first = self._seeds(own, 1)[0]
            drawn = self._seeds(own or (first,), dynamic.num_combinations)
            texts = list(dynamic.combinations(first))
        else:
            drawn = self._seeds(own, count)
            texts = [dynamic.drawn(random.Random(seed)) for seed in drawn]
        lines = [replace(self._checked(RawLine(text, line.where)), raw_prompt=line.text) for text in texts]
        return self._of_lines(lines, drawn)

    def _checked(self, line: RawLine | PromptLine) -> PromptLine:
        """The line, read and checked, once."""
        if line not in self._read:
            parsed = parse_prompt_line(line.text, line.where) if isinstance(line, RawLine) else line
            self._read[line] = checked_line(parsed, self.picture.sampler)
        return self._read[line]

    def _seeds(self, own: tuple[int, ...], count: int) -> list[int]:
        """A line's own seeds, the last of which serves all further pictures, or seeds drawn for it."""
        return [own[min(index, len(own) - 1)] for index in range(count)] if own else self.seeds.of_prompt(count)

    def _of_lines(self, lines: Sequence[PromptLine], drawn: Sequence[int]) -> list[GenerationRequest]:
        requests = []
        for index, (line, seed) in enumerate(zip(lines, drawn, strict=True)):
            own = line.seeds[min(index, len(line.seeds) - 1)] if line.seeds else seed
            number = self._number if line.turn is None else line.turn
            requests.append(self._complete(request_of(line, self.picture, own), line, number))
            self._number += 1
        return requests


class BrokenLines:
    """Counts the lines that can't be drawn, and says why, so that the others are drawn."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """A block in which a line is read."""
        try:
            yield
        except OptionError as error:
            if str(error) not in self.said:
                logger.error("left out: %s", error)
            self.said.add(str(error))


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
    check_factor(f"{line.where}: --l", line.scale, "7.5")
    if not isinstance(line.negative_scale, str):
        check_factor(f"{line.where}: --nl", line.negative_scale, "1")
    for multiplier in line.multipliers or ():
        check_factor(f"{line.where}: --am", multiplier, "1")
    check_clip_skip(f"{line.where}: clip skip", line.clip_skip)
    check_windows(f"{line.where}: windows", line.windows)
    if line.sampler is not None:
        check_packages(line.where, line.sampler)
    for text in (line.prompt, line.negative_prompt):
        check_emphasis(line.where, text)
    for part in prompt_parts(line.prompt):
        check_weight(line.where, "a part of it has a weight of", part.weight)
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
    check_weight(where, "its brackets make an emphasis of", largest)


def check_weight(where: str, problem: str, weight: float) -> None:
    """Raise OptionError for a weight beyond all arithmetic; `problem` says what has it."""
    problem = f"{problem} {weight:.3g}"
    require(abs(weight) <= LARGEST_EMPHASIS, where, problem, f"{LARGEST_EMPHASIS:g} is the limit, 0.5 to 1.5 is usual")


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
        if pending and key != pending_key:
            yield pending
            pending = []
        pending_key = key
        pending.append(request)
        if len(pending) == size:  # now, not with the next request: that may be a while in coming
            yield pending
            pending = []
    if pending:
        yield pending


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
        clip_skip=picture.clip_skip if line.clip_skip is None else line.clip_skip,
        max_windows=picture.windows if line.windows is None else line.windows,
        clip_prompt=line.clip_prompt,
        file_name=line.file_name,
        raw_prompt=line.raw_prompt,
        multipliers=line.multipliers,
    )
