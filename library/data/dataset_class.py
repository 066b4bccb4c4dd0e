"""--dataset_class: a dataset that somebody else wrote, whose items are whole batches.

The class is made with (tokenizer, max_token_length, resolution, debug_dataset); `tokenizer` is transformers' CLIP
tokenizer, a list of them for models with several. It needs __len__ and __getitem__. An item is a dictionary:

    images              (B, 3, H, W) in [-1, 1], or in its place
    latents             (B, 4, H/8, W/8), unscaled samples of the VAE
    captions            B texts; may be left out where there are ids
    input_ids           (B, 77) or (B, N, 77) token ids; by default those of the captions
    loss_weights        (B,), by default 1
    original_sizes_hw, crop_top_lefts, target_sizes_hw
                        (B, 2); by default the size of the images, 0 and the size of the images

set_current_epoch, set_current_step and set_max_train_steps are called where the class has them, and num_train_images
and num_reg_images are read. Python's, numpy's and torch's global generators are seeded before each item, so that an
item that draws from them is the same in every run and whatever the number of workers.

Shape letters: B samples, C channels, H W pixels, N windows of text.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from library.data.batch import Batch, Position
from library.data.images import usable_cores
from library.data.inspect import ShownSample, samples_of_batch
from library.data.loading import Failure, RunFacts, noise_fields, served, updates_before
from library.data.options import LATENT_STRIDE
from library.data.scan import Scan
from library.data.summary import LoadedDataset
from library.options import OptionError
from library.randomness import python_random, seed_for, seed_global_generators, torch_generator
from library.text.tokens import END_ID

FLAG = "--dataset_class"
SAMPLES_PER_ITEM = 2**20  # ids are given to samples in blocks of this many: more than an item can have
FAILURES = (Exception, SystemExit)  # of code that is not ours
LARGEST_PIXEL = 1.001  # rounding is no mistake, 0 to 255 is one
PAIRS = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")


def make_dataset(
    name: str,
    tokenizers: Sequence[Any],
    *,
    max_token_length: int | None,
    resolution: tuple[int, int] | None,
    debug_dataset: bool,
) -> Any:
    """An instance of package.module.Class; raises OptionError where that can't be had, or is no dataset."""
    module_name, _, class_name = name.rpartition(".")
    try:
        made_by = getattr(importlib.import_module(module_name), class_name)
    except FAILURES as error:  # the module's own code runs
        raise OptionError(FLAG, f"{name} can't be imported: {error}", "name package.module.Class") from None
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(made_by, method)]
    if missing:
        raise OptionError(FLAG, f"{name} has no {' and no '.join(missing)}", "derive it from torch's Dataset")
    tokenizer = tokenizers[0] if len(tokenizers) == 1 else list(tokenizers)
    made = _done(f"{name} can't be made", lambda: made_by(tokenizer, max_token_length, resolution, debug_dataset))
    if not _done(f"{name} has no length", lambda: len(made)):
        raise OptionError(FLAG, f"{name} has no items", "mend the class")
    return made


def _done(what: str, call: Callable[[], Any]) -> Any:
    """What somebody's code gives; OptionError where it fails."""
    try:
        return call()
    except FAILURES as error:
        raise OptionError(FLAG, f"{what}: {_told(error)}", "mend the class") from None


