"""Options of how the models compute."""

from __future__ import annotations

from dataclasses import dataclass, fields

from library.options import opt, require
from library.packages import is_installed


@dataclass(frozen=True)
class AttentionOptions:
    """The attention kernel."""

    mem_eff_attn: bool = opt(False, help="attention in slices: least memory, slow")
    xformers: bool = opt(False, help="xformers' memory-efficient attention (package xformers)")
    sdpa: bool = opt(False, help="PyTorch's scaled dot-product attention; the default")

    @property
    def kind(self) -> str:
        """ "sdpa", "xformers" or "sliced"."""
        return "sliced" if self.mem_eff_attn else "xformers" if self.xformers else "sdpa"

    def notes(self) -> list[str]:
        """A sentence where several kinds are asked for: the first of mem_eff_attn, xformers, sdpa is used."""
        chosen, *others = [f"--{field.name}" for field in fields(self) if getattr(self, field.name)] or [""]
        return [f"{' and '.join(others)} without effect: {chosen} goes first"] if others else []

    def check_package(self) -> None:
        """Raise OptionError unless the package of the kind in force is installed."""
        is_there = self.kind != "xformers" or is_installed("xformers")
        require(is_there, "--xformers", "the package xformers is not installed", "pip install xformers, or use --sdpa")
