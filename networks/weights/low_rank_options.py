"""What the tools of low-rank algebra are told: resizing, extracting, merging by SVD. Importing this brings no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from library.checkpoints.ratios import check_ratios
from library.checkpoints.weights import WEIGHTS_ENDINGS
from library.options import opt, require
from networks.weights.merge_options import PLOT_HELP, PRECISIONS, check_plot

logger = logging.getLogger(__name__)

DYNAMIC_METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")
SVD_METHODS = ("exact", "randomized")
DEVICE_HELP = "where to calculate: cuda, cuda:1, mps, cpu; without it the CPU"
CLAMP_HELP = "limit all numbers to this quantile of them, as the trade does; 1 for no limit"
CONV_RANK_HELP = "rank of convolutions larger than one pixel; without it as the others"


def _at_least_one(flag: str, rank: int | None) -> None:
    require(rank is None or rank >= 1, flag, f"{rank} is no rank", "use 1 or more")


def _is_share(flag: str, share: float) -> None:
    require(0 < share <= 1, flag, f"{share:g} is no share of all numbers", "use more than 0 and at most 1")


def _check_clamp(share: float) -> None:
    """Numbers lie on both sides of 0: half of them, and less, is a limit of 0 or below."""
    problem = f"{share:g} would leave nothing of most numbers"
    require(0.5 < share <= 1, "--clamp_quantile", problem, "use more than 0.5 and at most 1, 0.99 for instance")


@dataclass(frozen=True)
class ResizeOptions:
    """What is resized, and to which ranks."""

    save_precision: str | None = opt(choices=(None, *PRECISIONS), help="precision of the file; float without it")
    new_rank: int = opt(4, help="rank of the result; with --dynamic_method the largest one")
    new_conv_rank: int | None = opt(help=CONV_RANK_HELP)
    save_to: str | None = opt(help=f"file to write ({', '.join(WEIGHTS_ENDINGS)})")
    model: str | None = opt(help="LoRA to resize")
    device: str | None = opt(help=DEVICE_HELP)
    verbose: bool = opt(False, help="say of each module what is kept")
    dynamic_method: str | None = opt(
        choices=(None, *DYNAMIC_METHODS),
        help="a rank for each module by its singular values: sv_ratio keeps those above the largest one divided by "
        "--dynamic_param, sv_fro and sv_cumulative as many as make up this share of the Frobenius norm, or of the sum",
    )
    dynamic_param: float | None = opt(help="what --dynamic_method goes by: a ratio, or a share between 0 and 1")
    exact_rank: bool = opt(
        False, help="with --dynamic_method: exactly the rank the rule asks for; the trade's tools keep one more"
    )
    ignore_unmatched: bool = opt(False, help="copy what is no plain LoRA as it is, with a warning, instead of stopping")
    plot: str | None = opt(help=PLOT_HELP)

    def __post_init__(self) -> None:
        _at_least_one("--new_rank", self.new_rank)
        _at_least_one("--new_conv_rank", self.new_conv_rank)
        check_plot(self.plot)
        if self.dynamic_method is None:
            idle = {"--dynamic_param": self.dynamic_param is not None, "--exact_rank": self.exact_rank}
            if any(idle.values()):
                names = ", ".join(flag for flag, is_given in idle.items() if is_given)
                logger.warning("%s: no effect without --dynamic_method", names)
            return
        require(bool(self.dynamic_param), "--dynamic_param", f"{self.dynamic_method} needs it, and not as 0", "give it")
        assert self.dynamic_param is not None
        if self.dynamic_method == "sv_ratio":
            require(self.dynamic_param > 0, "--dynamic_param", f"{self.dynamic_param:g} is no ratio", "use more than 0")
        else:
            _is_share("--dynamic_param", self.dynamic_param)


@dataclass(frozen=True)
class ExtractOptions:
    """What is extracted, and how."""

    v2: bool = opt(False, help="the models are SD 2.x; found out by itself, and checked if said")
    v_parameterization: bool | None = opt(
        help="the models predict velocity; without it what their files say, and else yes for SD 2.x. A value after it "
        "(True or False) is understood"
    )
    sdxl: bool = opt(False, help="the models are SDXL; found out by itself, and checked if said")
    load_precision: str | None = opt(
        choices=(None, *PRECISIONS), help="round the models to this precision before they are subtracted"
    )
    save_precision: str | None = opt(choices=(None, *PRECISIONS), help="precision of the file; float without it")
    model_org: str | None = opt(help="model that training began with: one file")
    model_tuned: str | None = opt(help="model that came of it: one file")
    save_to: str | None = opt(help="LoRA to write; folders that are missing are made")
    dim: int = opt(4, help="rank")
    conv_dim: int | None = opt(help="rank of convolutions larger than one pixel; without it they are left out")
    device: str | None = opt(help=DEVICE_HELP)
    clamp_quantile: float = opt(0.99, help=CLAMP_HELP)
    min_diff: float = opt(
        0.01, help="leave text encoders out if no weight of theirs differs by more than this; 0 keeps all that differ"
    )
    load_original_model_to: str | None = opt(help="without effect: models are read a layer at a time, see --device")
    load_tuned_model_to: str | None = opt(help="without effect: models are read a layer at a time, see --device")
    svd_method: str = opt(
        "exact",
        choices=SVD_METHODS,
        help="exact: the best LoRA of this rank, within a thousandth; randomized: faster, within a hundredth",
    )
    no_metadata: bool = opt(False, help="write no description of the file (modelspec.*) into its header")
    ignore_unmatched: bool = opt(False, help="leave out layers that only one of the models has, with a warning")
    plot: str | None = opt(help=PLOT_HELP)

    def __post_init__(self) -> None:
        require(not (self.v2 and self.sdxl), "--v2", "stands for SD 2.x, and --sdxl for SDXL", "leave one of them out")
        _at_least_one("--dim", self.dim)
        _at_least_one("--conv_dim", self.conv_dim)
        _check_clamp(self.clamp_quantile)
        require(self.min_diff >= 0, "--min_diff", f"{self.min_diff:g} is negative", "use 0 or more")
        check_plot(self.plot)
        for flag in ("load_original_model_to", "load_tuned_model_to"):
            if getattr(self, flag) is not None:
                logger.warning("--%s: no effect, because models are read a layer at a time; where layers are worked on "
                               "is said with --device", flag)  # fmt: skip


@dataclass(frozen=True)
class SvdMergeOptions:
    """What is merged, and to which ranks."""

    save_precision: str | None = opt(choices=(None, *PRECISIONS), help="precision of the file; without it --precision")
    precision: str = opt(
        "float",
        choices=tuple(PRECISIONS),
        help="precision to which inputs are rounded; float without it. Sums are made in float",
    )
    save_to: str | None = opt(help="LoRA to write")
    models: tuple[str, ...] = opt((), help="LoRA files")
    ratios: tuple[float, ...] = opt((), help="strength of each of them, in their order")
    new_rank: int = opt(4, help="rank of the result")
    new_conv_rank: int | None = opt(help=CONV_RANK_HELP)
    device: str | None = opt(help=DEVICE_HELP)
    no_metadata: bool = opt(False, help="write no description of the file (modelspec.*) into its header")
    lbws: tuple[str, ...] = opt(
        (), help="block weights of each network, as JSON lists: 12 or 20 values for SDXL, 17 or 26 for SD 1.x / 2.x"
    )
    clamp_quantile: float = opt(0.99, help=CLAMP_HELP)
    ignore_unmatched: bool = opt(False, help="leave out what can't be merged, with a warning, instead of stopping")
    plot: str | None = opt(help=PLOT_HELP)

    def __post_init__(self) -> None:
        check_ratios(self.ratios, len(self.models))
        _at_least_one("--new_rank", self.new_rank)
        _at_least_one("--new_conv_rank", self.new_conv_rank)
        _check_clamp(self.clamp_quantile)
        check_plot(self.plot)
