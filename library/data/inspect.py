"""A look at the samples of the first epoch, exactly as the model would get them: what --debug_dataset shows.

Shape letters: B samples, C channels, H W pixels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from library.data.batch import Batch, Position
from library.data.buckets import Size, crop_yx
from library.data.cache_files import CacheItem, latent_shape, peek_latents
from library.data.epoch_plan import EpochPlan
from library.data.images import resize, usable_cores
from library.data.loading import BatchBuilder, DrawnSample, Failure, RunFacts, Samples, served
from library.data.options import LATENT_STRIDE
from library.options import OptionError

COLUMNS = (
    "batch", "place", "image", "width", "height", "repeats", "regularisation", "mirrored", "loss_weight", "tokens",
    "tokens_cut_off", "original_width", "original_height", "crop_top", "crop_left", "caption",
)  # fmt: skip


PALE = 225  # the grey of what a mask leaves out
LONGEST_SIDE = 212  # pixels of a shown picture: there are hundreds of them


@dataclass(frozen=True)
class ShownSample:
    """One sample of the first epoch."""

    batch: int  # from 1
    place: int  # in its batch, from 1
    path: str
    caption: str  # as processed
    size_wh: Size
    original_wh: Size
    crop_yx: tuple[int, int]  # what the model is told of the crop
    loss_weight: float
    repeats: int | None = None  # None: not known of somebody else's dataset
    is_reg: bool = False
    is_mirrored: bool | None = None
    is_latents: bool = False  # the picture is made of latents, because there is no image
    pixels_HWC: np.ndarray | None = None  # uint8, sides up to LONGEST_SIDE


# ---------------------------------------------------------------------------------------------- samples


def shown_samples(
    samples: Samples, items: Sequence[CacheItem], run: RunFacts, *, num_pictured: int, workers: int
) -> Iterator[ShownSample]:
    """The samples of the first epoch; this process's first `num_pictured` with pictures.

    Pictures are made of the images, also where latents are cached.
    """
    reader = _EpochReader(samples, items, run, num_pictured)
    for _, found in served(reader, 1, start=Position(1, 0), workers=min(workers, usable_cores())):
        yield from found  # type: ignore[misc]


def samples_of_batch(batch: Batch, number: int, *, num_pictured: int) -> Iterator[ShownSample]:
    """What is known of the samples of a ready batch, the `number`-th of the epoch; the first ones with pictures."""
    pictures_BCHW = batch.latents_BCHW if batch.images_BCHW is None else batch.images_BCHW
    assert pictures_BCHW is not None
    for index, name in enumerate(batch.image_names):
        height, width = batch.target_hw_B2[index].tolist()
        original_h, original_w = batch.original_hw_B2[index].tolist()
        top, left = batch.crop_yx_B2[index].tolist()
        yield ShownSample(
            number,
            index + 1,
            name,
            batch.captions[index],
            (width, height),
            (original_w, original_h),
            (top, left),
            float(batch.loss_weight_B[index]),
            is_latents=batch.images_BCHW is None,
            pixels_HWC=_small(picture_of(pictures_BCHW[index])) if index < num_pictured else None,
        )


def picture_of(pixels_or_latents_CHW: torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of an image in [-1, 1], or, roughly, of latents: their first three channels as colours."""
    if len(pixels_or_latents_CHW) == 3:
        return ((pixels_or_latents_CHW + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    channels_CHW = pixels_or_latents_CHW[:3].float()
    low, high = channels_CHW.amin((1, 2), keepdim=True), channels_CHW.amax((1, 2), keepdim=True)
    grey_CHW = (channels_CHW - low) / (high - low).clamp_min(1e-6) * 255
    enlarged_CHW = grey_CHW.repeat_interleave(LATENT_STRIDE, 1).repeat_interleave(LATENT_STRIDE, 2)
    return enlarged_CHW.byte().permute(1, 2, 0).numpy()


def _small(pixels_HWC: np.ndarray) -> np.ndarray:
    scale = LONGEST_SIDE / max(pixels_HWC.shape[:2])
    if scale >= 1:
        return pixels_HWC
    height, width = (max(1, round(side * scale)) for side in pixels_HWC.shape[:2])
    return resize(pixels_HWC, (width, height))


class _OnlyLatents:
    """Stands for the latent cache: has the latents of entries without an image, unchecked."""

    in_memory = False

    def __init__(self, items: Sequence[CacheItem]) -> None:
        self.items = items

    def holds(self, index: int) -> bool:
        return not self.items[index].has_image

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        return torch.from_numpy(peek_latents(self.items[index], flipped=flipped)).float()

    def load_alpha(self, index: int) -> np.ndarray:
        return _ones(self.items[index])


class _Nothing(_OnlyLatents):
    """Stands for the latent cache where no pictures are needed, so that no file is opened."""

    def holds(self, index: int) -> bool:
        return True

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        return torch.zeros(1)


def _ones(item: CacheItem) -> np.ndarray:
    return np.ones(latent_shape(item.placement.bucket_wh)[1:], dtype=np.float32)


@dataclass
class _EpochReader(TorchDataset):
    """Position in the first epoch -> the samples of that batch."""

    samples: Samples
    items: Sequence[CacheItem]
    run: RunFacts
    num_pictured: int
    batches_per_epoch: int = field(init=False)
    samples_before: list[int] = field(init=False)  # each batch

    def __post_init__(self) -> None:
        self.with_pictures = BatchBuilder(self.samples, _OnlyLatents(self.items), self.run)  # type: ignore[arg-type]
        self.without = BatchBuilder(self.samples, _Nothing(self.items), self.run)  # type: ignore[arg-type]
        self.batches_per_epoch = self.without.batches_per_epoch
        processes = self.run.num_processes
        plan = EpochPlan(self.samples.pools, seed=self.samples.seed, epoch=1, num_processes=processes)
        self.samples_before = [0, *accumulate(-(-len(batch) // processes) for batch in plan.batches)]

    def __getitem__(self, position: Position) -> tuple[Position, list[ShownSample] | Failure]:
        num_pictured = max(0, self.num_pictured - self.samples_before[position.batch_index])
        builder = self.with_pictures if num_pictured else self.without
        try:
            drawn = builder.samples_of(position)
        except OptionError as error:
            return position, Failure(str(error))
        return position, [
            self._shown(sample, position.batch_index + 1, place, is_pictured=place <= num_pictured)
            for place, sample in enumerate(drawn, 1)
        ]

    def _shown(self, sample: DrawnSample, batch: int, place: int, *, is_pictured: bool) -> ShownSample:
        image = sample.image
        folder = self.samples.subsets[image.subset].folder
        size_wh, original_wh = image.placement.bucket_wh, image.record.size_wh
        return ShownSample(
            batch,
            place,
            image.record.path,
            sample.caption,
            size_wh,
            original_wh,
            crop_yx(original_wh, size_wh, flipped=sample.flipped),
            self.without.weight(image),
            repeats=folder.num_repeats,
            is_reg=folder.is_reg,
            is_mirrored=sample.flipped,
            is_latents=is_pictured and sample.posterior_noise is None,
            pixels_HWC=_small(_masked(picture_of(sample.pixels_or_latents), sample.mask)) if is_pictured else None,
        )


def _masked(pixels_HWC: np.ndarray, mask_1hw: torch.Tensor | None) -> np.ndarray:
    """The picture with the parts that the loss leaves out in a pale grey."""
    if mask_1hw is None:
        return pixels_HWC
    mask_HW = mask_1hw[0].repeat_interleave(LATENT_STRIDE, 0).repeat_interleave(LATENT_STRIDE, 1).numpy()
    pale_HWC = 0.15 * pixels_HWC + 0.85 * PALE
    return (pixels_HWC * mask_HW[..., None] + pale_HWC * (1 - mask_HW[..., None])).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- table


def write_table(path: Path, rows: Iterable[tuple[ShownSample, int, int]]) -> None:
    """A CSV file of samples, each with its number of tokens and how many of them are cut off."""
    with path.open("w", newline="", encoding="utf-8-sig", errors="backslashreplace") as file:  # marked for spreadsheets
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for sample, num_tokens, num_cut_off in rows:
            table.writerow(_cells(sample, num_tokens, num_cut_off))


def _cells(sample: ShownSample, num_tokens: int, num_cut_off: int) -> list[object]:
    mirrored = "" if sample.is_mirrored is None else int(sample.is_mirrored)
    return [
        sample.batch, sample.place, sample.path, *sample.size_wh, "" if sample.repeats is None else sample.repeats,
        int(sample.is_reg), mirrored, f"{sample.loss_weight:g}", num_tokens, num_cut_off, *sample.original_wh,
        *sample.crop_yx, sample.caption,
    ]  # fmt: skip
