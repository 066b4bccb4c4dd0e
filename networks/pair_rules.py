"""What a pair of projections and its alpha have to be, for whatever reads files of networks. No torch at import.

down is [r, in] or [r, in, k, k], up [out, r] or [out, r, 1, 1], both of floating point; alpha is a single real finite
number of any shape.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.safetensors_io import is_finite
from library.options import OptionError
from networks.key_names import COPY_AGAIN, DOWN, UP

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


def essential(shape: Shape) -> Shape:
    """A 1x1 convolution is a matrix: [a, b, 1, 1] -> [a, b]; any other shape stays."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def check_pair(name: str, down: Shape, up: Shape, file: Path | str, where: str = "") -> None:
    """OptionError where the two can't be one module's, whatever layer it stands on."""
    fit = {len(down), len(up)} <= {2, 4} and up[1] == down[0] > 0
    if not (fit and len(essential(up)) == 2 and (len(down) == 2 or down[2] == down[3])):
        problem = f"{file} is damaged: {DOWN} {[*down]} and {UP} {[*up]} of {name} don't fit together"
        raise OptionError(where, problem, COPY_AGAIN)


def pair_layer(down: Shape, up: Shape) -> Shape:
    """The shape of the layer's weight that a pair changes: [out, in], or [out, in, k, k]."""
    return essential((up[0], *down[1:]))


def check_layer(name: str, change: Shape, layer: Shape, file: Path | str) -> None:
    """OptionError where a module's change, by its shape, is of another layer than the one it stands on."""
    if essential(change) == essential(layer):
        return
    (outputs, inputs), (own_outputs, own_inputs) = ((shape[0], math.prod(shape[1:])) for shape in (change, layer))
    problem = f"{name} has {inputs} inputs and {outputs} outputs there, {own_inputs} and {own_outputs} here"
    if (outputs, inputs) == (own_outputs, own_inputs):
        problem = f"{name} is for a weight of {[*change]} there, of {[*layer]} here"
    way_out = "use a network that was made for this kind of model"
    raise OptionError("", f"{file} was made for another model family: {problem}", way_out)


def check_dtype(name: str, part: str, dtype: str, file: Path | str, where: str = "") -> None:
    """OptionError for weights that are no floating-point numbers; `dtype` as headers name it."""
    if not dtype.startswith(("F", "BF")):  # F32, BF16, F8_E4M3 ...
        problem = f"{file} is damaged: {part} of {name} is of type {dtype}, which no weights are"
        raise OptionError(where, problem, COPY_AGAIN)


def check_weight(name: str, part: str, weight: torch.Tensor, file: Path | str, where: str = "") -> None:
    """OptionError for weights that are no floating-point numbers, or not finite."""
    if not weight.is_floating_point():
        check_dtype(name, part, str(weight.dtype).removeprefix("torch."), file, where)
    if not is_finite(weight):
        raise OptionError(where, f"{file}: {part} of {name} holds NaN or infinity", "take an earlier save of it")


def alpha_number(name: str, alpha: torch.Tensor, file: Path | str, where: str = "") -> float:
    """A module's alpha; OptionError for what is no single real finite number."""
    if alpha.numel() != 1 or alpha.is_complex():
        raise OptionError(where, f"{file} is damaged: alpha of {name} is no single number", COPY_AGAIN)
    value = float(alpha)
    if not math.isfinite(value):
        raise OptionError(where, f"{file}: alpha of {name} is {value}, no finite number", "take an earlier save of it")
    return value
