"""Stable Diffusion 1.x / 2.x / XL as a single file, in the original (LDM) layout: places, reading, writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.architecture import vae_prefix
from library.checkpoints.keymaps import (
    CLIP_PREFIX,
    OPENCLIP_PREFIX,
    PROJECTION,
    SDXL_CLIP_PREFIX,
    SDXL_OPENCLIP_PREFIX,
    V_PREDICTION_MARKER,
    VAE_PREFIX,
    ZERO_TERMINAL_SNR_MARKER,
    Slot,
    clip_slots,
    is_vae_attention_weight,
    openclip_slots,
    unet_slots,
    vae_slots,
)
from library.checkpoints.safetensors_io import (
    Entry,
    entry_of,
    header_dtype,
    rounded,
    write_entries,
)
from library.checkpoints.torch_file import write_torch_file
from library.checkpoints.weights import Weights
from library.options import OptionError

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]  # parameter name of our module -> tensor

PART_NAMES = {
    "unet": "U-Net",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",  # SDXL
    "vae": "VAE",
}


@dataclass(frozen=True)
class ModelState:
    """The tensors of a model by our parameter names."""

    kind: str  # "sd1" | "sd2" | "sdxl"
    unet: State
    text_encoder: State
    vae: State
    text_encoder_2: State = field(default_factory=dict)  # SDXL only
    v_prediction: bool = False
    zero_terminal_snr: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """The empty tensors by which SDXL files say what readers can't see in the weights."""
        if self.kind != "sdxl":
            return ()
        return (V_PREDICTION_MARKER,) * self.v_prediction + (ZERO_TERMINAL_SNR_MARKER,) * self.zero_terminal_snr


def part_slots(part: str, keys: Iterable[str], *, kind: str, file_keys: Iterable[str] = ()) -> dict[str, Slot]:
    """Parameter name -> place in a single file, for one part (see PART_NAMES) with parameters `keys`.

    `file_keys` of an existing file decide between spellings; without a file they are the family's own.
    """
    file_keys = frozenset(file_keys)
    if part == "unet":
        return unet_slots(keys)
    if part == "vae":
        return vae_slots(keys, vae_prefix(file_keys) if "encoder.conv_in.weight" in file_keys else VAE_PREFIX)
    if part == "text_encoder_2":
        return _second_encoder_slots(keys, file_keys)
    if any(key.startswith(OPENCLIP_PREFIX) for key in file_keys) or (kind == "sd2" and not file_keys):
        return openclip_slots(keys)
    prefix = SDXL_CLIP_PREFIX if kind == "sdxl" else CLIP_PREFIX
    slots = clip_slots(keys, prefix)
    if f"{prefix}embeddings.token_embedding.weight" in file_keys:  # the text_model. level is left out
        slots = {key: Slot(slot.key.replace("text_model.", "", 1)) for key, slot in slots.items()}
    return slots


def _second_encoder_slots(keys: Iterable[str], file_keys: frozenset[str]) -> dict[str, Slot]:
    """SDXL's second encoder; some programs write the projection under its Hugging Face name, and then as a Linear."""
    slots = openclip_slots(keys, SDXL_OPENCLIP_PREFIX)
    as_linear = f"{SDXL_OPENCLIP_PREFIX}{PROJECTION}.weight"
    if as_linear in file_keys and f"{PROJECTION}.weight" in slots:
        slots[f"{PROJECTION}.weight"] = Slot(as_linear)
    return slots


def part_reader(
    part: str, keys: Iterable[str], weights: Weights, *, kind: str, subject: str
) -> Callable[[str], torch.Tensor]:
    """A function from a parameter name to its tensor in `weights`; raises OptionError if any is missing."""
    slots = part_slots(part, keys, kind=kind, file_keys=weights.shapes)
    missing = sorted({slot.key for slot in slots.values()} - set(weights.shapes))
    if missing:
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        way_out = "name one with --vae" if part == "vae" else "use a complete checkpoint"
        raise OptionError("", f"{subject} lacks {len(missing)} tensors of the {PART_NAMES[part]} ({some})", way_out)

    def read(name: str) -> torch.Tensor:
        slot = slots[name]
        tensor = weights.tensor(slot.key)
        if slot.is_transposed:
            return tensor.T.contiguous()
        return tensor if slot.part is None else tensor.chunk(3)[slot.part]

    return read


# ---------------------------------------------------------------------------------------------- writing


def save_single_file(
    model: ModelState,
    path: Path,
    *,
    source: Weights | None,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    counters: tuple[int, int] = (0, 0),
) -> None:
    """Write a .safetensors file, or a .ckpt by that extension.

    `source`, the single file the model came from, gives every other tensor unchanged, so nothing in it is lost. `dtype`
    None keeps each tensor's own. `counters` (epoch, global step) are added to a .ckpt source's and kept in a .ckpt.
    """
    write_single_file(
        [*model_entries(model, dtype), *_source_entries(model, source, dtype)], path, source, metadata, counters
    )


