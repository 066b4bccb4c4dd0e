"""OFT: layers of the U-Net turned by block-diagonal rotations (Qiu et al. 2023, arXiv:2306.07280).

The outputs of a layer are divided into k blocks of b = outputs / k, and the weights of each multiplied by a rotation
R = (I + Q)(I - Q)^-1 with Q = P - P^T (Cayley), where P is what is learned and starts at 0. The constraint of the
paper's COFT keeps R near I: the Frobenius norm of all Q of a layer stays within alpha * outputs. A layer's bias is not
turned, so an applied network and a merged one are the same. At a multiplier m weights are multiplied by I + m (R - I).
The weights are those that networks before this one have left.

The trade's file format: per layer `<name>.oft_blocks` [k, b, b] and `<name>.alpha`, with names that begin with
oft_unet. Class and attribute names `oft_blocks`, `alpha` are part of the file's keys.

Shape letters: M modules, K blocks, B features of a block, N tokens (all leading dimensions), O = K * B outputs,
I inputs (with the kernel), H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from library.models.ldm_view import LdmView, as_files_name_it
from library.models.precision import compute_dtype
from library.options import OptionError
from networks.injection import Adapter, Network, check_names, modules_of_file, product, read_network_file
from networks.key_names import COPY_AGAIN
from networks.layers import CONV_CONTAINERS, TRANSFORMER_CONTAINERS, TextEncoders, find_layers, is_pointwise, layer_size
from networks.oft_settings import DEFAULT_ALPHA, DEFAULT_BLOCKS, OFTSettings
from networks.oft_settings import check_arguments as check_arguments  # part of the contract of network modules
from networks.pair_rules import alpha_number, check_weight

logger = logging.getLogger(__name__)

CASTS_ITSELF = True  # needs no autocast: rotations are made in float32 and cast to the activations' dtype

PREFIX = "oft_unet"
ATTENTION_CONTAINERS = ("CrossAttention", "Attention")
BLOCKS = "oft_blocks"
EPSILON = 1e-8  # of the constraint, part of the format


# ---------------------------------------------------------------------------------------------- module-level contract


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> OFTNetwork:
    """A new network for a U-Net, starting as no change; OptionError names the layer that can't be divided.

    `network_dim` is the number of blocks of each layer (None: 4), `network_alpha` the constraint (None: 1e-3).
    """
    dropout = kwargs.pop("dropout", None)
    if neuron_dropout or dropout:
        logger.warning("--network_dropout has no effect: OFT drops nothing")
    settings = OFTSettings.parse(kwargs)
    num_blocks = DEFAULT_BLOCKS if network_dim is None else network_dim
    alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
    if not alpha > 0:
        raise OptionError("--network_alpha", f"{alpha:g} lets OFT learn nothing", f"use {DEFAULT_ALPHA:g}, or more")
    if alpha >= 1:
        logger.warning("--network_alpha %g is OFT's constraint, and one that constrains nothing; %g is usual",
                       alpha, DEFAULT_ALPHA)  # fmt: skip
    layers = unet_layers(unet, all_linear=settings.enable_all_linear, convs=settings.enable_conv)
    return OFTNetwork([OFTModule(name, layer, num_blocks, alpha, multiplier) for name, layer in layers])


def create_network_from_weights(
    multiplier: float,
    file: Path | str,
    vae: Any,
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[OFTNetwork, Mapping[str, torch.Tensor]]:
    """(network, tensors): the layers, blocks and constraints of a file. The weights are not loaded into it yet."""
    kwargs = {key: value for key, value in kwargs.items() if key not in ("dropout", "neuron_dropout")}
    OFTSettings.parse(kwargs)
    if kwargs:
        logger.warning("--network_args %s: no effect, %s decides about its layers", ", ".join(kwargs), file)
    tensors = read_network_file(file) if weights_sd is None else weights_sd
    in_file = {name: parts for name, parts in modules_of_file(tensors).items() if BLOCKS in parts}
    if not in_file:
        problem = f"{file} holds no OFT in the usual format (it has {next(iter(tensors), 'no tensor')})"
        raise OptionError("", problem, "check file and network module")
    layers = unet_layers(unet, all_linear=True, convs=True)
    check_names(in_file, (name for name, _ in layers), str(file))
    modules = []
    for name, layer in layers:
        if name in in_file:
            num_blocks, alpha = _blocks_and_alpha(name, in_file[name], layer, file)
            modules.append(OFTModule(name, layer, num_blocks, alpha, multiplier))
    return OFTNetwork(modules), tensors


def _blocks_and_alpha(
    name: str, parts: Mapping[str, torch.Tensor], layer: torch.nn.Module, file: Path | str
) -> tuple[int, float]:
    """The number of blocks and the constraint of a module of a file; OptionError where it does not fit its layer."""
    shape, outputs = list(parts[BLOCKS].shape), layer_size(layer)[1]
    if len(shape) != 3 or shape[1] != shape[2]:
        raise OptionError("", f"{file} is damaged: {BLOCKS} of {name} has the shape {shape}", COPY_AGAIN)
    if shape[0] * shape[1] != outputs:
        problem = f"{file} was made for another model: it turns {shape[0] * shape[1]} outputs of {name}, "
        raise OptionError("", f"{problem}which has {outputs} here", "use a network that was made for this model")
    check_weight(name, BLOCKS, parts[BLOCKS], file)
    return shape[0], alpha_number(name, parts["alpha"], file) if "alpha" in parts else DEFAULT_ALPHA


def unet_layers(unet: torch.nn.Module | None, *, all_linear: bool, convs: bool) -> list[tuple[str, torch.nn.Module]]:
    """The layers that are turned, by name: those of attentions, of whole transformers, of convolution blocks."""
    if unet is None:
        return []
    containers = (
        *(TRANSFORMER_CONTAINERS if all_linear else ATTENTION_CONTAINERS),
        *(CONV_CONTAINERS if convs else ()),
    )
    found = find_layers(as_files_name_it(unet), PREFIX, containers)
    return [(name, layer) for name, layer in found if convs or is_pointwise(layer)]


# ---------------------------------------------------------------------------------------------- rotations


def rotations(blocks_MKBB: torch.Tensor, limit_M: torch.Tensor) -> torch.Tensor:
    """R - I of every block in float32 (M, K, B, B); `limit_M` is the largest norm of the Q of each module.

    R - I = (I - Q)^-1 2 Q, which is exact where Q is small, and 0 where it is 0.
    """
    P = blocks_MKBB.float()
    Q = P - P.transpose(-1, -2)
    norm_M = Q.flatten(1).norm(dim=1)
    # the format's (min(n, c) + eps) / (n + eps): exactly 1 within the limit
    limit_M = limit_M.to(norm_M)
    Q = Q * ((limit_M + EPSILON) / (torch.maximum(norm_M, limit_M) + EPSILON))[:, None, None, None]
    identity = torch.eye(Q.shape[-1], device=Q.device)
    # I - Q is never singular: the eigenvalues of Q are imaginary. So nothing waits for the device to say so
    return torch.linalg.solve_ex(identity - Q, 2 * Q)[0]


def turned(y: torch.Tensor, turn_KBB: torch.Tensor) -> torch.Tensor:
    """y times block-diagonal matrices along its channels: (B, O, H, W) or (..., O), in y's dtype."""
    num_blocks, features, _ = turn_KBB.shape
    turn_KBB = turn_KBB.to(y.dtype)
    if y.ndim == 4:
        y_NKBHW = y.unflatten(1, (num_blocks, features))
        return torch.einsum("nkbhw,kbc->nkchw", y_NKBHW, turn_KBB).flatten(1, 2)
    return torch.einsum("nkb,kbc->nkc", y.reshape(-1, num_blocks, features), turn_KBB).reshape(y.shape)


