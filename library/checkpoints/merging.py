"""The weighted sum of model files, a piece of a tensor at a time, in the layout of the first one.

What is held in memory is one tensor of the output and small pieces of it in the precision of the computation; inputs
are memory-mapped. Nothing here imports torch before tensors are produced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.architecture import is_refiner, model_kind
from library.checkpoints.keymaps import (
    CLIP_PREFIX,
    PROJECTION,
    SDXL_CLIP_PREFIX,
    SDXL_OPENCLIP_PREFIX,
    UNET_PREFIX,
    Slot,
    classic_text_key,
)
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.probe import LORA_KEYS, says_v_prediction
from library.checkpoints.safetensors_io import DTYPES, Entry, NonFiniteError, TooLargeError, is_finite
from library.checkpoints.scaled import check_not_scaled
from library.checkpoints.weights import Weights, open_weights
from library.options import OptionError

if TYPE_CHECKING:
    import torch

PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}
OUTSIDE_UNET = ("first_stage_model", "cond_stage_model", "conditioner.")  # VAE and text encoders, anywhere in a key
PIECE = 1 << 20  # elements that are computed at a time
MIX_LIKE_WITH_LIKE = "merge models of one kind"


@dataclass(frozen=True)
class ModelFile:
    """An open model file, its tensors by the names that the merged file has for them."""

    path: Path
    weights: Weights
    slots: Mapping[str, Slot]
    kind: str  # "sd1" | "sd2" | "sdxl", or "" for what holds no whole U-Net, such as a VAE alone
    what: str  # in words
    v_prediction: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(self.weights.shapes[slot.key]) for name, slot in self.slots.items()}
        return {name: shape[::-1] if self.slots[name].is_transposed else shape for name, shape in shapes.items()}

    def dtype(self, name: str) -> str:
        """As a header names it."""
        return self.weights.dtypes[self.slots[name].key]

    def tensor(self, name: str) -> torch.Tensor:
        slot = self.slots[name]
        tensor = self.weights.tensor(slot.key)
        return tensor.T.contiguous() if slot.is_transposed else tensor


@dataclass(frozen=True)
class MergeSettings:
    """How models are summed. Precisions are keys of PRECISIONS."""

    ratios: Sequence[float]  # of each model; they need not add up to 1
    unet_only: bool = False
    precision: str = "float"  # of the computation
    saving_precision: str = "float"
    device: str = "cpu"  # of the computation


@dataclass(frozen=True)
class Unmatched:
    """What a model has in other ways than the first one, by the names of the merged file."""

    missing: tuple[str, ...] = ()  # of the first one's: its own values take the model's ratio
    skipped: tuple[str, ...] = ()  # that the first one has not: left out


def open_model(path: Path, where: str) -> ModelFile:
    """A model's file; only its header is read. OptionError names `where` (a flag) for what is none."""
    weights = open_weights(path, where)
    check_not_scaled(weights.shapes, path, where)
    if any(LORA_KEYS.search(key) for key in weights.shapes):
        way_out = "merge LoRAs by networks/merge_lora.py, sdxl_merge_lora.py or svd_merge_lora.py"
        raise OptionError(where, f"{path} is a LoRA, not a model", way_out)
    kind = model_kind(weights.shapes)
    slots: dict[str, Slot] = {}
    for key in sorted(weights.shapes):
        name, slot = _named(key)
        if name == key or name not in weights.shapes:  # a file may hold both spellings
            slots[name] = slot
    return ModelFile(
        path, weights, slots, kind, _in_words(weights, kind), says_v_prediction(weights.shapes, weights.metadata)
    )


def _named(key: str) -> tuple[str, Slot]:
    """The name in the merged file of a file's key: text encoders are spelled in different ways."""
    for prefix in (CLIP_PREFIX, SDXL_CLIP_PREFIX):
        if key.startswith(prefix):
            return prefix + classic_text_key(key.removeprefix(prefix)), Slot(key)
    if key == f"{SDXL_OPENCLIP_PREFIX}{PROJECTION}.weight":  # a Linear, see keymaps
        return f"{SDXL_OPENCLIP_PREFIX}{PROJECTION}", Slot(key, is_transposed=True)
    return key, Slot(key)


def _in_words(weights: Weights, kind: str) -> str:
    if not kind:
        return "no Stable Diffusion model"
    if is_refiner(weights.shapes):
        return "the SDXL refiner"
    channels = weights.shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", (0, 4))[1]
    special = {4: "", 9: ", for inpainting"}.get(channels, f", whose U-Net takes {channels} channels")
    return f"{KIND_NAMES[kind]}{special}"


