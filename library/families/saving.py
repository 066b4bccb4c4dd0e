"""Writing whole models of any family: single files and Diffusers folders."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from library.checkpoints.diffusers_folder import EXTRAS, save_diffusers_folder
from library.checkpoints.probe import MODEL_FLAG, resolve_model
from library.checkpoints.sd import ModelState, save_single_file
from library.checkpoints.source import ModelSource
from library.checkpoints.weights import Weights, open_weights
from library.families.base import LoadPlan, ModelBundle
from library.families.sd_parts import TEXT_PARTS, load_from_file, load_from_folder
from library.models import float8
from library.options import OptionError

logger = logging.getLogger(__name__)


def save_model(
    bundle: ModelBundle,
    path: Path,
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    as_diffusers: bool,
    safe_serialization: bool = True,
) -> None:
    """Write a single file (.safetensors, or .ckpt by extension) or a Diffusers folder, atomically.

    Tensors are converted and written one by one, so that no second copy of the weights exists; they are only read.
    A part that is kept in 8 bits has its weights read anew from the model's source, in the part's precision.
    Raises NonFiniteError rather than write NaN, and OptionError where the disk can't take the model. The files of a
    folder are .safetensors, or .bin without `safe_serialization`.

    What a single-file source holds beside the model goes along unchanged. In a .ckpt, `ss_epoch` and `ss_steps` of
    `metadata` are added to the source's counters; no ss_* key is written, for whole models have none in the trade.
    """
    parts: dict[str, Any] = {"unet": bundle.unet, "vae": bundle.vae}
    parts |= zip(TEXT_PARTS, bundle.text_encoders, strict=False)
    model = ModelState(
        kind=bundle.source.kind,
        **{name: part.state_dict() | _frozen_in_8_bits(name, part, bundle) for name, part in parts.items()},
        v_prediction=bundle.source.v_prediction,
        zero_terminal_snr=bundle.source.zero_terminal_snr,
    )
    with _source_weights(bundle.source) as source, _disk_errors_of(path):
        if not as_diffusers:
            counters = int(metadata.get("ss_epoch", 0)), int(metadata.get("ss_steps", 0))
            kept = {name: text for name, text in metadata.items() if not name.startswith("ss_")}
            save_single_file(model, path, source=source, dtype=dtype, metadata=kept, counters=counters)
            return
        configs = {name: part.config for name, part in parts.items()}
        save_diffusers_folder(
            model,
            configs,
            path,
            source=source,
            dtype=dtype,
            template=_folder_of(bundle.source),
            safe_serialization=safe_serialization,
        )


def _frozen_in_8_bits(name: str, part: torch.nn.Module, bundle: ModelBundle) -> dict[str, torch.Tensor]:
    """The weights of a part's layers that are kept in 8 bits, in full: from the source, else as they are kept."""
    layers = float8.layers_in_8_bits(part)
    if not layers:
        return {}
    dtype = next(iter(layers.values())).full_dtype
    try:
        read = _read_again(name, bundle, dtype).state_dict()
    except OptionError as error:
        logger.warning("%s is saved as it is kept, in 8 bits: its weights can't be read again (%s)", name, error)
        return {f"{layer}.weight": module.weight for layer, module in layers.items()}
    return {f"{layer}.weight": read[f"{layer}.weight"] for layer in layers}


def _read_again(name: str, bundle: ModelBundle, dtype: torch.dtype) -> torch.nn.Module:
    """One part of the model as it was read, on the CPU; raises OptionError where the source is gone."""
    found = resolve_model(bundle.source.path)
    group = "text_encoders" if name in TEXT_PARTS else name
    plan = LoadPlan(dtype, dtype, dtype, torch.device("cpu"), frozenset({group}))
    if found.is_dir():
        parts = load_from_folder(found, bundle.vae, plan, MODEL_FLAG)
    else:
        parts = load_from_file(found, bundle.source.kind, bundle.vae, plan, MODEL_FLAG)
    return parts.text_encoders[TEXT_PARTS.index(name)] if name in TEXT_PARTS else getattr(parts, name)


@contextlib.contextmanager
def _disk_errors_of(path: Path) -> Iterator[None]:
    """Say what a disk that fails or fills up while `path` is written means for the user."""
    try:
        yield
    except OSError as error:
        problem = f"can't write {path} ({error.strerror or error})"
        raise OptionError("", problem, "free some space or choose another folder") from error


def _folder_of(source: ModelSource) -> Path | None:
    """The Diffusers folder the model came from."""
    return None if source.is_single_file else resolve_model(source.path)


@contextlib.contextmanager
def _source_weights(source: ModelSource) -> Iterator[Weights | None]:
    """What the model's source holds for saving: its single file, or what a Diffusers folder keeps of one."""
    try:
        found = resolve_model(source.path)
    except OptionError:
        logger.warning("%s is gone: what it held beside the model can't be saved", source.path)
        yield None
        return
    file = found if found.is_file() else found / EXTRAS
    if not file.is_file():
        yield None
        return
    with open_weights(file) as weights:
        yield weights
