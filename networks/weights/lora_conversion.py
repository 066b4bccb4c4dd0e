"""LoRA files between the trade's form and that of diffusers and PEFT, both ways and without loss.

    the trade:  lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
    diffusers:  unet.mid_block.attentions.0.proj_in.lora_A.weight, .lora_B.weight; alphas in the header

What diffusers' form has no place for (the data types of alphas, the layers that the trade keeps as convolutions) is
noted in the header too, so that a file that went there and back has the same tensors, with their keys, types and
shapes, and the same notes in its header. Files of this project's own order of tensors are the same byte for byte.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.checkpoints.adapter_metadata import METADATA_KEY, adapter_metadata
from library.checkpoints.hashed_file import LEGACY_HASH, MODEL_HASH, SPEC_HASH
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.safetensors_io import DTYPES, Entry, rounded
from library.options import OptionError
from networks.key_names import DOWN, PEFT_KEY, UP
from networks.weights.diffusers_paths import diffusers_path, dimensions
from networks.weights.file_identity import algorithms
from networks.weights.network_file import NetworkFile

if TYPE_CHECKING:
    import torch

TRADE_FORM = "lora_trade_form"  # header entry: what a file of the trade was, beside what diffusers' form says
SIDES = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
ALPHA = "alpha"
PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}
BASE_VERSIONS = {
    "sd1": {"ss_v2": "False", "ss_base_model_version": "sd_v1"},
    "sd2": {"ss_v2": "True"},
    "sdxl": {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"},
}


@dataclass(frozen=True)
class Converted:
    """A file to be written."""

    entries: list[Entry]
    metadata: dict[str, str]
    modules: int


def is_in_diffusers_form(file: NetworkFile) -> bool:
    """Whether keys are paths of diffusers' models."""
    return any(PEFT_KEY.fullmatch(key) for key in file.weights.shapes)


def check_plain(file: NetworkFile) -> None:
    """OptionError for anything but a LoRA of pairs of projections, which both forms know."""
    odd = [name for name in file.modules if name not in frozenset(file.pairs)]
    if odd or file.other_keys:
        example = next((key for name in odd for key in file.modules[name].values()), None) or file.other_keys[0]
        problem = f"{file.path} is no plain LoRA but {algorithms(file.weights.shapes)}: it has {example}"
        raise OptionError(file.where, problem, "only pairs of projections with their alphas can be converted")
    for name in file.pairs:
        extra = set(file.modules[name]) - {DOWN, UP, ALPHA}
        if extra:
            problem = f"{file.path} is no plain LoRA: {name} has {min(extra)}"
            raise OptionError(file.where, problem, "only pairs of projections with their alphas can be converted")


# ------------------------------------------------------------------------------------------ to diffusers


def to_diffusers(file: NetworkFile, *, precision: str | None = None, folds_alpha: bool = False) -> Converted:
    """A LoRA of the trade in diffusers' form; `precision` is a data type as headers name it, None keeps each one's.

    `folds_alpha`: multiplied into lora_B, for programs that take alpha for the rank; the way back is then not exact.
    Raises OptionError for a file that is no plain LoRA, or names layers that diffusers has not.
    """
    check_plain(file)
    paths = {name: diffusers_path(name, str(file.path)) for name in file.pairs}
    entries: list[Entry] = []
    for name, path in paths.items():
        ndim = dimensions(path, file.kind)
        for part, side in SIDES.items():
            factor = file.scale(name) if folds_alpha and part == UP else 1.0
            shape = _shape(file, name, part, ndim)
            entries.append(_entry(file, name, part, f"{path}.{side}", shape=shape, dtype=precision, factor=factor))
    metadata = {key: text for key, text in file.metadata.items() if key not in (MODEL_HASH, LEGACY_HASH, SPEC_HASH)}
    if not folds_alpha:
        alphas = {name: _alpha(file, name) for name in paths}
        metadata[METADATA_KEY] = adapter_metadata({paths[name]: (file.rank(name), alphas[name]) for name in paths})
        metadata[TRADE_FORM] = json.dumps(_trade_form(file, paths, precision), sort_keys=True)
    return Converted(entries, metadata, len(paths))


def _alpha(file: NetworkFile, name: str) -> float:
    alpha = file.alpha(name)
    return float(file.rank(name)) if alpha is None else alpha


def _shape(file: NetworkFile, name: str, part: str, ndim: int | None) -> tuple[int, ...]:
    """A factor's shape; that of a matrix for each pixel has `ndim` dimensions."""
    shape = file.shape(name, part)
    if ndim is None or math.prod(shape[2:]) != 1:
        return shape
    return (*shape[:2], *(1,) * (ndim - 2))


