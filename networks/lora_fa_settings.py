"""What --network_args says to LoRA-FA. Importing this brings no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options import OptionError
from networks.blocks import argument
from networks.lora_settings import LoRASettings


def check_arguments(**kwargs: Any) -> None:
    """Raise OptionError for unknown names and unusable values of --network_args."""
    LoRAFASettings.parse(None, kwargs)


@dataclass(frozen=True)
class LoRAFASettings(LoRASettings):
    """Those of LoRA, without LoRA+."""

    @classmethod
    def parse(cls, neuron_dropout: float | None, arguments: Mapping[str, Any]) -> LoRAFASettings:
        """As LoRASettings; OptionError for a second rate, where only one of the projections learns."""
        for key, value in arguments.items():
            if key.startswith("loraplus") and value is not None:
                problem = "only one projection learns in networks.lora_fa, so there is no second rate to give"
                raise OptionError(argument(key), problem, "raise --learning_rate, or use networks.lora")
        return super().parse(neuron_dropout, arguments)
