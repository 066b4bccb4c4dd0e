"""Options of how the models compute."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import OptionError, opt


@dataclass(frozen=True)
class AttentionOptions:
    """The attention kernel."""

    mem_eff_attn: bool = opt(False, help="attention in slices: least memory, slow")
    xformers: bool = opt(False, help="xformers' memory-efficient attention (package xformers)")
    sdpa: bool = opt(False, help="PyTorch's scaled dot-product attention; the default")

    def __post_init__(self) -> None:
        if sum((self.mem_eff_attn, self.xformers, self.sdpa)) > 1:
            chosen = " and ".join(
                name for name in ("--mem_eff_attn", "--xformers", "--sdpa") if getattr(self, name[2:])
            )
            raise OptionError(chosen, "choose one kind of attention")

    @property
    def kind(self) -> str:
        """ "sdpa", "xformers" or "sliced"."""
        return "sliced" if self.mem_eff_attn else "xformers" if self.xformers else "sdpa"