# ---------------------------------------------------------------------------------------------- module


class OFTModule(Adapter):
    """One layer's rotations."""

    alpha: torch.Tensor

    def __init__(self, name: str, layer: Any, num_blocks: int, alpha: float, multiplier: float = 1.0) -> None:
        super().__init__(name, layer, multiplier)
        outputs = layer_size(layer)[1]
        if outputs % num_blocks:
            divisors = [number for number in range(1, outputs + 1) if outputs % number == 0]
            nearest = min(divisors, key=lambda number: abs(number - num_blocks))
            problem = f"{num_blocks} blocks don't divide the {outputs} outputs of {name}"
            raise OptionError("--network_dim", problem, f"use {nearest}, or another number that does")
        size = outputs // num_blocks
        self.oft_blocks = torch.nn.Parameter(torch.zeros(num_blocks, size, size))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.limit = float(alpha) * outputs
        self._turn_KBB: torch.Tensor | None = None
        self._turn_version = -1

    def keep_turn(self, turn_KBB: torch.Tensor) -> None:
        """Take over R - I, made of the blocks as they are now together with those of other modules."""
        self._turn_KBB, self._turn_version = turn_KBB, self.oft_blocks._version

    def turn(self) -> torch.Tensor:
        """R - I of the blocks as they are now (K, B, B), in float32."""
        kept = self._turn_KBB
        is_wanted = torch.is_grad_enabled() and self.oft_blocks.requires_grad
        if kept is not None and self._turn_version == self.oft_blocks._version and kept.requires_grad >= is_wanted:
            return kept
        return rotations(self.oft_blocks[None], torch.tensor([self.limit]))[0]

    @property
    def is_settled(self) -> bool:
        """Whether the turn that is kept holds for as long as the blocks do: they don't learn."""
        is_current = self._turn_KBB is not None and self._turn_version == self.oft_blocks._version
        return is_current and not self.oft_blocks.requires_grad

    @property
    def is_on(self) -> bool:
        return self.enabled and self.multiplier != 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The turned layer's output; the base layer's alone while disabled or at multiplier 0."""
        if not self.is_on:
            return self._base_forward(x)
        if self._is_cheaper_by_weight(x):
            weight = self.weight_change()
            weight = weight.add_(self.layer.weight.detach().to(weight.device)).to(x.device, compute_dtype(x))
            bias = None if self.layer.bias is None else self.layer.bias.to(weight)
            return product(self.layer, x.to(weight.dtype), weight, bias)
        y = self._base_forward(x)
        return y + self._change_of(y)

    def _is_cheaper_by_weight(self, x: torch.Tensor) -> bool:
        """Whether to turn the weight takes less than to turn the output: nothing learns, and rows are many."""
        if torch.is_grad_enabled() or not self._base_is_plain:
            return False
        inputs = layer_size(self.layer)[0]
        return x.numel() >= inputs * x.shape[1 if x.ndim == 4 else -1]

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return self._change_of(self._base_forward(x))

    def _change_of(self, y: torch.Tensor) -> torch.Tensor:
        """What turning adds to an output. With gradients this costs less than to turn the weight, which needs one."""
        turn_KBB = (self.turn() * self.multiplier).to(y.device, compute_dtype(y))
        change = turned(y.to(turn_KBB.dtype), turn_KBB)
        bias = self.bias_below()
        if bias is None:
            return change
        shift = turned(bias.to(change), turn_KBB)
        return change - (shift[:, None, None] if y.ndim == 4 else shift)

    @torch.no_grad()
    def weight_change(self) -> torch.Tensor:
        turn_KBB = self.turn() * self.multiplier
        weight = self.weight_below().to(turn_KBB.device, torch.float32)
        weight_KBI = weight.reshape(*turn_KBB.shape[:2], -1)
        return torch.einsum("kbi,kbc->kci", weight_KBI, turn_KBB).reshape(weight.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept alpha of any type or none; then follow the loaded alpha."""
        if prefix + BLOCKS in state_dict:
            alpha = state_dict.get(prefix + "alpha", torch.tensor(DEFAULT_ALPHA))
            state_dict[prefix + "alpha"] = alpha.reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.limit = float(self.alpha) * layer_size(self.layer)[1]
        self._turn_KBB = None


