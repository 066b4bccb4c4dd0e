"""A stored model, single file or Diffusers folder, whose tensors are read when they are written elsewhere.

No module is built, so neither diffusers nor transformers is needed; names and sizes come from headers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.architecture import (
    ArchitectureError,
    text_architectures,
    unet_architecture,
    vae_architecture,
    vae_prefix,
)
from library.checkpoints.configs import SDXL_VAE_SCALE, VAE_SCALE, text_config, unet_config, vae_config
from library.checkpoints.keymaps import (
    FUSED_QKV,
    UNET_PREFIX,
    Slot,
    classic_text_key,
    count_items,
    is_vae_attention_weight,
    modern_vae_key,
)
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.own_folders import EXTRAS
from library.checkpoints.parameter_names import text_names, unet_names, vae_names
from library.checkpoints.probe import probe_any, read_config, resolve_model
from library.checkpoints.safetensors_io import DTYPES
from library.checkpoints.sd import PART_NAMES, ModelState, part_reader, part_slots
from library.checkpoints.source import ModelSource
from library.checkpoints.weights import Weights, open_component, open_weights
from library.options import OptionError

if TYPE_CHECKING:
    import torch

STEMS = {
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
}
MATRICES = (".proj_in.weight", ".proj_out.weight")
NO_PARAMETER = ".position_ids"  # numbers that old programs keep beside the parameters of text encoders


@dataclass(frozen=True)
class StoredModel:
    """What is stored: valid as long as its files are open."""

    source: ModelSource
    state: ModelState  # of deferred tensors
    configs: Mapping[str, Any]  # of the parts, as config.json has them
    extras: Weights | None  # the single file, or what a folder keeps of one
    folder: Path | None  # a Diffusers folder's, with its scheduler and tokenizers
    metadata: Mapping[str, str]  # of a single file's header


@contextlib.contextmanager
def stored_model(
    path: str,
    flag: str,
    *,
    variant: str | None = None,
    done: Callable[[int], object] = lambda size: None,
) -> Iterator[StoredModel]:
    """A whole SD 1.x, 2.x or SDXL model; raises OptionError, naming `flag`, for anything else and for what is missing.

    `variant` names the files of a Diffusers folder; `done` hears of the bytes of each tensor that is read.
    """
    source = probe_any(path, flag=flag, may_inpaint=True)
    found = resolve_model(path, flag)
    with contextlib.ExitStack() as stack:
        if found.is_dir():
            yield _from_folder(found, source, flag, variant, Reading(stack, done))
            return
        if variant:
            raise OptionError("--variant", f"{path} is a single file", "leave it out, or name a Diffusers folder")
        yield _from_file(found, source, flag, Reading(stack, done))


@dataclass(frozen=True)
class Reading:
    """How parts are read: files that are open until the end, and who hears of it."""

    files: contextlib.ExitStack
    done: Callable[[int], object]

    def open(self, weights: Weights) -> Weights:
        return self.files.enter_context(weights)

    def deferred(self, shape: tuple[int, ...], dtype: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        import torch

        from library.checkpoints.deferred import Deferred

        def produce() -> torch.Tensor:
            tensor = read().reshape(shape)
            self.done(tensor.nbytes)
            return tensor

        return Deferred(shape, getattr(torch, DTYPES[dtype][1]), produce)


# ------------------------------------------------------------------------------------------- single file


def _from_file(path: Path, source: ModelSource, flag: str, reading: Reading) -> StoredModel:
    weights = reading.open(open_weights(path, flag))
    names, configs = _parts_of_file(weights, source, flag)
    subject = f"{flag}: {path}"
    parts = {part: _file_part(part, own, weights, source.kind, subject, reading) for part, own in names.items()}
    return StoredModel(source, _model_state(source, parts), configs, weights, None, weights.metadata)


def _parts_of_file(
    weights: Weights, source: ModelSource, flag: str
) -> tuple[dict[str, set[str]], dict[str, dict[str, Any]]]:
    """The parameter names of each part, and its configuration."""
    shapes, is_sdxl = weights.shapes, source.kind == "sdxl"
    try:
        unet = unet_architecture(shapes, source.kind)
        vae = vae_architecture(shapes, vae_prefix(shapes))
        encoders = dict(zip(("text_encoder", "text_encoder_2"), text_architectures(shapes, source.kind), strict=False))
    except ArchitectureError as error:
        raise OptionError(flag, f"{source.path} is incomplete: {error}", "use a complete checkpoint") from None
    names = {"unet": unet_names(unet), "vae": vae_names(vae)}
    names |= {part: text_names(own.layers, is_projected=bool(own.projection)) for part, own in encoders.items()}
    size, scale = (1024, SDXL_VAE_SCALE) if is_sdxl else (512, VAE_SCALE)
    configs = {
        "unet": unet_config(unet, sample_size=128 if is_sdxl else 64),
        "vae": vae_config(vae, sample_size=size, scale=scale),
        **{part: {"model_type": "clip_text_model", **text_config(own)} for part, own in encoders.items()},
    }
    return names, configs


def _file_part(
    part: str, names: set[str], weights: Weights, kind: str, subject: str, reading: Reading
) -> dict[str, torch.Tensor]:
    read = part_reader(part, names, weights, kind=kind, subject=subject)
    slots = part_slots(part, names, kind=kind, file_keys=weights.shapes)
    return {
        name: reading.deferred(
            parameter_shape(slot, tuple(weights.shapes[slot.key])),
            weights.dtypes[slot.key],
            lambda name=name: read(name),
        )
        for name, slot in sorted(slots.items())
    }


def parameter_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape from that of its place in a single file."""
    if slot.is_transposed:
        return shape[::-1]
    if slot.part is not None:
        return (shape[0] // len(FUSED_QKV), *shape[1:])
    return shape[:2] if is_vae_attention_weight(slot.key) else shape


# ------------------------------------------------------------------------------------- Diffusers folder


def _from_folder(folder: Path, source: ModelSource, flag: str, variant: str | None, reading: Reading) -> StoredModel:
    parts, configs = {}, {}
    for part, stem in STEMS.items():
        if part == "text_encoder_2" and source.kind != "sdxl":
            continue
        configs[part] = read_config(folder / part / "config.json", flag)
        weights = reading.open(open_component(folder / part, stem, flag, variant))
        parts[part] = _folder_part(part, weights, source.kind, f"{flag}: {folder / part}", reading)
    if source.kind == "sd2":
        configs["unet"] |= {"use_linear_projection": True}  # see _shape_in_file
    extras = folder / EXTRAS
    kept = reading.open(open_weights(extras, flag)) if extras.is_file() else None
    return StoredModel(source, _model_state(source, parts), configs, kept, folder, {})


def _folder_part(part: str, weights: Weights, kind: str, subject: str, reading: Reading) -> dict[str, torch.Tensor]:
    keys = {_modern_name(part, key): key for key in weights.shapes}
    return {
        name: reading.deferred(shape, weights.dtypes[keys[name]], lambda key=keys[name]: weights.tensor(key))
        for name, shape in sorted(folder_part_shapes(part, weights, kind, subject).items())
    }


def folder_part_shapes(part: str, weights: Weights, kind: str, subject: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> size, as a single file has it; OptionError for what is missing, and what has no place there."""
    shapes = {
        name: _shape_in_file(name, tuple(weights.shapes[key]), kind)
        for key in weights.shapes
        if not (name := _modern_name(part, key)).endswith(NO_PARAMETER)
    }
    try:
        missing = sorted(_names_of_folder_part(part, shapes, kind) - set(shapes))
    except (ArchitectureError, KeyError) as error:
        raise OptionError("", f"{subject} is no {PART_NAMES[part]} of {KIND_NAMES[kind]}: {error.args[0]}") from None
    if missing:
        raise OptionError("", f"{subject} lacks {len(missing)} tensors ({missing[0]} ...)", "use a complete model")
    return shapes


def _modern_name(part: str, key: str) -> str:
    if part.startswith("text"):
        return classic_text_key(key)
    return modern_vae_key(key) if part == "vae" else key


def _names_of_folder_part(part: str, shapes: Mapping[str, tuple[int, ...]], kind: str) -> set[str]:
    """The names a part of these sizes has to have; KeyError for a name that has no place in a single file."""
    slots = part_slots(part, shapes, kind=kind)
    if part.startswith("text"):
        layers = count_items(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
        return text_names(layers, is_projected=part == "text_encoder_2")
    if part == "vae":
        return vae_names(vae_architecture(shapes, ""))
    return unet_names(unet_architecture({slot.key: shapes[name] for name, slot in slots.items()}, kind))


def _shape_in_file(name: str, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """SD 2.x's projections are matrices in single files; some folders have them as convolutions."""
    is_pointwise = len(shape) == 4 and math.prod(shape[2:]) == 1
    return shape[:2] if kind == "sd2" and name.endswith(MATRICES) and is_pointwise else shape


def _model_state(source: ModelSource, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> ModelState:
    return ModelState(
        source.kind, **parts, v_prediction=source.v_prediction, zero_terminal_snr=source.zero_terminal_snr
    )


# ------------------------------------------------------------------------------------------ sizes alone


def original_shapes(path: str, flag: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    """(kind, sizes by the keys of a single file) of a model, also of a Diffusers folder; headers only."""
    source = probe_any(path, flag=flag, may_inpaint=True)
    found = resolve_model(path, flag)
    if not found.is_dir():
        with open_weights(found, flag) as weights:
            return source.kind, dict(weights.shapes)
    sizes: dict[str, tuple[int, ...]] = {}
    for part, stem in STEMS.items():
        if part == "text_encoder_2" and source.kind != "sdxl":
            continue
        with open_component(found / part, stem, flag) as weights:
            shapes = folder_part_shapes(part, weights, source.kind, f"{flag}: {found / part}")
        for name, slot in part_slots(part, shapes, kind=source.kind).items():
            sizes[slot.key] = _place_shape(slot, shapes[name])
    return source.kind, sizes


def _place_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The size of a place in a single file from that of a parameter; the opposite of `parameter_shape`."""
    if slot.is_transposed:
        return shape[::-1]
    if slot.part is not None:
        return (shape[0] * len(FUSED_QKV), *shape[1:])
    return (*shape[:2], 1, 1) if is_vae_attention_weight(slot.key) else shape


def model_places(shapes: Mapping[str, tuple[int, ...]], kind: str) -> set[str]:
    """The keys that a single file of these sizes has to have for the parts of which it holds anything.

    Raises ArchitectureError for parts that are no model's.
    """
    names: dict[str, set[str]] = {}
    prefix = vae_prefix(shapes)
    if f"{UNET_PREFIX}input_blocks.0.0.weight" in shapes:
        names["unet"] = unet_names(unet_architecture(shapes, kind))
    if f"{prefix}encoder.conv_in.weight" in shapes:
        names["vae"] = vae_names(vae_architecture(shapes, prefix))
    if any(key.startswith(("cond_stage_model.", "conditioner.")) for key in shapes):
        encoders = text_architectures(shapes, kind)
        for part, sizes in zip(("text_encoder", "text_encoder_2"), encoders, strict=False):
            names[part] = text_names(sizes.layers, is_projected=bool(sizes.projection))
    return {
        slot.key for part, own in names.items() for slot in part_slots(part, own, kind=kind, file_keys=shapes).values()
    }
