"""Options of generation with networks (LoRA and its relatives)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from library.generate.options import check_factor
from library.options import named_values, opt, require
from library.text.network_tag import network_tag
from library.wording import counted

COLOR_CODES = 7  # colours of which each channel is 0 or 255, without black


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
    network_show_meta: bool = opt(False, help="show the metadata of the network files")
    network_merge: bool = opt(False, help="merge the networks into the model before generating: faster")
    network_merge_n_models: int | None = opt(help="merge the first so many networks, and apply the others")
    network_pre_calc: bool = opt(
        False, help="add the networks to the model's weights before each batch that changes their multipliers: faster"
    )
    network_regional_mask_max_color_codes: int | None = opt(
        help="colours of the region map (--mask_path), 1 to 7: red, green, yellow, blue, magenta, cyan, white are the "
        "places of networks 1 to 7; without this option the red, green and blue channels are those of networks 1 to 3"
    )

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
        for multiplier in self.network_mul or ():
            check_factor("--network_mul", multiplier, "1")
        self.files  # noqa: B018  checks the form of --network_args
        for name in ("network_merge", "network_merge_n_models", "network_pre_calc"):
            require(bool(modules) or not getattr(self, name), f"--{name}", "there is no network")
        count, colors = self.network_merge_n_models, self.network_regional_mask_max_color_codes
        require(
            count is None or 0 <= count <= modules,
            "--network_merge_n_models",
            f"{count} of {counted(modules, 'network')} can't be merged",
            f"use 0 to {modules}",
        )
        require(
            colors is None or 0 <= colors <= COLOR_CODES,
            "--network_regional_mask_max_color_codes",
            f"{colors} is out of range",
            f"use 1 to {COLOR_CODES}",
        )

    @property
    def num_merged(self) -> int:
        """Networks that are merged into the model, the first ones."""
        if self.network_merge_n_models:
            return self.network_merge_n_models
        return len(self.files) if self.network_merge else 0

    @property
    def applied(self) -> tuple[NetworkFile, ...]:
        """Networks that work beside the model: those with multipliers for each prompt, and with regions."""
        return self.files[self.num_merged :]

    def notes(self, is_regional: bool) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        notes = []
        if self.network_merge and self.network_merge_n_models:
            notes.append("--network_merge has no effect: --network_merge_n_models says how many are merged")
        if self.network_pre_calc and not self.applied:
            notes.append("--network_pre_calc has no effect: all networks are merged")
        if self.network_regional_mask_max_color_codes and not is_regional:
            why = "needs --mask_path and networks that are not merged"
            notes.append(f"--network_regional_mask_max_color_codes has no effect: it {why}")
        return notes

    @property
    def tags(self) -> str:
        """The networks as prompts of web user interfaces ask for them."""
        return self.tags_at(None)

    def tags_at(self, multipliers: tuple[float, ...] | None) -> str:
        """The same with the multipliers of a prompt line, if any, for the networks that follow them."""
        own = tuple(file.multiplier for file in self.files)
        used = own[: self.num_merged] + multipliers_of(multipliers, own[self.num_merged :])
        return " ".join(
            network_tag(Path(file.path).stem, multiplier) for file, multiplier in zip(self.files, used, strict=True)
        )

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


def multipliers_of(given: tuple[float, ...] | None, defaults: tuple[float, ...]) -> tuple[float, ...]:
    """A multiplier for each network: those given, of which the last one serves all further ones, or the defaults."""
    return (given + given[-1:] * len(defaults))[: len(defaults)] if given else defaults


def network_arguments(text: str) -> dict[str, str]:
    """ "name=value;name=value" as a dict; a value may contain "="."""
    return named_values([item.strip() for item in text.split(";") if item.strip()], "--network_args")
