"""Options of the previews: which pictures are drawn while training, and when."""

from __future__ import annotations

from dataclasses import dataclass

from library.diffusion.samplers import SAMPLERS
from library.options import OptionError, opt

FREQUENCIES = ("sample_every_n_steps", "sample_every_n_epochs")


@dataclass(frozen=True)
class PreviewOptions:
    """Previews: pictures drawn while training."""

    sample_every_n_steps: int | None = opt(help="draw previews after every n-th optimizer update; 0 or less: never")
    sample_every_n_epochs: int | None = opt(
        help="draw previews after every n-th epoch instead of every so many steps; 0 or less: never"
    )
    sample_at_first: bool = opt(False, help="draw previews before the first step of a new run, too")
    sample_prompts: str | None = opt(help="file of prompts for previews: .txt (one per line), .toml or .json")
    sample_sampler: str = opt(
        "ddim", choices=list(SAMPLERS), help="sampling method of previews whose prompt names none"
    )

    def __post_init__(self) -> None:
        asking = [name for name in FREQUENCIES if (getattr(self, name) or 0) > 0]
        asking += ["sample_at_first"] * self.sample_at_first
        if asking and not self.sample_prompts:
            way_out = "name a file of prompts with --sample_prompts"
            raise OptionError(f"--{asking[0]}", "nothing says what the previews show", way_out)

    @property
    def every_n_epochs(self) -> int | None:
        """Epochs between two rounds of previews; None: previews don't follow epochs."""
        every = self.sample_every_n_epochs
        return every if every is not None and every > 0 else None

    @property
    def every_n_steps(self) -> int | None:
        """Optimizer updates between two rounds of previews; None: previews don't follow steps."""
        every = self.sample_every_n_steps
        return every if every is not None and every > 0 and self.every_n_epochs is None else None

    @property
    def is_on(self) -> bool:
        return bool(self.sample_at_first or self.every_n_epochs or self.every_n_steps)

    def due_after_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def due_after_epoch(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        notes = [
            f"--{name} {getattr(self, name)} draws no previews"
            for name in FREQUENCIES
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        if self.every_n_epochs and (self.sample_every_n_steps or 0) > 0:
            notes.append("--sample_every_n_steps has no effect beside --sample_every_n_epochs")
        if self.sample_prompts and not self.is_on:
            notes.append("--sample_prompts has no effect: neither steps nor epochs between previews are given")
        if self.sample_sampler != "ddim" and not self.is_on:
            notes.append("--sample_sampler has no effect: there are no previews")
        return notes
