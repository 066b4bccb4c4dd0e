"""Options of the training targets."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints.safetensors_io import read_header
from library.options import OptionError, did_you_mean, named_values, opt, require
from library.packages import is_installed

KNOWN_MODULES = ("networks.lora", "networks.oft", "lycoris.kohya")
PACKAGES = {"lycoris": "lycoris-lora"}  # what brings modules that are not ours, by their first name


@dataclass(frozen=True)
class NetworkOptions:
    """The network (LoRA and its relatives)."""

    network_module: str | None = opt(help="Python module of the network, for example networks.lora or lycoris.kohya")
    network_dim: int | None = opt(help="rank; 4 without this option")
    network_alpha: float = opt(1, help="alpha: the network's strength is alpha / rank; 0 stands for the rank")
    network_dropout: float | None = opt(help="share of the rank's activations dropped during training (0-1)")
    network_args: tuple[str, ...] | None = opt(help="further arguments of the network module, as name=value")
    network_weights: str | None = opt(help="network file to start from")
    dim_from_weights: bool = opt(False, help="take ranks and alphas from --network_weights")
    network_train_unet_only: bool = opt(False, help="train only the U-Net's part")
    network_train_text_encoder_only: bool = opt(False, help="train only the text encoder's part")
    unet_lr: float | None = opt(help="learning rate of the U-Net's part; --learning_rate without this option")
    text_encoder_lr: float | None = opt(
        help="learning rate of the text encoder's part; --learning_rate without this option"
    )
    base_weights: tuple[str, ...] | None = opt(help="network files merged into the base model before training")
    base_weights_multiplier: tuple[float, ...] | None = opt(
        help="a multiplier per file of --base_weights; 1.0 where missing"
    )
    scale_weight_norms: float | None = opt(
        help="limit of the Frobenius norm of each module's weight change (1 is a start)"
    )
    training_comment: str | None = opt(help="text written into the file's metadata")

    usual_rate = "1e-4 is usual for a LoRA"
    without_text = "add --network_train_unet_only"  # how to leave the text encoders untrained

    def __post_init__(self) -> None:
        require(
            bool(self.network_module), "--network_module", "no network module given", "use networks.lora for a LoRA"
        )
        require(
            self.network_dim is None or self.network_dim >= 1,
            "--network_dim",
            f"{self.network_dim} is no rank",
            "use 1 or more (4 to 128 is usual)",
        )
        require(
            not (self.network_train_unet_only and self.network_train_text_encoder_only),
            "--network_train_unet_only",
            "contradicts --network_train_text_encoder_only",
            "give one of them, or neither to train both",
        )
        require(
            not self.dim_from_weights or bool(self.network_weights),
            "--dim_from_weights",
            "needs --network_weights to take the ranks from",
        )
        dropout = self.network_dropout
        require(
            dropout is None or 0 <= dropout < 1, "--network_dropout", f"{dropout} is out of range", "use 0 to below 1"
        )
        for name in ("network_alpha", "unet_lr", "text_encoder_lr"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                require(number is None or number >= 0, f"--{name}", f"{number} is negative")
        limit = self.scale_weight_norms
        require(limit is None or limit > 0, "--scale_weight_norms", f"{limit} must be above 0")
        named_values(self.network_args, "--network_args")  # checks their form

    @property
    def trains_text(self) -> bool:
        """Whether text encoders get a part of the network."""
        return not self.network_train_unet_only

    @property
    def arguments(self) -> dict[str, str]:
        """--network_args by name; a value may contain "="."""
        return named_values(self.network_args, "--network_args")

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        notes = []
        idle = "text_encoder_lr" if self.network_train_unet_only else "unet_lr"
        alone = self.network_train_unet_only or self.network_train_text_encoder_only
        if alone and getattr(self, idle) is not None:
            notes.append(f"--{idle} has no effect: that part is not trained")
        num_files = len(self.base_weights or ())
        if spare := (self.base_weights_multiplier or ())[num_files:]:
            listed = " ".join(f"{value:g}" for value in spare)
            notes.append(f"--base_weights_multiplier: {listed} without effect, --base_weights names {num_files} files")
        return notes

    def check_before_start(self) -> None:
        """Raise OptionError for a module that is not there, its arguments, and files that can't be read: without torch.

        A module `x.y` may have a module `x.y_settings` beside it, free of torch, with check_arguments(**arguments).
        """
        name = str(self.network_module)
        if not is_installed(name):
            raise no_such_module(name)
        if is_installed(f"{name}_settings"):
            importlib.import_module(f"{name}_settings").check_arguments(**self.arguments)
        weights = [self.network_weights] if self.network_weights else []
        for flag, files in (("--network_weights", weights), ("--base_weights", self.base_weights or ())):
            for file in files:
                if not Path(file).is_file():
                    raise OptionError(flag, f"{file} does not exist", "check the path")
                if Path(file).suffix == ".safetensors":
                    read_header(file, flag)


def parse_rates(value: Any) -> float | tuple[float, ...] | None:
    """For `opt(parse=...)`: one learning rate for both text encoders, or one for each."""
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        rates = tuple(float(rate) for rate in values)
    except (TypeError, ValueError):
        raise ValueError("is not a number for both text encoders, or a number for each") from None
    if len(rates) > 2 or not all(map(math.isfinite, rates)):
        raise ValueError("is not a number for both text encoders, or a number for each")
    return rates if len(set(rates)) > 1 else rates[0] if rates else None


@dataclass(frozen=True)
class SdxlNetworkOptions(NetworkOptions):
    """The network (LoRA and its relatives)."""

    text_encoder_lr: tuple[float, ...] | float | None = opt(  # type: ignore[assignment]
        parse=parse_rates,
        help="learning rate of the text encoders' parts, or two: of the first and of the second one; --learning_rate "
        "without this option, 0 leaves an encoder out",
    )


def no_such_module(name: str) -> OptionError:
    """The error for a --network_module that can't be found, with the nearest way out."""
    package = PACKAGES.get(name.partition(".")[0])
    way_out = f"install the package {package}" if package else did_you_mean(name, KNOWN_MODULES)
    return OptionError(
        "--network_module", f"there is no Python module {name!r}", way_out or "use networks.lora for a LoRA"
    )
