"""From requests to files: batches, progress, decoding, and what to say when numbers or memory run out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from library.families.base import LoadPlan, ModelBundle, ModelFamily
from library.generate.conditions import PromptEncoder
from library.generate.config import GenerationConfig
from library.generate.denoise import NotFiniteError, check_finite, decode, denoise
from library.generate.drawing import Part
from library.generate.highres import Enlarger
from library.generate.memory import check_fits
from library.generate.options import ComputeOptions
from library.generate.output import ModelNames, PictureWriter
from library.generate.request import GenerationRequest, batches
from library.generate.start import Start, requested_start
from library.generate.vae_options import VaeOptions
from library.options import OptionError
from library.progress import progress_bar

logger = logging.getLogger(__name__)

OnFirstStage = Callable[[Sequence[GenerationRequest], Sequence[Image.Image]], None]


def load_plan(compute: ComputeOptions) -> LoadPlan:
    """The whole model in one precision on the fastest device there is."""
    dtype = torch.float16 if compute.fp16 else torch.bfloat16 if compute.bf16 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cpu":
        logger.info("no GPU found: pictures are computed on the CPU, which is slow for full-size models")
    return LoadPlan(
        unet=dtype,
        text_encoders=dtype,
        vae=torch.float32 if compute.no_half_vae else dtype,
        device=torch.device(device),
    )


def put_channels_last(bundle: ModelBundle) -> None:
    """Lay the weights of convolutions so that pictures go through them with their channels last in memory."""
    for module in (bundle.unet, bundle.vae):
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@dataclass
class Engine:
    """All that draws: the model, the texts it has encoded, and what takes part in drawing."""

    family: ModelFamily
    bundle: ModelBundle
    encoder: PromptEncoder
    parts: tuple[Part, ...] = ()
    vae: VaeOptions = VaeOptions()
    upscaler: Any = None  # of highres fix: see library.generate.highres
    on_first_stage: OnFirstStage | None = None  # told of the pictures of first stages (highres fix)

    def latents(
        self,
        batch: Sequence[GenerationRequest],
        *,
        show_progress: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Unscaled latents (B, C, h, w) of one batch, with a progress bar over its steps.

        `after_step` is called after each step, and breaks the batch off by raising something. Raises NotFiniteError for
        latents that are not numbers.
        """
        start = self._second_stage(batch, show_progress=show_progress, after_step=after_step)
        with progress_bar(unit="step", desc="steps", is_inner=True, disable=not show_progress) as progress:

            def show(_done: int, total: int) -> None:
                progress.total = total
                progress.update()
                if after_step is not None:
                    after_step()

            latents_BChw = denoise(
                self.family, self.bundle, batch, encoder=self.encoder, parts=self.parts, progress=show, start=start
            )
        check_finite(latents_BChw, "the model's")
        return latents_BChw

    def pictures(
        self,
        batch: Sequence[GenerationRequest],
        *,
        show_progress: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """The pictures of one batch, see :meth:`latents`."""
        latents_BChw = self.latents(batch, show_progress=show_progress, after_step=after_step)
        return self._decoded(latents_BChw)

    def _decoded(self, latents_BChw: torch.Tensor) -> list[Image.Image]:
        pixels_BHWC = decode(self.bundle, latents_BChw, self.vae.at_once(len(latents_BChw)))
        return [Image.fromarray(pixels_HWC.numpy()) for pixels_HWC in pixels_BHWC]

    def _second_stage(
        self, batch: Sequence[GenerationRequest], *, show_progress: bool, after_step: Callable[[], None] | None
    ) -> Start:
        """What a batch starts from: what its requests name, or their first stages, which are drawn here."""
        firsts = [request.first_stage for request in batch if request.first_stage is not None]
        if not firsts:
            return requested_start
        latents_BChw = self.latents(firsts, show_progress=show_progress, after_step=after_step)
        enlarger = Enlarger(self.family, self.bundle, self.upscaler, self.vae.at_once(len(batch)))
        wants_pictures = enlarger.wants_pictures(batch[0].upscaler)
        pictures = self._decoded(latents_BChw) if wants_pictures or self.on_first_stage else []
        if self.on_first_stage is not None:
            self.on_first_stage(firsts, pictures)
        return enlarger.start(batch, latents_BChw, pictures if wants_pictures else None)


@dataclass(frozen=True)
class Round:
    """Pictures that are batched together, and finished before the next round is asked for."""

    requests: Iterable[GenerationRequest]
    is_typed: bool = False  # somebody waits for them: they are shown, and what can't be drawn ends this round alone

    @property
    def size(self) -> int | None:
        """Number of pictures; None where it shows only later."""
        return len(self.requests) if isinstance(self.requests, Sized) else None


Drawn = tuple[GenerationRequest, Image.Image]


def generate(
    config: GenerationConfig,
    rounds: Iterable[Round],
    engine: Engine,
    folder: Path,
    show: Callable[[Sequence[Drawn]], None] | None = None,
    paths: list[Path] | None = None,
) -> list[Path]:
    """Make the pictures and write them into `folder`; returns their paths in the order of the requests.

    The progress bar knows its end where `rounds` is a list of lists. `show` is given the pictures of a typed round.
    The list `paths`, which is the one that is returned, also tells what is finished when something goes wrong.
    """
    files = [Path(file.path) for file in config.networks.files]
    names = partial(
        ModelNames.of,
        Path(engine.bundle.source.path),
        config.networks.tags,
        files,
        config.embeddings.files,
        vae=config.checkpoint.vae,
        networks_at=config.networks.tags_at,
        looks=(*config.critics.told, *config.clip_vision.told),
    )
    sizes = [item.size for item in rounds] if isinstance(rounds, Sequence) else [None]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    writer = PictureWriter(folder, config.output, names, paths)

    def write(batch: Sequence[GenerationRequest], pictures: Sequence[Image.Image]) -> None:
        for index, (request, picture) in enumerate(zip(batch, pictures, strict=True)):
            writer.write(picture, request, index, stage_of(request, config))

    if config.highres.highres_fix_save_1st:
        engine.on_first_stage = write
    progress = progress_bar(total=total, unit="picture", desc="pictures", disable=config.prompts.interactive)
    with writer, progress:
        for item in rounds:
            shown: list[Drawn] = []
            with mistakes_said() if item.is_typed else nullcontext():
                for batch, pictures in _batches_drawn(item.requests, config.compute, engine):
                    write(batch, pictures)
                    shown += zip(batch, pictures, strict=True) if item.is_typed else []
                    progress.update(len(batch))
            if show is not None and shown:
                show(shown)
    return writer.paths


def stage_of(request: GenerationRequest, config: GenerationConfig) -> str:
    """What names of files say of stages: "0" and "1" for the first and the second one of highres fix."""
    return "" if config.highres.highres_fix_scale is None else str(int(request.is_second_stage))


def _batches_drawn(
    requests: Iterable[GenerationRequest], compute: ComputeOptions, engine: Engine
) -> Iterator[tuple[list[GenerationRequest], list[Image.Image]]]:
    for batch in batches(requests, compute.batch_size, engine.encoder.windows):
        with reasons_explained(compute):
            check_fits(batch, engine.bundle.vae, engine.vae.at_once(len(batch)))
            pictures = engine.pictures(batch)
        yield batch, pictures


@contextmanager
def mistakes_said() -> Iterator[None]:
    """What was asked for can't be drawn: somebody is there to ask for something else."""
    try:
        yield
    except OptionError as error:
        logger.error("%s", error)


@contextmanager
def reasons_explained(compute: ComputeOptions) -> Iterator[None]:
    """Turn running out of GPU memory, or of numbers, into a sentence with the ways out."""
    try:
        yield
    except NotFiniteError as error:
        raise OptionError("", str(error), "use --bf16, or neither of both" if compute.fp16 else "") from None
    except torch.OutOfMemoryError:
        smaller = "a smaller --batch_size, smaller pictures" if compute.batch_size > 1 else "smaller pictures"
        way_out = f"use {smaller}" + ("" if compute.fp16 or compute.bf16 else ", --fp16 or --bf16")
        raise OptionError("--batch_size", f"{compute.batch_size} does not fit into the GPU's memory", way_out) from None