def _trade_form(file: NetworkFile, paths: Mapping[str, str], precision: str | None) -> dict[str, Any]:
    """The data type and shape of alphas (the usual one, and those that differ; None: there is none), and the number
    of dimensions of what diffusers has otherwise."""
    alphas: dict[str, tuple[str, int] | None] = {}
    for name in paths:
        key = file.modules[name].get(ALPHA)
        dtype = None if key is None else precision or file.weights.dtypes[key]
        alphas[name] = None if dtype is None else (dtype, len(file.shape(name, ALPHA)))
    usual = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "alpha": usual,
        "alphas": {name: form for name, form in alphas.items() if form != usual},
        "dimensions": {
            name: len(file.shape(name, DOWN))
            for name, path in paths.items()
            if len(_shape(file, name, DOWN, dimensions(path, file.kind))) != len(file.shape(name, DOWN))
        },
    }


# ------------------------------------------------------------------------------------------ to the trade


def to_trade(file: NetworkFile, *, precision: str | None = None) -> Converted:
    """A LoRA in diffusers' form, old or new, in that of the trade, with an alpha for each module.

    Raises OptionError for a file that is no plain LoRA.
    """
    check_plain(file)
    form = _noted_form(file)
    dims: Mapping[str, int] = form.get("dimensions", {})
    entries: list[Entry] = []
    for name in file.pairs:
        for part in SIDES:
            shape = _shape(file, name, part, dims.get(name))
            entries.append(_entry(file, name, part, f"{name}.{part}", shape=shape, dtype=precision))
        alpha = form["alphas"].get(name, form["alpha"]) if form else ("F32", 0)
        if alpha is not None:
            dtype, alpha_dims = alpha
            if not (precision or dtype).startswith(("F", "BF")) and not _alpha(file, name).is_integer():
                problem = f"{file.path}: {TRADE_FORM} of its header says that alpha of {name} is a whole number"
                raise OptionError(file.where, f"{problem}, and it is {_alpha(file, name):g}", "use --save_precision")
            entries.append(_alpha_entry(f"{name}.{ALPHA}", _alpha(file, name), precision or dtype, (1,) * alpha_dims))
    metadata = {key: text for key, text in file.metadata.items() if key not in (METADATA_KEY, TRADE_FORM)}
    if not form and not any(key.startswith("ss_") for key in metadata):
        metadata |= _least_metadata(file)
    return Converted(entries, metadata, len(file.pairs))


def _noted_form(file: NetworkFile) -> dict[str, Any]:
    if TRADE_FORM not in file.metadata:
        return {}
    try:
        form = json.loads(file.metadata[TRADE_FORM])
        alphas = [each for each in (form["alpha"], *form["alphas"].values()) if each is not None]
        numbers = [*form.get("dimensions", {}).values(), *(dims for _, dims in alphas)]
        if not all(dtype in DTYPES and dtype != "C64" for dtype, _ in alphas):
            raise ValueError
        if not all(type(number) is int and 0 <= number <= 4 for number in numbers):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        problem = f"{file.path}: the entry {TRADE_FORM} of its header can't be understood"
        raise OptionError(file.where, problem, "take another file") from None
    return form


def _least_metadata(file: NetworkFile) -> dict[str, str]:
    """What user interfaces ask of a LoRA's header, as the trade's merging tools write it."""
    ranks = {file.rank(name) for name in file.pairs}
    alphas = {_alpha(file, name) for name in file.pairs}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        **(BASE_VERSIONS[file.kind] if file.kind in KIND_NAMES else {}),
    }


# ---------------------------------------------------------------------------------------------- tensors


def _entry(
    file: NetworkFile,
    name: str,
    part: str,
    key: str,
    *,
    shape: tuple[int, ...],
    dtype: str | None,
    factor: float = 1.0,
) -> Entry:
    own = file.weights.dtypes[file.modules[name][part]]

    def produce() -> torch.Tensor:
        tensor = file.tensor(name, part).reshape(shape)
        if factor != 1.0:
            tensor = tensor.float() * factor
        return rounded(tensor, torch_dtype(dtype or own), f"{file.path}: {key}")

    return Entry(key, dtype or own, shape, produce)


def _alpha_entry(key: str, value: float, dtype: str, shape: tuple[int, ...]) -> Entry:
    def produce() -> torch.Tensor:
        import torch

        return torch.full(shape, value, dtype=torch_dtype(dtype))

    return Entry(key, dtype, shape, produce)


def torch_dtype(name: str) -> torch.dtype:
    """ "F16" -> torch.float16."""
    import torch

    return getattr(torch, DTYPES[name][1])