def _told(error: BaseException) -> str:
    """The error, and the line it comes from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


class ForeignData:
    """The training data of a run that are an instance of somebody's class; answers as TrainingData does."""

    datasets: tuple[LoadedDataset, ...] = ()
    validation = None
    scan = Scan()
    brings_latents = False
    latents_in_memory = False
    needs_vae = True
    is_empty = False

    def __init__(self, name: str, dataset: Any, seed: int) -> None:
        self.name = name
        self.dataset = dataset
        self.seed = seed
        self.metadata()  # now rather than with the first file

    @property
    def num_train_images(self) -> int:
        """What the class says, or its number of items."""
        return self._number("num_train_images", len(self.dataset))

    @property
    def num_reg_images(self) -> int:
        """What the class says, or none."""
        return self._number("num_reg_images", 0)

    def _number(self, attribute: str, default: int) -> int:
        what = f"{attribute} of {self.name}"
        value = _done(what, lambda: getattr(self.dataset, attribute, None))
        return default if value is None else _done(what, lambda: int(value))

    def batches_per_epoch(self, num_processes: int) -> int:
        return -(-len(self.dataset) // num_processes)

    def metadata(self, *, num_processes: int = 1, accumulation: int = 1) -> dict[str, Any]:
        """The ss_* keys about the data, as far as the class has them."""
        keys = {"ss_num_train_images": self.num_train_images, "ss_num_reg_images": self.num_reg_images}
        for key in ("tag_frequency", "bucket_info"):
            text = _done(
                f"{key} of {self.name}", lambda key=key: json.dumps(getattr(self.dataset, key, None), default=str)
            )
            keys |= {} if text == "null" else {f"ss_{key}": text}
        return keys

    def digest(self) -> dict[str, int | str]:
        """By what it is of: the class's name and its number of items; more is not known of it."""
        return {"dataset class": self.name, "number of items": len(self.dataset)}

    def cache_latents(self, *_: Any, **__: Any) -> None:
        raise AssertionError("latents of somebody's class are not cached")

    def loader(self, *, start: Position, workers: int, **run: Any) -> Iterator[tuple[Position, Batch]]:
        """The run's batches from `start` on, as of TrainingData."""
        facts = RunFacts(**run)
        builder = _ItemReader(self.name, self.dataset, self.seed, facts)
        return served(builder, facts.epochs, start=start, workers=min(workers, usable_cores()))

    def first_epoch(self, *, num_pictured: int, workers: int, **run: Any) -> Iterator[ShownSample]:
        """The samples of the first epoch in their order, for a look; the first ones with pictures."""
        for position, batch in self.loader(start=Position(1, 0), workers=workers, **{**run, "epochs": 1}):
            yield from samples_of_batch(batch, position.batch_index + 1, num_pictured=num_pictured)
            num_pictured = max(0, num_pictured - batch.size)


# ---------------------------------------------------------------------------------------------- batches


class _ItemShare(NamedTuple):
    """One process's item of the batch that all processes train on together."""

    item: int
    weight: float  # 0 for a filler
    real_share: float  # items that are no fillers, per process


@dataclass
class _ItemReader(TorchDataset):
    """Position in the run -> one process's share of that batch: an item."""

    name: str
    dataset: Any
    seed: int
    run: RunFacts
    batches_per_epoch: int = field(init=False)
    _told_epoch: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.batches_per_epoch = -(-len(self.dataset) // self.run.num_processes)
        self._tell("set_max_train_steps", self.run.max_train_steps)

    def __getitem__(self, position: Position) -> tuple[Position, Batch | Failure]:
        share = self._share(position)
        try:
            return position, self._batch(share, self._read(share.item, position), position.epoch)
        except OptionError as error:
            return position, Failure(str(error))

    def _share(self, position: Position) -> _ItemShare:
        order = list(range(len(self.dataset)))
        python_random(self.seed, "item order", position.epoch).shuffle(order)
        processes, own = self.run.num_processes, self.run.process_index
        together = order[position.batch_index * processes : (position.batch_index + 1) * processes]
        is_filler = own >= len(together)
        return _ItemShare(together[-1 if is_filler else own], float(not is_filler), len(together) / processes)

    def _read(self, index: int, position: Position) -> Mapping[str, Any]:
        if position.epoch != self._told_epoch:
            self._tell("set_current_epoch", position.epoch)
            self._told_epoch = position.epoch
        self._tell("set_current_step", updates_before(position, self.batches_per_epoch, self.run.accumulation))
        place = ("dataset class", position.epoch, index)
        random.seed(seed_for(self.seed, *place))
        np.random.seed(seed_for(self.seed, *place) % 2**32)
        seed_global_generators(self.seed, *place)
        item = _done(f"item {index} of {self.name}", lambda: self.dataset[index])
        if not isinstance(item, Mapping):
            raise self._refusal(index, f"is a {type(item).__name__} and not a dictionary")
        return item

    def _tell(self, method: str, value: int) -> None:
        if callable(told := getattr(self.dataset, method, None)):
            _done(f"{method} of {self.name}", lambda: told(value))

    def _refusal(self, index: int, problem: str) -> OptionError:
        return OptionError(FLAG, f"item {index} of {self.name}: {problem}", "mend the class")

    # ------------------------------------------------------------------------------------------ from item to batch

    def _batch(self, share: _ItemShare, item: Mapping[str, Any], epoch: int) -> Batch:
        is_latents = item.get("latents") is not None
        pixels = self._tensor(share.item, item, "latents" if is_latents else "images")
        if pixels.dim() != 4 or pixels.shape[1] != (4 if is_latents else 3) or not len(pixels):
            shape = "(B, 4, H, W)" if is_latents else "(B, 3, H, W)"
            raise self._refusal(share.item, f"its {'latents' if is_latents else 'images'} are not {shape}")
        count, stride = len(pixels), 1 if is_latents else LATENT_STRIDE
        height, width = pixels.shape[2:]
        if not height or not width or height % stride or width % stride:
            raise self._refusal(share.item, f"its images are {width}x{height}; sides have to be multiples of {stride}")
        self._check_range(share.item, pixels, None if is_latents else LARGEST_PIXEL)
        ids = [share.item * SAMPLES_PER_ITEM + number for number in range(count)]
        latent_chw = (4, height // stride, width // stride)
        hw = torch.tensor([[side * (LATENT_STRIDE // stride) for side in (height, width)]] * count)
        captions = self._captions(share.item, item, count)
        tokens = self._token_ids(share.item, item, captions, count)
        weights = item.get("loss_weights")
        weights_B = torch.ones(count)
        if weights is not None:
            weights_B = self._numbers(share.item, "loss_weights", weights).float().reshape(-1)
        if len(weights_B) != count or not weights_B.isfinite().all():
            raise self._refusal(share.item, f"it has {count} images, and its loss_weights are not as many numbers")
        pairs = [self._pairs(share.item, item, name, count) for name in PAIRS]
        return Batch(
            **noise_fields([self.run.draw(epoch, sample_id, latent_chw) for sample_id in ids]),
            **tokens,
            captions=captions,
            loss_weight_B=weights_B * share.weight,
            denominator=count * share.real_share,
            original_hw_B2=hw if pairs[0] is None else pairs[0],
            crop_yx_B2=torch.zeros_like(hw) if pairs[1] is None else pairs[1],
            target_hw_B2=hw if pairs[2] is None else pairs[2],
            image_names=tuple(f"{self.name}[{share.item}][{number}]" for number in range(count)),
            images_BCHW=None if is_latents else pixels,
            latents_BCHW=pixels if is_latents else None,
            posterior_noise_BCHW=None if is_latents else self._posterior_noise(epoch, ids, latent_chw),
        )

    def _posterior_noise(self, epoch: int, ids: Sequence[int], latent_chw: tuple[int, int, int]) -> torch.Tensor:
        generators = [torch_generator(self.seed, "posterior", epoch, sample_id) for sample_id in ids]
        return torch.stack([torch.randn(latent_chw, generator=generator) for generator in generators])

    def _tensor(self, index: int, item: Mapping[str, Any], name: str) -> torch.Tensor:
        if item.get(name) is None:
            raise self._refusal(index, "it has neither images nor latents")
        return self._numbers(index, name, item[name]).float()

    def _numbers(self, index: int, name: str, value: Any) -> torch.Tensor:
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise self._refusal(index, f"its {name} are no tensor") from None

    def _check_range(self, index: int, pixels: torch.Tensor, largest: float | None) -> None:
        low, high = pixels.min().item(), pixels.max().item()  # not a number where any pixel is none
        if not math.isfinite(low + high):
            raise self._refusal(index, "its images or latents are not finite numbers")
        if largest is not None and max(-low, high) > largest:
            raise self._refusal(index, f"its images go from {low:g} to {high:g}, and not from -1 to 1")

    def _captions(self, index: int, item: Mapping[str, Any], count: int) -> tuple[str, ...]:
        captions = item.get("captions")
        if captions is None and item.get("input_ids") is not None:
            return ("",) * count
        if not isinstance(captions, Sequence) or not all(isinstance(caption, str) for caption in captions):
            raise self._refusal(index, "its captions are no list of texts, and it has no input_ids")
        if isinstance(captions, str) or len(captions) != count:
            raise self._refusal(index, f"it has {count} images and {len(captions)} captions")
        return tuple(captions)

    def _token_ids(self, index: int, item: Mapping[str, Any], captions: Sequence[str], count: int) -> dict[str, Any]:
        if item.get("input_ids") is None:
            tokens = self.run.tokenize(captions)
            return {"token_ids": tokens.ids, "token_weights": tokens.weights}
        found = [item[name] for name in ("input_ids", "input_ids2") if item.get(name) is not None]
        ids = tuple(self._numbers(index, "input_ids", each) for each in found)
        ids = tuple(each[:, None] if each.dim() == 2 else each for each in ids)
        if any(each.dim() != 3 or len(each) != count or each.shape[2] != 77 for each in ids):
            raise self._refusal(index, "its input_ids are not (B, 77) or (B, N, 77)")
        if any(((each < 0) | (each > END_ID) | (each != each.long())).any() for each in ids):
            raise self._refusal(index, f"its input_ids are not all whole numbers from 0 to {END_ID}")
        return {"token_ids": tuple(each.long() for each in ids)}

    def _pairs(self, index: int, item: Mapping[str, Any], name: str, count: int) -> torch.Tensor | None:
        if item.get(name) is None:
            return None
        if not hasattr(item[name], "__len__"):
            raise self._refusal(index, f"its {name} are not (B, 2)")
        pairs = [self._numbers(index, name, pair) for pair in item[name]]
        if len(pairs) != count or any(pair.numel() != 2 for pair in pairs):
            raise self._refusal(index, f"its {name} are not (B, 2)")
        return torch.stack(pairs).long()