# ---------------------------------------------------------------------------------------------- network


class OFTNetwork(Network):
    """The turned layers of a U-Net. Text encoders have none."""

    unet_adapters: list[OFTModule]  # type: ignore[assignment]

    def __init__(self, modules: Sequence[OFTModule]) -> None:
        super().__init__([], modules)

    def apply_to(
        self,
        text_encoder: TextEncoders | None = None,
        unet: torch.nn.Module | None = None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        super().apply_to(text_encoder, unet, apply_text_encoder, apply_unet)
        if unet is not None:
            real = unet.unet if isinstance(unet, LdmView) else unet
            real.register_forward_pre_hook(lambda *_: self.turn_all())

    def turn_all(self) -> None:
        """Make the rotations of all layers for the pass that begins, those of one size together."""
        modules = [module for module in self.unet_adapters if module.is_on and not module.is_settled]
        by_size: dict[tuple[int, ...], list[OFTModule]] = {}
        for module in modules:
            by_size.setdefault(tuple(module.oft_blocks.shape), []).append(module)
        for alike in by_size.values():
            blocks_MKBB = torch.stack([module.oft_blocks for module in alike])
            limit_M = torch.tensor([module.limit for module in alike])
            for module, turn_KBB in zip(alike, rotations(blocks_MKBB, limit_M).unbind(), strict=True):
                module.keep_turn(turn_KBB)

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """(one parameter group, its name); none at a rate of 0. The text encoders' rate is for nothing here."""
        lr = default_lr if unet_lr is None else unet_lr
        if lr == 0 or not self.unet_adapters:
            return [], []
        group = {"params": [module.oft_blocks for module in self.unet_adapters]}
        return [group | ({} if lr is None else {"lr": lr})], ["unet"]

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Sequence[float | None], unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The same where text encoders have a rate each."""
        return self.prepare_optimizer_params(None, unet_lr, default_lr)