def unmatched(models: Sequence[ModelFile], where: str) -> list[Unmatched]:
    """What each model has beside the first one; OptionError names `where` for models that can't be summed."""
    first, shapes = models[0], models[0].shapes
    found = []
    for model in models:
        if model.what != first.what:
            problem = f"{first.path} is {first.what}, and {model.path} is {model.what}"
            raise OptionError(where, problem, MIX_LIKE_WITH_LIKE)
        own = model.shapes
        common = [name for name in shapes if name in own]
        if not common:
            raise OptionError(where, f"{model.path} has no tensor in common with {first.path}", MIX_LIKE_WITH_LIKE)
        for name in common:
            if _essential(own[name]) != _essential(shapes[name]):
                problem = f"{name} is {list(shapes[name])} in {first.path} and {list(own[name])} in {model.path}"
                raise OptionError(where, problem, MIX_LIKE_WITH_LIKE)
        missing = tuple(name for name in shapes if name not in own)
        found.append(Unmatched(missing, tuple(name for name in own if name not in shapes)))
    return found


def _essential(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution is a matrix: the projections around attention are written in both ways."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def merged_entries(
    models: Sequence[ModelFile], settings: MergeSettings, on_done: Callable[[int], object] = lambda num_bytes: None
) -> list[Entry]:
    """The tensors of sum_i ratio_i w_i, each computed when its turn to be written comes.

    They are those of the first model; where another one lacks a tensor, the first one's value takes its ratio. Whole
    numbers are the first one's, and, with `unet_only`, VAE and text encoders. `on_done` is told the bytes of each.
    """
    entries = []
    for name, shape in models[0].shapes.items():
        dtype = models[0].dtype(name)
        if name.endswith(".position_ids") or not dtype.startswith(("F", "BF")):
            dtype = "I64" if dtype.startswith(("F", "BF")) else dtype  # some tools turn position ids into floats
            terms = [(models[0], 1.0)]
        else:
            dtype, terms = PRECISIONS[settings.saving_precision], _terms(models, settings, name)
        entries.append(_entry(name, dtype, shape, terms, settings, on_done))
    return entries


def _terms(models: Sequence[ModelFile], settings: MergeSettings, name: str) -> list[tuple[ModelFile, float]]:
    if settings.unet_only and any(part in name for part in OUTSIDE_UNET):
        return [(models[0], 1.0)]
    pairs = list(zip(models, settings.ratios, strict=True))
    stands_in = sum(ratio for model, ratio in pairs if name not in model.slots)
    own = [(model, ratio) for model, ratio in pairs if name in model.slots]
    return [(models[0], own[0][1] + stands_in), *own[1:]]


def _entry(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    terms: Sequence[tuple[ModelFile, float]],
    settings: MergeSettings,
    on_done: Callable[[int], object],
) -> Entry:
    def produce() -> torch.Tensor:
        pairs = [(model.tensor(name), ratio) for model, ratio in terms]
        result = _copy(pairs[0][0], dtype) if pairs[0][1] == 1 and len(pairs) == 1 else _sum(pairs, dtype, settings)
        if not is_finite(result):
            raise _not_finite(name, dtype, [model for model, _ in terms], settings)
        on_done(entry.nbytes)
        return result.reshape(shape)

    entry = Entry(name, dtype, shape, produce, is_trusted=True)  # it is looked at above, where the culprit is known
    return entry


def _copy(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return tensor.to(getattr(torch, DTYPES[dtype][1]))


def _sum(pairs: Sequence[tuple[torch.Tensor, float]], dtype: str, settings: MergeSettings) -> torch.Tensor:
    """sum_i ratio_i w_i, flat, on the CPU."""
    import torch

    precision = getattr(torch, DTYPES[PRECISIONS[settings.precision]][1])
    result = torch.empty(pairs[0][0].numel(), dtype=getattr(torch, DTYPES[dtype][1]))
    flat = [(tensor.reshape(-1), ratio) for tensor, ratio in pairs]
    for start in range(0, len(result), PIECE):
        total = torch.zeros((), dtype=precision, device=settings.device)
        for tensor, ratio in flat:
            piece = tensor[start : start + PIECE].to(settings.device, precision)
            total = total + ratio * piece
        result[start : start + PIECE] = total
    return result


def _not_finite(name: str, dtype: str, models: Sequence[ModelFile], settings: MergeSettings) -> NonFiniteError:
    for model in models:
        if not is_finite(model.tensor(name)):
            return NonFiniteError(
                f"{model.path}: {name} holds NaN or infinity", "leave this model out, or get it again"
            )
    small = {"--precision": settings.precision, "--saving_precision": settings.saving_precision}
    flags = [flag for flag, precision in small.items() if precision == "fp16"]
    if not flags:
        return NonFiniteError(f"{name} is too large for {DTYPES[dtype][1]} once it is summed", "use smaller --ratios")
    return TooLargeError(
        f"{name} is too large for float16 once it is summed", f"use {' and '.join(flags)} bf16 or float"
    )
