"""What the tools that merge networks are told. Importing this brings no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path

from library.checkpoints.ratios import check_ratios
from library.options import opt, require

logger = logging.getLogger(__name__)

PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}  # as flags call them -> as headers do
PLOT_HELP = "picture to write (.png): how much of each block's change its strongest directions hold"
V2_HELP = "the model is SD 2.x; found out by itself, and checked if said"


def check_plot(plot: str | None) -> None:
    """OptionError unless the picture can be a .png."""
    require(plot is None or Path(plot).suffix.lower() == ".png", "--plot", f"{plot} does not end in .png", "name one")


@dataclass(frozen=True)
class PlainMergeOptions:
    """What is merged, and how."""

    save_precision: str | None = opt(
        choices=(None, *PRECISIONS),
        help="precision of the file; without it --precision, and what is not changed in a model keeps its own",
    )
    precision: str = opt(
        "float",
        choices=tuple(PRECISIONS),
        help="precision to which inputs are rounded; float without it. Sums are made in float",
    )
    sd_model: str | None = opt(
        help="model to merge the networks into: one file, .safetensors or .ckpt; without it they are merged together"
    )
    save_to: str | None = opt(help="file to write: .safetensors, or .ckpt, .pt, .pth for PyTorch's own format")
    models: tuple[str, ...] = opt((), help="files of networks: LoRA, and into a model also its relatives")
    ratios: tuple[float, ...] = opt((), help="strength of each network, in their order")

    def __post_init__(self) -> None:
        check_ratios(self.ratios, len(self.models))


@dataclass(frozen=True)
class MergeOptions(PlainMergeOptions):
    """What is merged, and how."""

    no_metadata: bool = opt(False, help="write no description of the file (modelspec.*) into its header")
    concat: bool = opt(False, help="LoRA with LoRA: put ranks side by side instead of adding them; ranks may differ")
    shuffle: bool = opt(False, help="LoRA with LoRA: put the ranks of each module into a random order")
    exact: bool = opt(
        False,
        help="LoRA with LoRA: the exact weighted sum of what the networks do, by ranks side by side; ranks may differ",
    )
    lbws: tuple[str, ...] = opt(
        (), help="block weights of each network, as JSON lists: 12 or 20 values for SDXL, 17 or 26 for SD 1.x / 2.x"
    )
    ignore_unmatched: bool = opt(False, help="leave out what can't be merged, with a warning, instead of stopping")
    plot: str | None = opt(help=PLOT_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_plot(self.plot)
        require(not (self.concat and self.exact), "--exact", "puts ranks side by side itself", "leave --concat out")
        if self.sd_model is not None:
            idle = [f"--{name}" for name in ("concat", "shuffle", "exact") if getattr(self, name)]
            if idle:
                logger.warning("%s: no effect with --sd_model; a model takes the exact sum", ", ".join(idle))


@dataclass(frozen=True)
class SdMergeOptions(MergeOptions):
    """What is merged, and how (SD 1.x and 2.x)."""

    v2: bool = opt(False, help=V2_HELP)


@dataclass(frozen=True)
class OldMergeOptions(PlainMergeOptions):
    """What is merged."""

    v2: bool = opt(False, help=V2_HELP)

    def current(self) -> SdMergeOptions:
        """The same for merge_lora.py."""
        return SdMergeOptions(**{each.name: getattr(self, each.name) for each in fields(self)})