def write_single_file(
    entries: list[Entry],
    path: Path,
    source: Weights | None,
    metadata: Mapping[str, str],
    counters: tuple[int, int] = (0, 0),
) -> None:
    """The entries as a .safetensors file, or as a .ckpt by that extension; see :func:`save_single_file`."""
    if path.suffix.lower() == ".safetensors":
        write_entries(entries, path, metadata)
        return
    known = getattr(source, "extra", {})
    counts: dict[str, int] = {}
    for name, count in zip(("epoch", "global_step"), counters, strict=True):
        before = known.get(name)
        counts[name] = count + (before if isinstance(before, int) else 0)
    write_torch_file(entries, path, lambda tensors: {"state_dict": tensors, **counts})


def model_entries(model: ModelState, dtype: torch.dtype | None) -> list[Entry]:
    """One entry per tensor of a single file that the model itself fills; `dtype` None keeps each tensor's own."""
    entries: list[Entry] = []
    for part in PART_NAMES:
        state: State = getattr(model, part)
        entries += _joined_entries(state, part_slots(part, state, kind=model.kind), dtype)
    return entries


def _joined_entries(state: State, slots: Mapping[str, Slot], dtype: torch.dtype | None) -> list[Entry]:
    """One entry per key of the file, with the parts of fused tensors in their order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(slots, key=lambda name: slots[name].part or 0):
        groups.setdefault(slots[name].key, []).append(name)
    return [
        _entry(key, [state[name].T if slots[name].is_transposed else state[name] for name in names], dtype)
        for key, names in groups.items()
    ]


def _entry(key: str, tensors: list[torch.Tensor], dtype: torch.dtype | None) -> Entry:
    dtype = dtype or tensors[0].dtype
    shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
    if is_vae_attention_weight(key):
        shape = (*shape[:2], 1, 1)

    def produce() -> torch.Tensor:
        import torch

        here = [tensor.detach().to("cpu") for tensor in tensors]  # first: a busy device has no room for what follows
        joined = torch.cat(here) if len(here) > 1 else here[0]
        return rounded(joined, dtype, key).reshape(shape).contiguous()

    return Entry(key, header_dtype(dtype), shape, produce)


def _source_entries(model: ModelState, source: Weights | None, dtype: torch.dtype | None) -> list[Entry]:
    """Entries for what the source file holds beside the model; what SD 2.x readers expect where there is no file."""
    if source is None:
        return _unused_openclip_entries(model, dtype) if model.kind == "sd2" else _marker_entries(model.markers)
    mine = set(owned_keys(model, source.shapes))
    absent = [name for name in model.markers if name not in source.shapes]
    return [*(copied_entry(source, name) for name in source.shapes if name not in mine), *_marker_entries(absent)]


def _marker_entries(names: Iterable[str]) -> list[Entry]:
    import torch

    return [entry_of(name, torch.empty(0)) for name in names]


def owned_keys(model: ModelState, file_keys: Iterable[str]) -> Iterable[str]:
    """The keys of a file that hold this model's tensors, in the file's own spelling and in ours."""
    file_keys = frozenset(file_keys)
    for part in PART_NAMES:
        for keys in (file_keys, ()):
            for slot in part_slots(part, getattr(model, part), kind=model.kind, file_keys=keys).values():
                yield slot.key


def copied_entry(source: Weights, name: str) -> Entry:
    """A tensor of the source, unchanged; position ids that some tool turned into floats become integers again."""

    def produce() -> torch.Tensor:
        tensor = source.tensor(name)
        return tensor.long() if repairs else tensor

    dtype = source.dtypes[name]
    repairs = name.endswith(".position_ids") and dtype.startswith(("F", "BF"))
    return Entry(name, "I64" if repairs else dtype, tuple(source.shapes[name]), produce, is_trusted=True)


def _unused_openclip_entries(model: ModelState, dtype: torch.dtype | None) -> list[Entry]:
    """What readers of SD 2.x files expect and no Diffusers folder keeps: the last layer, which is not used (a copy of
    the one before), the projection and the logit scale. The projection is the identity, so that pooled text stays text.
    """
    import torch

    last = max(int(key.split(".")[3]) for key in model.text_encoder if ".layers." in key)
    block = {
        key.replace(f".layers.{last}.", f".layers.{last + 1}."): tensor
        for key, tensor in model.text_encoder.items()
        if f".layers.{last}." in key
    }
    width = len(model.text_encoder["text_model.final_layer_norm.weight"])
    dtype = model.text_encoder["text_model.final_layer_norm.weight"].dtype if dtype is None else dtype
    return [
        *_joined_entries(block, openclip_slots(block), dtype),
        entry_of(f"{OPENCLIP_PREFIX}text_projection", torch.eye(width, dtype=dtype)),
        entry_of(f"{OPENCLIP_PREFIX}logit_scale", torch.ones((), dtype=dtype)),
    ]


def single_file_state(model: ModelState) -> dict[str, torch.Tensor]:
    """The tensors of a single file for a model that comes from no file."""
    return {entry.name: entry.produce() for entry in (*model_entries(model, None), *_source_entries(model, None, None))}
