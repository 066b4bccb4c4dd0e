"""Batches: what happens when a sample is drawn, and the loader that does it in worker processes.

A batch is a function of its position in the run: every random draw belongs to (seed, purpose, epoch, sample id). So
the number of workers changes nothing, and a run can start anywhere without making the batches before.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from library.data.batch import Batch, Position
from library.data.buckets import Placement, crop_yx
from library.data.cache import LatentStore
from library.data.cache_files import latent_shape
from library.data.captions import process_caption
from library.data.config import SubsetConfig
from library.data.epoch_plan import EpochPlan, Pool, Share
from library.data.headers import BadImage
from library.data.images import augment_color, load_image, place, to_tensor
from library.data.sources import ImageRecord
from library.options import OptionError
from library.randomness import python_random, torch_generator

Draw = Callable[[int, int, tuple[int, int, int]], tuple[torch.Tensor, int]]
Tokenize = Callable[[Sequence[str]], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class RunFacts:
    """What making batches needs to know of the run; the callables travel to worker processes."""

    draw: Draw  # (epoch, sample id, latent (C, H, W)) -> noise_CHW float32, timestep
    tokenize: Tokenize  # captions -> one (B, N, 77) int64 per tokenizer
    accumulation: int  # batches per optimizer update
    max_train_steps: int
    epochs: int
    prior_loss_weight: float  # loss weight of regularisation images
    process_index: int = 0
    num_processes: int = 1


@dataclass(frozen=True, slots=True)
class TrainImage:
    """One image of one dataset."""

    record: ImageRecord
    subset: int  # index into the run's subsets
    placement: Placement
    latents: int  # index of its item in the latent cache


@dataclass(frozen=True)
class Samples:
    """Everything that samples are made of."""

    images: Sequence[TrainImage]
    subsets: Sequence[SubsetConfig]
    image_of_sample: np.ndarray  # sample id -> index into `images`
    pools: Sequence[Pool]
    seed: int


def load_batches(
    samples: Samples, store: LatentStore | None, run: RunFacts, *, start: Position, workers: int
) -> Iterator[tuple[Position, Batch]]:
    """The run's batches for one process, from `start` to the end of the last epoch, each with its position.

    One loader serves the whole run, so there is no gap between epochs. Raises OptionError when a file has become
    unreadable.
    """
    builder = BatchBuilder(samples, store, run)
    loader = DataLoader(
        builder,
        batch_size=None,
        sampler=RunPositions(start, builder.batches_per_epoch, run.epochs),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # keeps the loader away from torch's global generator
    )
    for position, batch in loader:
        if isinstance(batch, Failure):
            raise OptionError("", batch.sentence)
        yield position, batch


class RunPositions:
    """The positions of a run in order: the loader's sampler."""

    def __init__(self, start: Position, batches_per_epoch: int, epochs: int) -> None:
        self.first = (start.epoch - 1) * batches_per_epoch + start.batch_index
        self.last = epochs * batches_per_epoch
        self.batches_per_epoch = batches_per_epoch

    def __iter__(self) -> Iterator[Position]:
        for number in range(self.first, self.last):
            epoch, batch_index = divmod(number, self.batches_per_epoch)
            yield Position(epoch + 1, batch_index)

    def __len__(self) -> int:
        return max(0, self.last - self.first)


class Failure(NamedTuple):
    """An OptionError as a worker sends it in place of a batch: torch would wrap an exception in its traceback."""

    sentence: str


class _Sample(NamedTuple):
    image: TrainImage
    caption: str
    flipped: bool
    pixels_or_latents: torch.Tensor
    noise: torch.Tensor
    timestep: int
    posterior_noise: torch.Tensor | None


