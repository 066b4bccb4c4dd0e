"""From requests to files: batches, progress, decoding, and what to say when numbers or memory run out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from library.families.base import LoadPlan, ModelBundle, ModelFamily
from library.generate.conditions import PromptEncoder
from library.generate.config import GenerationConfig
from library.generate.denoise import decode, denoise
from library.generate.drawing import Part
from library.generate.options import ComputeOptions
from library.generate.output import ModelNames, PictureWriter
from library.generate.request import GenerationRequest, batches
from library.options import OptionError
from library.progress import progress_bar

logger = logging.getLogger(__name__)


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


@dataclass
class Engine:
    """All that draws: the model, the texts it has encoded, and what takes part in drawing."""

    family: ModelFamily
    bundle: ModelBundle
    encoder: PromptEncoder
    parts: tuple[Part, ...] = ()

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
        with progress_bar(unit="step", desc="steps", is_inner=True, disable=not show_progress) as progress:

            def show(_done: int, total: int) -> None:
                progress.total = total
                progress.update()
                if after_step is not None:
                    after_step()

            latents_BChw = denoise(
                self.family, self.bundle, batch, encoder=self.encoder, parts=self.parts, progress=show
            )
        if not latents_BChw.isfinite().all():
            raise NotFiniteError("the model's output is not finite: the weights or their precision are at fault")
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
        return [Image.fromarray(pixels_HWC.numpy()) for pixels_HWC in decode(self.bundle, latents_BChw)]


def generate(
    config: GenerationConfig, requests: Sequence[GenerationRequest], engine: Engine, folder: Path
) -> list[Path]:
    """Make the pictures and write them into `folder`; returns their paths in the order of the requests."""
    names = partial(ModelNames.of, Path(engine.bundle.source.path), config.networks.tags, config.networks.tags_at)
    writer = PictureWriter(folder, config.output, names)
    progress = progress_bar(total=len(requests), unit="picture", desc="pictures")
    with writer, progress:
        for batch in batches(requests, config.compute.batch_size, engine.encoder.windows):
            with reasons_explained(config.compute):
                pictures = engine.pictures(batch)
            for index, (request, picture) in enumerate(zip(batch, pictures, strict=True)):
                writer.write(picture, request, index)
            progress.update(len(batch))
    return writer.paths


class NotFiniteError(ValueError):
    """Latents that are no numbers."""


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
