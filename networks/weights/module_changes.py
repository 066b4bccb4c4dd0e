"""What a module of a network's file adds to the weight of its layer, whatever kind of module it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from library.checkpoints.safetensors_io import NonFiniteError, is_finite, rounded
from library.options import OptionError
from networks import oft
from networks.key_names import DOWN, UP
from networks.layers import UNET_PREFIX
from networks.low_rank import add_weight_change_
from networks.pair_rules import check_layer
from networks.weight_changes import bias_change, check_module, is_plain_lora, weight_change
from networks.weights.merge_inputs import Source, report_unmatched
from networks.weights.network_file import NetworkFile


def is_plain(file: NetworkFile, name: str) -> bool:
    """Whether a module is a pair of projections and nothing else."""
    return is_plain_lora(file.modules[name])


def plain_modules(sources: Sequence[Source], why: str, *, ignore: bool) -> dict[str, list[Source]]:
    """The sources of each module that is a plain LoRA, in the order of the files.

    Others are an error that lists them and says `why`, or a warning where they are to be ignored.
    """
    modules: dict[str, list[Source]] = {}
    others: dict[str, list[str]] = {}
    for source in sources:
        file = source.file
        others[str(file.path)] = [*(name for name in file.modules if not is_plain(file, name)), *file.other_keys]
        for name in file.pairs:
            if is_plain(file, name):
                modules.setdefault(name, []).append(source)
    report_unmatched(others, why, ignore=ignore)
    return modules


def layer_of(name: str) -> str:
    """The name of the layer that a module stands on: OFT has a prefix of its own."""
    return f"{UNET_PREFIX}{name.removeprefix(oft.PREFIX)}" if name.startswith(oft.PREFIX) else name


def check_change(file: NetworkFile, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a module changes a bias beside the weight of `shape`; OptionError where it can't change that."""
    parts = file.parts(name)
    file.alpha(name)  # raises OptionError for NaN and infinity
    if oft.BLOCKS in parts:
        blocks = parts[oft.BLOCKS]
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or len(blocks) * blocks.shape[1] != shape[0]:
            problem = f"{file.path} was made for another model: {oft.BLOCKS} of {name} has the shape {[*blocks.shape]}"
            raise OptionError("", f"{problem}, and the layer {shape[0]} outputs", "take another network")
        return False
    if is_plain(file, name):  # checked here: what computes with outlines of tensors takes torch a second to load
        _check_pair(file, name, shape)
        return False
    check_module(name, parts, shape, file.path)
    return bias_change(parts) is not None


def _check_pair(file: NetworkFile, name: str, shape: tuple[int, ...]) -> None:
    pairs = file.pairs  # raises OptionError where projections don't fit each other
    if name in pairs:
        check_layer(name, file.layer_shape(name), shape, file.path)


def add_change_(weight: torch.Tensor, file: NetworkFile, name: str, multiplier: float, dtype: torch.dtype) -> None:
    """Change a float32 weight in place as a module at a strength does; its parts are rounded to `dtype` first.

    The change of some kinds depends on the weight, which is as networks before this one have left it. Raises
    NonFiniteError for a module that holds NaN or infinity.
    """
    parts = _parts(file, name, dtype)
    if is_plain_lora(parts):
        add_weight_change_(weight, parts[DOWN], parts[UP], multiplier * file.scale(name))
        return
    change = _oft_change(parts, weight) if oft.BLOCKS in parts else weight_change(parts, weight)
    weight.add_(change, alpha=multiplier)


def add_bias_change_(bias: torch.Tensor, file: NetworkFile, name: str, multiplier: float, dtype: torch.dtype) -> None:
    """The same with a float32 bias."""
    change = bias_change(_parts(file, name, dtype))
    if change is not None:
        bias.add_(change, alpha=multiplier)


def _parts(file: NetworkFile, name: str, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """The parts of a module in float32."""
    parts = {}
    for part, tensor in file.parts(name).items():
        what = f"{file.path}: {part} of {name}"
        parts[part] = rounded(tensor, dtype, what, "--precision").float() if tensor.is_floating_point() else tensor
        if not is_finite(parts[part]):
            raise NonFiniteError(f"{what} holds NaN or infinity", "leave this network out")
    return parts


def _oft_change(parts: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """(R - I) times the weight, by blocks of outputs; see networks.oft."""
    alpha = float(parts.get("alpha", torch.tensor(oft.DEFAULT_ALPHA)))
    turn_KBB = oft.rotations(parts[oft.BLOCKS][None], torch.tensor([alpha * len(weight)]))[0]
    return oft.turned(weight.float().flatten(1).T, turn_KBB).T.reshape(weight.shape)