@dataclass
class BatchBuilder(TorchDataset):
    """Position in the run -> one process's share of that batch."""

    samples: Samples
    store: LatentStore | None
    run: RunFacts
    batches_per_epoch: int = field(init=False)
    _plan: tuple[int, EpochPlan] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.batches_per_epoch = sum(pool.num_batches(self.run.num_processes) for pool in self.samples.pools)

    def __getitem__(self, position: Position) -> tuple[Position, Batch | Failure]:
        try:
            return position, self._batch(position)
        except OptionError as error:
            return position, Failure(str(error))

    def _batch(self, position: Position) -> Batch:
        share = self._epoch_plan(position.epoch).share(position.batch_index, self.run.process_index)
        step = self._step(position)
        return self._collated([self._sample(sample_id, position.epoch, step) for sample_id in share.samples], share)

    def _epoch_plan(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan[0] != epoch:
            plan = EpochPlan(
                self.samples.pools, seed=self.samples.seed, epoch=epoch, num_processes=self.run.num_processes
            )
            self._plan = (epoch, plan)
        return self._plan[1]

    def _step(self, position: Position) -> int:
        """Optimizer updates done before this batch."""
        steps_per_epoch = -(-self.batches_per_epoch // self.run.accumulation)
        return (position.epoch - 1) * steps_per_epoch + position.batch_index // self.run.accumulation

    def _sample(self, sample_id: int, epoch: int, step: int) -> _Sample:
        seed, place_in_run = self.samples.seed, (epoch, sample_id)
        image = self.samples.images[self.samples.image_of_sample[sample_id]]
        subset = self.samples.subsets[image.subset]
        caption = process_caption(
            image.record.caption,
            subset.caption,
            python_random(seed, "caption", *place_in_run),
            epoch=epoch,
            step=step,
            max_train_steps=self.run.max_train_steps,
        )
        flipped = subset.augment.flip_aug and python_random(seed, "flip", *place_in_run).random() < 0.5
        shape = latent_shape(image.placement.bucket_wh)
        noise, timestep = self.run.draw(epoch, sample_id, shape)
        if self.store is not None:
            latents = self.store.load(image.latents, flipped=flipped)
            return _Sample(image, caption, flipped, latents, noise, timestep, None)
        pixels = self._pixels(image, flipped, place_in_run)
        posterior_noise = torch.randn(shape, generator=torch_generator(seed, "posterior", *place_in_run))
        return _Sample(image, caption, flipped, pixels, noise, timestep, posterior_noise)

    def _pixels(self, image: TrainImage, flipped: bool, place_in_run: tuple[int, int]) -> torch.Tensor:
        seed, augment = self.samples.seed, self.samples.subsets[image.subset].augment
        try:
            pixels_HWC = load_image(image.record.path, image.record.orientation)
        except BadImage as error:
            problem = f"{image.record.path} can't be read any more ({error})"
            raise OptionError("training images", problem, "mend it and resume") from None
        crop = python_random(seed, "crop", *place_in_run) if augment.random_crop else None
        pixels_HWC = place(pixels_HWC, image.placement, crop)
        if augment.color_aug:
            pixels_HWC = augment_color(pixels_HWC, python_random(seed, "color", *place_in_run))
        return to_tensor(pixels_HWC[:, ::-1] if flipped else pixels_HWC)

    def _collated(self, parts: Sequence[_Sample], share: Share) -> Batch:
        stacked = torch.stack([part.pixels_or_latents for part in parts])
        posterior = [part.posterior_noise for part in parts if part.posterior_noise is not None]
        captions = tuple(part.caption for part in parts)
        images = [part.image for part in parts]
        is_latents = self.store is not None
        return Batch(
            noise_BCHW=torch.stack([part.noise for part in parts]),
            timesteps_B=torch.tensor([part.timestep for part in parts]),
            token_ids=tuple(self.run.tokenize(captions)),
            captions=captions,
            loss_weight_B=torch.tensor([self._weight(image) for image in images]) * _real(share),
            denominator=share.denominator,
            original_hw_B2=torch.tensor([image.record.size_wh[::-1] for image in images]),
            crop_yx_B2=torch.tensor(
                [
                    crop_yx(part.image.record.size_wh, part.image.placement.bucket_wh, flipped=part.flipped)
                    for part in parts
                ]
            ),
            target_hw_B2=torch.tensor([image.placement.bucket_wh[::-1] for image in images]),
            image_names=tuple(image.record.path for image in images),
            images_BCHW=None if is_latents else stacked,
            latents_BCHW=stacked if is_latents else None,
            posterior_noise_BCHW=torch.stack(posterior) if posterior else None,
        )

    def _weight(self, image: TrainImage) -> float:
        return self.run.prior_loss_weight if self.samples.subsets[image.subset].folder.is_reg else 1.0


def _real(share: Share) -> torch.Tensor:
    return (torch.arange(len(share.samples)) < share.num_real).float()


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_index: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the main process, which still needs its batches
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # one worker, one core; and OpenCV's threads don't survive a fork
