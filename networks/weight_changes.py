"""What a module of a network file adds to its layer's weight, for every kind of module that is known.

A module is what a file has below one layer's name: its parts, by what follows the name. `check_module` says at once
which kind it is and whether it fits a layer, without computing; `weight_change` and `bias_change` compute, one module
at a time, in float32:

    kind = check_module(name, parts, weight.shape, file)       # OptionError for what can't be used
    weight = weight + multiplier * weight_change(parts, weight)
    if (bias := bias_change(parts)) is not None: ...           # the same with the layer's bias

Whoever merges several calls these two in their order, with the weight as the ones before have left it; the change of a
DoRA and of (IA)^3 depends on it.

Kinds, with scale = alpha / rank (1 without alpha) and the formulas of their papers:
  LoRA    scale * up @ down, with lora_mid between them where the kernel is a factor (Hu et al. 2021, arXiv:2106.09685)
  LoHa    scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise (Hyeon-Woo et al. 2022, arXiv:2108.06098)
  LoKr    scale * kron(w1, w2), each whole (and scale 1) or a product (Edalati et al. 2022, arXiv:2212.10650)
  full    the difference itself; "norm": that of a normalisation
  (IA)^3  the weight times a number for each output or input (Liu et al. 2022, arXiv:2205.05638)
DoRA (Liu et al. 2024, arXiv:2402.09353) is an addition to the first three: W + change is scaled to the norms that the
file has, of each output or of each input.

Shape letters: O outputs, I inputs, R S rank, h w kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from library.options import OptionError
from networks.key_names import COPY_AGAIN, DOWN, MAGNITUDES, MID, PEFT_MAGNITUDE, UP
from networks.pair_rules import alpha_number, check_layer, check_pair, check_weight, pair_layer

Parts = Mapping[str, torch.Tensor]  # a module's tensors by what follows its name
Product = Callable[[Parts, torch.Tensor], torch.Tensor]

BIAS = "diff_b"
NUMBERS = ("alpha", "on_input")  # parts that are a single number
WITH_ANY = frozenset(("alpha", BIAS, *MAGNITUDES))  # parts that modules of any kind may have
OTHER_PROGRAM = "use --network_module lycoris.kohya, or merge it with the program that wrote it"


# ---------------------------------------------------------------------------------------------- kinds


def _lora(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    up_OR, down_RI = parts[UP].float().flatten(1), parts[DOWN].float()
    scale = _scale(parts, len(down_RI))
    if MID not in parts:
        return torch.mm(up_OR * scale, down_RI.flatten(1))
    return torch.einsum("or,rshw,si->oihw", up_OR * scale, parts[MID].float(), down_RI.flatten(1))


def _loha(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    first, second = (_factor(parts, f"hada_w{side}", f"hada_t{side}") for side in (1, 2))
    return first.mul_(second).mul_(_scale(parts, len(parts["hada_w1_b"])))


def _lokr(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    first, second = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2", "lokr_t2")
    rank = next((len(parts[key]) for key in ("lokr_w2_b", "lokr_w1_b") if key in parts), None)
    scale = 1.0 if rank is None else _scale(parts, rank)
    return torch.kron(first.flatten(1) * scale, second.flatten(1))  # columns: inputs, then kernel, as in a weight


def _full(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    return parts["diff"].float() if "diff" in parts else torch.zeros_like(weight, dtype=torch.float32)


def _norm(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    return parts["w_norm"].float()


def _ia3(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    factor = parts["weight"].float().flatten()
    single = (1,) * (weight.ndim - 2)
    return weight.float() * (factor.view(1, -1, *single) if bool(parts["on_input"]) else factor.view(-1, 1, *single))


def _factor(parts: Parts, name: str, core: str = "") -> torch.Tensor:
    """A factor as the file has it: whole, as a product of a and b, or with a core for the kernel (Tucker)."""
    if name in parts:
        return parts[name].float()
    a, b = parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
    if core not in parts:
        return torch.mm(a, b.flatten(1))
    return torch.einsum("rshw,ro,si->oihw", parts[core].float(), a, b)


def _scale(parts: Parts, rank: int) -> float:
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


@dataclass(frozen=True)
class Kind:
    """A kind of module: the sets of parts it comes with, and what it adds to a weight, as a matrix or of its shape."""

    name: str
    forms: tuple[frozenset[str], ...]
    product: Product
    has_magnitudes: bool = True  # whether DoRA may be added to it

    @property
    def parts(self) -> frozenset[str]:
        return frozenset().union(*self.forms)


def _forms(*sides: tuple[tuple[str, ...], ...]) -> tuple[frozenset[str], ...]:
    """Every choice of one set of parts for each side."""
    forms = [frozenset[str]()]
    for choices in sides:
        forms = [form | frozenset(choice) for form in forms for choice in choices]
    return tuple(forms)


HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KRON_1 = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
KRON_2 = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
FULL = Kind("full difference", _forms((("diff",), ())), _full, has_magnitudes=False)
KINDS = (
    Kind("LoRA", _forms(((DOWN, UP), (DOWN, MID, UP))), _lora),
    Kind("LoHa", _forms((HADA, (*HADA, "hada_t1", "hada_t2"))), _loha),
    Kind("LoKr", _forms(KRON_1, KRON_2), _lokr),
    FULL,
    Kind("norm", _forms((("w_norm",), ("w_norm", "b_norm"))), _norm, has_magnitudes=False),
    Kind("(IA)^3", _forms((("weight", "on_input"),)), _ia3, has_magnitudes=False),
)


def kind_of(names: Iterable[str]) -> Kind | None:
    """The kind of a module by the names of its parts, complete or not; None for a kind that is not known."""
    names = frozenset(names)
    own = names - WITH_ANY
    if not own:
        return FULL if BIAS in names else None  # of the bias alone
    return next((kind for kind in KINDS if own <= kind.parts), None)


def is_plain_lora(names: Iterable[str]) -> bool:
    """Whether a module is a pair of projections and nothing else that changes what they mean."""
    return frozenset(names) - {"alpha"} == {DOWN, UP}


# ---------------------------------------------------------------------------------------------- checks


def check_module(name: str, parts: Parts, shape: torch.Size | tuple[int, ...], file: Path | str) -> Kind:
    """The kind of a module that can change a weight of this shape.

    Raises OptionError, which names the file and the module, for kinds that are not known, for modules of which a part
    is missing or does not fit the others, and for those of another layer's size.
    """
    listed = ", ".join(sorted(parts))
    kind = kind_of(parts)
    if kind is None:
        raise OptionError("", f"{file} is of a kind that is not known: {name} has {listed}", OTHER_PROGRAM)
    _check_form(kind, name, frozenset(parts) - WITH_ANY, file)
    if not kind.has_magnitudes and any(key in parts for key in MAGNITUDES):
        raise OptionError("", f"{file} is of a kind that is not known: {name} has {listed}", OTHER_PROGRAM)
    for key, tensor in parts.items():
        if key == "alpha":
            alpha_number(name, tensor, file)
        elif key not in NUMBERS:
            check_weight(name, key, tensor, file)
        elif tensor.numel() != 1:
            raise OptionError("", f"{file} is damaged: {key} of {name} is no single number", COPY_AGAIN)
    if kind.name == "LoRA" and MID not in parts:
        check_pair(name, tuple(parts[DOWN].shape), tuple(parts[UP].shape), file)
        check_layer(name, pair_layer(tuple(parts[DOWN].shape), tuple(parts[UP].shape)), tuple(shape), file)
    outlines = {key: tensor if key in NUMBERS else tensor.to("meta") for key, tensor in parts.items()}
    weight = torch.empty(shape, device="meta")
    try:
        change = kind.product(outlines, weight)
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{key} {list(parts[key].shape)}" for key in sorted(parts) if key != "alpha")
        raise OptionError("", f"{file} is damaged: parts of {name} don't fit together: {shapes}", COPY_AGAIN) from None
    _check_size(name, change.shape, torch.Size(shape), file)
    for key in MAGNITUDES:
        if key in parts and parts[key].numel() not in (shape[0], shape[1]):
            problem = f"{key} of {name} has the shape {list(parts[key].shape)}"
            raise OptionError("", f"{file} is damaged: {problem}", COPY_AGAIN)
    bias = bias_change(outlines)
    if bias is not None and bias.numel() != shape[0]:
        raise OptionError("", f"{file} is damaged: the bias of {name} has {bias.numel()} numbers", COPY_AGAIN)
    return kind


def _check_form(kind: Kind, name: str, own: frozenset[str], file: Path | str) -> None:
    missing = [form - own for form in kind.forms if own <= form]
    if not missing:
        problem = f"{', '.join(sorted(own))} of {name} don't belong together"
        raise OptionError("", f"{file} is damaged: {problem}", COPY_AGAIN)
    if fewest := min(missing, key=len):
        raise OptionError("", f"{file} is incomplete: {name} has no {', '.join(sorted(fewest))}", COPY_AGAIN)


def _check_size(name: str, change: torch.Size, weight: torch.Size, file: Path | str) -> None:
    in_file, in_model = ((size[0], size.numel() // size[0]) for size in (change, weight))
    if in_file != in_model:
        problem = f"{name} has {in_file[1]} inputs and {in_file[0]} outputs there, {in_model[1]} and {in_model[0]} here"
        way_out = "use a network that was made for this kind of model"
        raise OptionError("", f"{file} was made for another model family: {problem}", way_out)


# ---------------------------------------------------------------------------------------------- changes


@torch.no_grad()
def weight_change(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    """What a module adds to a weight at the multiplier 1: float32, of the weight's shape, on the parts' device.

    `weight` is the layer's own, in any dtype, on the same device; where the change does not depend on it, an empty
    tensor of its shape will do. Other multipliers multiply the change, also that of a DoRA.
    """
    kind = kind_of(parts)
    assert kind is not None, f"check_module would have refused {sorted(parts)}"
    change = kind.product(parts, weight).reshape(weight.shape)
    for key in MAGNITUDES:
        if key in parts:
            return _decomposed(change, weight.float(), parts[key].float(), is_peft=key == PEFT_MAGNITUDE)
    return change


def depends_on_weight(names: Iterable[str]) -> bool:
    """Whether `weight_change` needs the numbers of the weight, by the names of a module's parts."""
    return bool(frozenset(names) & {*MAGNITUDES, "on_input"})


def bias_change(parts: Parts) -> torch.Tensor | None:
    """What a module adds to its layer's bias at the multiplier 1: float32 (O,), or None."""
    found = parts.get(BIAS, parts.get("b_norm"))
    return None if found is None else found.float().flatten()


def _decomposed(change: torch.Tensor, weight: torch.Tensor, magnitude: torch.Tensor, *, is_peft: bool) -> torch.Tensor:
    """The change that leads to weight + change with the norms `magnitude`.

    PEFT has norms of outputs in every shape. Files of LyCORIS have them as (O, 1, ..), those of inputs as (1, I, ..).
    """
    total = change.add_(weight)
    by_output = is_peft or magnitude.ndim == 1 or len(magnitude) == len(weight) or magnitude.numel() != weight.shape[1]
    rows = total if by_output else total.transpose(0, 1)
    norms = rows.flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps
    factors = magnitude.flatten() / norms
    single = (1,) * (weight.ndim - 2)
    total *= factors.view(-1, 1, *single) if by_output else factors.view(1, -1, *single)
    return total.sub_(weight)
