"""What --network_args says to LoRA and its relatives, and the rank each layer gets from it.

Importing this brings no torch, so that a mistake in the arguments is found at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from library.options import OptionError, did_you_mean
from networks.blocks import (
    BLOCK_KEYS,
    LIST_KEYS,
    BlockLayout,
    BlockSettings,
    argument,
    not_negative,
    number,
    parse_blocks,
)
from networks.layers import UNET_PREFIX, is_pointwise

if TYPE_CHECKING:
    import torch

Settings = TypeVar("Settings", bound="LoRASettings")  # those of LoRA, or of a relative that has more

logger = logging.getLogger(__name__)

Rank: TypeAlias = tuple[int, float | None]  # rank (0: no module) and alpha (None or 0: the rank)
RankRule: TypeAlias = "Callable[[str, torch.nn.Module], Rank]"

DEFAULT_DIM = 4  # without --network_dim
LYCORIS_KEYS = ("algo", "preset", "use_tucker", "use_cp", "factor", "decompose_both", "constraint", "dora_wd")
OF_LYCORIS = "that is an argument of --network_module lycoris.kohya (a LoRA for convolutions, too: conv_dim=4)"
RANK_KEYS = ("conv_dim", "conv_alpha", *LIST_KEYS)  # what a file decides where a network is made from one


def check_arguments(**kwargs: Any) -> None:
    """Raise OptionError for unknown names and unusable values of --network_args."""
    LoRASettings.parse(None, kwargs)


@dataclass(frozen=True)
class LoRASettings:
    """What --network_args says, read."""

    dropout: float = 0.0  # share of rank activations, whole tensor
    rank_dropout: float = 0.0  # share of ranks, per sample
    module_dropout: float = 0.0  # probability that a module is left out of a forward
    conv_dim: int | None = None
    conv_alpha: float | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    blocks: BlockSettings = BlockSettings()

    @classmethod
    def parse(cls: type[Settings], neuron_dropout: float | None, arguments: Mapping[str, Any]) -> Settings:
        """From the arguments by name (texts or numbers); --network_dropout goes before an argument `dropout`."""
        own = [field.name for field in fields(cls) if field.name != "blocks"]
        for key in arguments:
            if key not in own and key not in BLOCK_KEYS:
                way_out = did_you_mean(key, [*own, *BLOCK_KEYS])
                raise OptionError(argument(key), "unknown name", OF_LYCORIS if key in LYCORIS_KEYS else way_out)
        values: dict[str, Any] = {key: number(arguments[key], key) for key in own if arguments.get(key) is not None}
        if neuron_dropout is not None:
            values["dropout"] = float(neuron_dropout)
        for key in ("dropout", "rank_dropout", "module_dropout"):
            if not 0 <= values.get(key, 0.0) < 1:
                raise OptionError(argument(key), f"{values[key]:g} is out of range", "use 0 to below 1")
        for key in (name for name in own if name.startswith("loraplus")):
            if values.get(key, 1.0) <= 0:
                raise OptionError(argument(key), f"{values[key]:g} is no ratio", "use a number above 0 (16 is usual)")
        not_negative(values.get("conv_alpha", 0.0), "conv_alpha")
        rank = values.get("conv_dim")
        if rank is not None:
            if rank < 0 or rank != int(rank):
                raise OptionError(argument("conv_dim"), f"{rank:g} is no rank", "use a whole number")
            values["conv_dim"] = int(rank)
        return cls(blocks=parse_blocks(arguments), **values)

    @property
    def has_convs(self) -> bool:
        """Whether layers of the convolution containers (ResnetBlock2D ...) get modules too."""
        return bool(self.conv_dim or self.blocks.conv_block_dims)

    def rank_rule(self, dim: int, alpha: float, layout: BlockLayout) -> RankRule:
        """Linear and 1x1 layers get `dim`, k x k convolutions conv_dim; the U-Net's by block where that is set."""
        if self.conv_alpha is not None and not self.has_convs:
            logger.warning("%s has no effect without conv_dim", argument("conv_alpha"))
        conv = (self.conv_dim or 0, 1.0 if self.conv_alpha is None else self.conv_alpha)
        blocks = self.blocks.ranks(layout, dim=dim, alpha=alpha, conv_dim=self.conv_dim, conv_alpha=self.conv_alpha)

        def rule(name: str, layer: torch.nn.Module) -> Rank:
            if blocks is None or not name.startswith(UNET_PREFIX):
                return (dim, alpha) if is_pointwise(layer) else conv
            index = layout.index(name)
            if is_pointwise(layer):
                return blocks.dims[index], blocks.alphas[index]
            return (blocks.conv_dims[index] if blocks.conv_dims else 0), blocks.conv_alphas[index]

        return rule

    def loraplus_ratio(self, part: str) -> float | None:
        """Factor of the up weights' learning rate (Hayou et al. 2024, arXiv:2402.12354) in "unet" or "text_encoder"."""
        own = getattr(self, f"loraplus_{part}_lr_ratio")
        return self.loraplus_lr_ratio if own is None else own
