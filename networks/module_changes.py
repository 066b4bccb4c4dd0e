"""What a module of a network's file adds to the weight of its layer, whatever kind of module it is."""

from __future__ import annotations

import math

import torch

from library.checkpoints.safetensors_io import NonFiniteError, is_finite
from library.options import OptionError
from networks.key_names import DOWN, UP
from networks.low_rank import add_weight_change_
from networks.weights_file import NetworkFile

PLAIN = frozenset((DOWN, UP, "alpha"))  # the parts of a plain LoRA


def is_plain(file: NetworkFile, name: str) -> bool:
    """Whether a module is a pair of projections and nothing else."""
    parts = file.modules[name].keys()
    return parts <= PLAIN and DOWN in parts and UP in parts


def check_change(file: NetworkFile, name: str, shape: tuple[int, ...]) -> None:
    """OptionError where a module can't change a weight of `shape`, as far as the header tells."""
    if not is_plain(file, name):
        raise OptionError("", f"{file.path} holds a kind of module that can't be merged: {_kind_words(file, name)}")
    found = (file.shape(name, UP)[0], math.prod(file.shape(name, DOWN)[1:]))
    wanted = (shape[0], math.prod(shape[1:]))
    if found != wanted:
        problem = f"{name} has {found[1]} inputs and {found[0]} outputs in {file.path}, {wanted[1]} and {wanted[0]}"
        raise OptionError("", f"{problem} in the model", "merge it into a model of the kind it was made with")


def add_change_(
    weight: torch.Tensor, file: NetworkFile, name: str, multiplier: float, dtype: torch.dtype = torch.float32
) -> None:
    """Change a float32 weight in place as a module at a strength does; its parts are rounded to `dtype` first.

    Raises NonFiniteError for a module that holds NaN or infinity.
    """
    parts = {part: tensor.to(dtype).float() for part, tensor in file.parts(name).items()}
    for part, tensor in parts.items():
        if not is_finite(tensor):
            raise NonFiniteError(f"{file.path}: {part} of {name} holds NaN or infinity", "leave this network out")
    add_weight_change_(weight, parts[DOWN], parts[UP], multiplier * file.scale(name))


def _kind_words(file: NetworkFile, name: str) -> str:
    return f"{name} has {', '.join(sorted(file.modules[name])[:4])}"
