"""What --network_args says to DyLoRA. Importing this brings no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from library.options import OptionError
from networks.blocks import BlockLayout, argument, number
from networks.lora_settings import DEFAULT_DIM, LIST_KEYS, LoRASettings, RankRule


def check_arguments(**kwargs: Any) -> None:
    """Raise OptionError for unknown names and unusable values of --network_args."""
    DyLoRASettings.parse(None, kwargs)


def check_rank(network_dim: int | None, **kwargs: Any) -> None:
    """Raise OptionError for arguments that don't fit --network_dim."""
    DyLoRASettings.parse(None, kwargs).check_rank(DEFAULT_DIM if network_dim is None else network_dim)


@dataclass(frozen=True)
class DyLoRASettings(LoRASettings):
    """Those of LoRA, without ranks of single blocks, and the ranks that learn together."""

    unit: int = 1

    @classmethod
    def parse(cls, neuron_dropout: float | None, arguments: Mapping[str, Any]) -> DyLoRASettings:
        """As LoRASettings; OptionError for ranks by block."""
        for key in LIST_KEYS:
            if arguments.get(key) is not None:
                problem = (
                    "networks.dylora has one rank and alpha for all blocks, so that its file can be cut at any rank"
                )
                raise OptionError(argument(key), problem, "leave it out, or use networks.lora")
        unit = number(arguments.get("unit") or 1, "unit")
        if unit < 1 or unit != int(unit):
            raise OptionError(argument("unit"), f"{unit:g} is no number of ranks", "use a whole number of 1 or more")
        return replace(super().parse(neuron_dropout, arguments), unit=int(unit))

    def check_rank(self, dim: int) -> None:
        """OptionError unless the rank is a multiple of `unit`, and that of convolutions too, if they have one."""
        if dim % self.unit:
            problem = f"{self.unit} does not divide the rank {dim}"
            raise OptionError(argument("unit"), problem, "use a --network_dim that is a multiple of it")
        if self.conv_dim and self.conv_dim != dim:
            problem = f"{self.conv_dim} is not --network_dim {dim}, and networks.dylora has one rank for all layers"
            raise OptionError(argument("conv_dim"), problem, f"use conv_dim={dim}, or networks.lora")

    def rank_rule(self, dim: int, alpha: float, layout: BlockLayout) -> RankRule:
        """As that of LoRA; convolutions have the alpha of the other layers where no conv_alpha is given."""
        self.check_rank(dim)
        with_alpha = self if self.conv_alpha is not None or not self.conv_dim else replace(self, conv_alpha=alpha)
        return super(DyLoRASettings, with_alpha).rank_rule(dim, alpha, layout)
