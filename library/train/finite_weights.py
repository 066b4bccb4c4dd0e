"""A base model that holds NaN or infinity is refused before training: nothing good could come of it, or be saved.

One reduction per tensor where the weights already are, and one look at all the results: one to two seconds for SD 1.x
in float32 on two busy cores of a CPU; a GPU reads its memory a hundred times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from library.checkpoints.probe import MODEL_FLAG, VAE_FLAG, check_vae, resolve_model
from library.checkpoints.safetensors_io import is_finite
from library.checkpoints.sd import part_slots
from library.checkpoints.source import ModelSource
from library.checkpoints.weights import open_weights
from library.families.base import ModelBundle
from library.families.sd_parts import TEXT_PARTS
from library.options import OptionError


@torch.no_grad()
def check_finite(bundle: ModelBundle, vae: str | None) -> None:
    """Raise OptionError that names the first tensor of the loaded model with a value that is not finite, and its file.

    `vae` is the VAE's own file or folder, if it has one.
    """
    named = [(part, name, tensor) for part, name, tensor in _tensors(bundle) if tensor.is_floating_point()]
    flags = [_finite(tensor) for _, _, tensor in named]
    if bool(torch.stack(flags).all()):
        return
    part, name, tensor = next(row for row, flag in zip(named, flags, strict=True) if not flag)
    flag, path = (VAE_FLAG, vae) if part == "vae" and vae else (MODEL_FLAG, bundle.source.path)
    keys = [other for of, other, _ in named if of == part]
    found, key, is_overflow = _origin(bundle.source, part, name, keys, (flag, path))
    if is_overflow:
        precision = str(tensor.dtype).removeprefix("torch.")
        raise OptionError(
            flag, f"{found} has values in {key} that {precision} can't hold", "use --mixed_precision bf16"
        )
    raise OptionError(flag, f"{found} holds NaN or infinity ({key})", "use an undamaged copy or another model")


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim bool on the tensor's device: whether all elements are finite; without waiting for the device."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)


def _tensors(bundle: ModelBundle) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(part, name, tensor) for all parameters and buffers that a file holds."""
    parts = [("unet", bundle.unet), *zip(TEXT_PARTS, bundle.text_encoders, strict=False), ("vae", bundle.vae)]
    for part, module in parts:
        for name, tensor in module.state_dict().items():
            yield part, name, tensor


def _origin(
    source: ModelSource, part: str, name: str, keys: Sequence[str], named_by: tuple[str, str]
) -> tuple[Path, str, bool]:
    """(file or folder, key in it, whether the value there is finite and only the precision of the run is too small)

    `keys` are all names in the part; `named_by` are flag and value.
    """
    flag, path = named_by
    found = check_vae(path) if flag == VAE_FLAG else resolve_model(path)
    if found.is_dir():
        return found if flag == VAE_FLAG else found / part, name, False
    with open_weights(found, flag) as weights:
        key = name
        if name not in weights.shapes:
            key = part_slots(part, keys, kind=source.kind, file_keys=weights.shapes)[name].key
        return found, key, key in weights.shapes and is_finite(weights.tensor(key))
