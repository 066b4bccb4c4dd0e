"""Options of generation with networks (LoRA and its relatives)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from library.options import named_values, opt, require
from library.text.network_tag import network_tag
from library.wording import counted


@dataclass(frozen=True)
class NetworkFile:
    """One network to generate with."""

    module: str
    path: str
    multiplier: float
    arguments: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NetworkOptions:
    """Networks (LoRA and its relatives): lists of equal length."""

    network_module: tuple[str, ...] | None = opt(help="Python module per network, for example networks.lora")
    network_weights: tuple[str, ...] | None = opt(help="file per network")
    network_mul: tuple[float, ...] | None = opt(help="multiplier per network; 1.0 where missing")
    network_args: tuple[str, ...] | None = opt(help='arguments per network, each as "name=value;name=value"')
    network_merge: bool = opt(False, help="merge the networks into the model before generating: faster")

    def __post_init__(self) -> None:
        modules, weights = len(self.network_module or ()), len(self.network_weights or ())
        require(
            weights == 0 or modules > 0,
            "--network_weights",
            "no --network_module says what kind of network this is",
            f"add --network_module {' '.join(['networks.lora'] * weights)} for a LoRA",
        )
        require(
            modules == weights,
            "--network_weights" if weights > modules else "--network_module",
            f"{counted(modules, 'module')} but {counted(weights, 'file')}",
            "give one module per file, in the same order",
        )
        for name in ("network_mul", "network_args"):
            given = len(getattr(self, name) or ())
            require(
                given <= modules,
                f"--{name}",
                f"{counted(given, 'value')} for {counted(modules, 'network')}",
                "give at most one per network, in the same order",
            )
        self.files  # noqa: B018  checks the form of --network_args
        require(bool(modules) or not self.network_merge, "--network_merge", "there is no network to merge")

    @property
    def tags(self) -> str:
        """The networks as prompts of web user interfaces ask for them."""
        return " ".join(network_tag(Path(file.path).stem, file.multiplier) for file in self.files)

    def with_more(self, others: NetworkOptions) -> NetworkOptions:
        """These networks and behind them others; whether they are merged into the model is said here."""
        files = (*self.files, *others.files)
        arguments = (*(self.network_args or ()), *[""] * len(self.files))[: len(self.files)]
        return replace(
            self,
            network_module=tuple(file.module for file in files),
            network_weights=tuple(file.path for file in files),
            network_mul=tuple(file.multiplier for file in files),
            network_args=(*arguments, *(others.network_args or ())),
        )

    @property
    def files(self) -> tuple[NetworkFile, ...]:
        """The lists read side by side; missing multipliers are 1.0."""
        modules, weights = self.network_module or (), self.network_weights or ()
        multipliers = (self.network_mul or ()) + (1.0,) * len(modules)
        arguments = (self.network_args or ()) + ("",) * len(modules)
        return tuple(
            NetworkFile(module, path, multiplier, network_arguments(text))
            for module, path, multiplier, text in zip(modules, weights, multipliers, arguments, strict=False)
        )


def network_arguments(text: str) -> dict[str, str]:
    """ "name=value;name=value" as a dict; a value may contain "="."""
    return named_values([item.strip() for item in text.split(";") if item.strip()], "--network_args")
