"""Batches: what happens when a sample is drawn, and the loader that does it in worker processes.

A batch is a function of its position in the run: every random draw belongs to (seed, purpose, epoch, sample id). So
the number of workers changes nothing, and a run can start anywhere without making the batches before.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from library.data.batch import Batch, NoiseDraw, Position
from library.data.buckets import Cut, Placement, central_cut, crop_yx
from library.data.cache import LatentStore
from library.data.cache_files import latent_shape
from library.data.captions import process_caption
from library.data.config import SubsetConfig
from library.data.drawing import MaskFiles, draw_picture, joined_mask
from library.data.epoch_plan import EpochPlan, Pool, Share
from library.data.face_crop import Face
from library.data.images import to_tensor
from library.data.masks import averaged
from library.data.records import ImageRecord
from library.data.text_cache import TextStore, stacked
from library.data.text_variations import drawn_version
from library.options import OptionError
from library.randomness import python_random, torch_generator
from library.text.states import TextStates
from library.text.tokens import Tokens

Draw = Callable[[int, int, tuple[int, int, int]], NoiseDraw]
Tokenize = Callable[[Sequence[str]], Tokens]


@dataclass(frozen=True)
class RunFacts:
    """What making batches needs to know of the run; the callables travel to worker processes."""

    draw: Draw  # (epoch, sample id, latent (C, H, W))
    tokenize: Tokenize  # captions -> ids, and weights where captions hold emphasis
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
    face: Face | None = None  # around which it is cut


@dataclass(frozen=True)
class Samples:
    """Everything that samples are made of."""

    images: Sequence[TrainImage]
    subsets: Sequence[SubsetConfig]
    image_of_sample: np.ndarray | Mapping[int, int]  # sample id -> index into `images`
    pools: Sequence[Pool]
    seed: int


def load_batches(
    samples: Samples,
    store: LatentStore | None,
    run: RunFacts,
    *,
    start: Position,
    workers: int,
    texts: TextStore | None = None,
) -> Iterator[tuple[Position, Batch]]:
    """The run's batches for one process, from `start` to the end of the last epoch, each with its position.

    `texts` has the encoded captions of the images of `samples`, in their order. One loader serves the whole run, so
    there is no gap between epochs. Raises OptionError when a file has become
    unreadable.
    """
    return served(BatchBuilder(samples, store, run, texts), run.epochs, start=start, workers=workers)


def served(builder: Any, epochs: int, *, start: Position, workers: int) -> Iterator[tuple[Position, Batch]]:
    """What a builder makes of the positions from `start` on; it has `batches_per_epoch` and `__getitem__`."""
    loader = DataLoader(
        builder,
        batch_size=None,
        sampler=RunPositions(start, builder.batches_per_epoch, epochs),  # type: ignore[arg-type]
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


class DrawnSample(NamedTuple):
    """One showing of one image, with everything random drawn."""

    image: TrainImage
    caption: str
    flipped: bool
    pixels_or_latents: torch.Tensor
    draw: NoiseDraw
    posterior_noise: torch.Tensor | None
    mask: torch.Tensor | None  # (1, h, w); of every sample or of none
    text: TextStates | None = None  # of the caption, where text is cached


@dataclass
class BatchBuilder(TorchDataset):
    """Position in the run -> one process's share of that batch."""

    samples: Samples
    store: LatentStore | None
    run: RunFacts
    texts: TextStore | None = None
    batches_per_epoch: int = field(init=False)
    has_masks: bool = field(init=False)
    mask_files: MaskFiles = field(init=False, repr=False)
    _plan: tuple[int, EpochPlan] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.has_masks = any(subset.masks.enabled for subset in self.samples.subsets)
        self.mask_files = MaskFiles(keeps=self.store is not None and self.store.in_memory)
        self.batches_per_epoch = sum(pool.num_batches(self.run.num_processes) for pool in self.samples.pools)

    def __getitem__(self, position: Position) -> tuple[Position, Batch | Failure]:
        try:
            return position, self._batch(position)
        except OptionError as error:
            return position, Failure(str(error))

    def _batch(self, position: Position) -> Batch:
        return self._collated(self.samples_of(position), self._share(position))

    def samples_of(self, position: Position) -> list[DrawnSample]:
        """What this process's share of a batch is made of."""
        step = self._step(position)
        return [self._sample(sample_id, position.epoch, step) for sample_id in self._share(position).samples]

    def _share(self, position: Position) -> Share:
        return self._epoch_plan(position.epoch).share(position.batch_index, self.run.process_index)

    def _epoch_plan(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan[0] != epoch:
            plan = EpochPlan(
                self.samples.pools, seed=self.samples.seed, epoch=epoch, num_processes=self.run.num_processes
            )
            self._plan = (epoch, plan)
        return self._plan[1]

    def _step(self, position: Position) -> int:
        return updates_before(position, self.batches_per_epoch, self.run.accumulation)

    def _sample(self, sample_id: int, epoch: int, step: int) -> DrawnSample:
        seed, place_in_run = self.samples.seed, (epoch, sample_id)
        image = self.samples.images[self.samples.image_of_sample[sample_id]]
        subset = self.samples.subsets[image.subset]
        caption, text = self._caption(sample_id, subset, epoch, step)
        flipped = subset.augment.flip_aug and python_random(seed, "flip", *place_in_run).random() < 0.5
        shape = latent_shape(image.placement.bucket_wh)
        draw = self.run.draw(epoch, sample_id, shape)
        if self.store is not None and self.store.holds(image.latents):
            latents = self.store.load(image.latents, flipped=flipped)
            alpha_hw = self.store.load_alpha(image.latents) if subset.masks.alpha_mask else None
            mask = self._mask(image, central_cut(image.placement), alpha_hw, flipped)
            return DrawnSample(image, caption, flipped, latents, draw, None, mask, text)
        picture = draw_picture(
            image.record,
            image.placement,
            image.face,
            subset.augment,
            seed,
            place_in_run,
            with_alpha=subset.masks.alpha_mask,
        )
        pixels = to_tensor(picture.pixels_HWC[:, ::-1] if flipped else picture.pixels_HWC)
        posterior_noise = torch.randn(shape, generator=torch_generator(seed, "posterior", *place_in_run))
        mask = self._mask(image, picture.cut, picture.alpha_hw, flipped)
        return DrawnSample(image, caption, flipped, pixels, draw, posterior_noise, mask, text)

    def _caption(self, sample_id: int, subset: SubsetConfig, epoch: int, step: int) -> tuple[str, TextStates | None]:
        """The caption of one draw, and what a cache holds of it."""
        index = int(self.samples.image_of_sample[sample_id])
        draw = python_random(self.samples.seed, "caption", epoch, sample_id)
        if self.texts is not None:
            version = drawn_version(subset.caption, self.texts.num_versions(index), draw, epoch=epoch)
            return self.texts.caption(index, version), self.texts.load(index, version)
        stored, total = self.samples.images[index].record.caption, self.run.max_train_steps
        return process_caption(stored, subset.caption, draw, epoch=epoch, step=step, max_train_steps=total), None

    def _mask(self, image: TrainImage, cut: Cut, alpha_hw: np.ndarray | None, flipped: bool) -> torch.Tensor | None:
        if not self.has_masks:
            return None
        _, h, w = latent_shape(image.placement.bucket_wh)
        masks_hw = [] if alpha_hw is None else [averaged(alpha_hw, (h, w))]
        if image.record.mask is not None:
            masks_hw.append(self.mask_files(image.record.mask, cut))
        return joined_mask(masks_hw, (h, w), flipped=flipped)

    def _collated(self, parts: Sequence[DrawnSample], share: Share) -> Batch:
        stacked = torch.stack([part.pixels_or_latents for part in parts])
        images = [part.image for part in parts]
        is_latents = parts[0].posterior_noise is None
        return Batch(
            **noise_fields([part.draw for part in parts]),
            **self._text_fields(parts),
            loss_weight_B=torch.tensor([self.weight(image) for image in images]) * _real(share),
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
            posterior_noise_BCHW=_stacked([part.posterior_noise for part in parts]),
            network_multiplier=self.samples.subsets[images[0].subset].network_multiplier,
            mask_B1HW=_stacked([part.mask for part in parts]),
        )

    def _text_fields(self, parts: Sequence[DrawnSample]) -> dict[str, Any]:
        """The fields of a batch about its captions: encoded ones, or their token ids."""
        captions = tuple(part.caption for part in parts)
        encoded = [part.text for part in parts if part.text is not None]
        if encoded:
            text = stacked(encoded)
            return {"captions": captions, "token_ids": (), "text_states": text.by_encoder, "pooled_BP": text.pooled_BP}
        tokens = self.run.tokenize(captions)
        return {"captions": captions, "token_ids": tokens.ids, "token_weights": tokens.weights}

    def weight(self, image: TrainImage) -> float:
        """In the loss."""
        return self.run.prior_loss_weight if self.samples.subsets[image.subset].folder.is_reg else 1.0


def updates_before(position: Position, batches_per_epoch: int, accumulation: int) -> int:
    """Optimizer updates done before this batch."""
    steps_per_epoch = -(-batches_per_epoch // accumulation)
    return (position.epoch - 1) * steps_per_epoch + position.batch_index // accumulation


def noise_fields(draws: Sequence[NoiseDraw]) -> dict[str, Any]:
    """The fields of a batch that are drawn."""
    return {
        "noise_BCHW": torch.stack([draw.noise_CHW for draw in draws]),
        "timesteps_B": torch.tensor([draw.timestep for draw in draws]),
        "offset_noise_BC11": _stacked([draw.offset_noise_C11 for draw in draws]),
        "noise_offset_B": _stacked([draw.noise_offset for draw in draws]),
        "input_perturbation_BCHW": _stacked([draw.input_perturbation_CHW for draw in draws]),
    }


def _stacked(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One tensor of what all samples have; None where the run has no such thing."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _real(share: Share) -> torch.Tensor:
    return (torch.arange(len(share.samples)) < share.num_real).float()


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_index: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the main process, which still needs its batches
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # one worker, one core; and OpenCV's threads don't survive a fork
