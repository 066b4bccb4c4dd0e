"""What the tools of low-rank algebra share: where they calculate, how a module is stored, what is told of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from library.checkpoints.safetensors_io import DTYPES, NonFiniteError, is_finite, rounded
from library.options import OptionError
from networks.key_names import DOWN, UP
from networks.weights.block_names import block_name
from networks.weights.energy_plot import Spectrum, draw_energy
from networks.weights.fidelity import Factors, FidelityReport, low_rank_error, percent
from networks.weights.merge_inputs import one_or_dynamic
from networks.weights.network_file import NetworkFile
from networks.weights.stored_results import StoredResults
from networks.weights.svd import NOTHING, Svd, clamped

logger = logging.getLogger(__name__)
CLAMPED = 0.01  # an error above which limited numbers may be the reason; rounding is below it


def device_of(name: str | None) -> torch.device:
    """The device of --device, or the CPU; OptionError for one that is not here."""
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise OptionError("--device", f"{name!r} can't be used ({reason})", "leave it out to use the CPU") from None
    return device


def torch_dtype(precision: str) -> torch.dtype:
    """ "F16", as headers name it -> torch.float16."""
    return getattr(torch, DTYPES[precision][1])


def finite_pair(file: NetworkFile, name: str, dtype: torch.dtype, device: torch.device) -> Factors:
    """(down_RI, up_OR) of a module as float32 matrices, rounded to `dtype` first; NonFiniteError for NaN, infinity."""
    what = f"{file.path}: {name}"
    pair = (rounded(part.to(device), dtype, what, "--precision") for part in file.pair(name))
    down, up = (part.float().flatten(1) for part in pair)
    if not (is_finite(down) and is_finite(up)):
        raise NonFiniteError(f"{what} holds NaN or infinity", "take another file")
    return down, up


@dataclass(frozen=True)
class Layer:
    """Where a result belongs: its module, and the shape of the layer's weight."""

    name: str
    shape: tuple[int, ...]  # [out, in] or [out, in, height, width]

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution of more than one pixel, which has a rank of its own."""
        return len(self.shape) == 4 and self.shape[2:] != (1, 1)

    def largest_rank(self, rank: int, conv_rank: int | None) -> int:
        """The rank asked for, no more than the layer has inputs and outputs."""
        wanted = conv_rank if self.is_conv and conv_rank is not None else rank
        return min(wanted, *self.shape[:2])


@dataclass
class Results:
    """A network in the making: its tensors on the disk, and what is said of it in the end."""

    store: StoredResults
    dtype: torch.dtype  # of the file
    alpha_dtype: torch.dtype
    report: FidelityReport = field(default_factory=FidelityReport)  # of what is stored
    by_rank: FidelityReport = field(default_factory=FidelityReport)  # of what the rank alone costs
    spectra: dict[str, list[Spectrum]] = field(default_factory=dict)  # by block
    ranks: dict[str, int] = field(default_factory=dict)  # by module
    alphas: dict[str, float] = field(default_factory=dict)  # as stored
    convs: set[str] = field(default_factory=set)  # modules of convolutions of more than one pixel

    def add(self, layer: Layer, svd: Svd, rank: int, *, alpha: float | None = None, clamp: float = 1.0) -> Factors:
        """Store the best pair of a rank, its numbers limited to the `clamp` quantile.

        Returns (down, up) as stored, with up multiplied by what is stored as alpha / rank.
        """
        down_RI, up_OR = clamped(*svd.factors(rank), clamp)
        one = (1, 1) if len(layer.shape) == 4 else ()
        down, up = down_RI.to(self.dtype), up_OR.to(self.dtype)
        alpha = float(rank) if alpha is None else alpha
        number = torch.tensor(alpha, dtype=torch.float64).to(self.alpha_dtype)
        self.store.add(f"{layer.name}.alpha", number)
        self.store.add(f"{layer.name}.{DOWN}", down.reshape(rank, *layer.shape[1:]).cpu())
        self.store.add(f"{layer.name}.{UP}", up.reshape(layer.shape[0], rank, *one).cpu())
        self.ranks[layer.name], self.alphas[layer.name] = rank, float(number)
        if layer.is_conv:
            self.convs.add(layer.name)
        self.spectra.setdefault(block_name(layer.name), []).append(Spectrum.of(svd.values_K, svd.energy, rank))
        scale = float(number) / rank
        return down.float(), up.float() if scale == 1 else up.float() * scale

    def described(self, values: Mapping[str, float]) -> tuple[str, str]:
        """For metadata: the one value of all linear layers' modules, or "Dynamic", and that of convolutions.

        Where there are none of one sort, they are said to be as the other.
        """
        linear = [value for name, value in values.items() if name not in self.convs]
        convs = [value for name, value in values.items() if name in self.convs]
        return one_or_dynamic(linear or convs), one_or_dynamic(convs or linear)

    def compare(self, name: str, exact: Sequence[Factors], stored: Factors, svd: Svd) -> None:
        """Note how far the stored product is from an exact one that is a sum of low-rank products."""
        self.note(name, *low_rank_error(exact, [stored]), svd)

    def note(self, name: str, exact_sq: float, error_sq: float, svd: Svd) -> None:
        """Note the squared norms of an exact change and of the stored one's distance from it."""
        is_empty = not len(svd.values_K) or float(svd.values_K[0]) <= NOTHING
        self.report.add(name, exact_sq, error_sq, is_empty=is_empty)
        left = svd.energy - float(svd.values_K[: self.ranks[name]].square().sum())
        scale_sq = exact_sq / svd.energy if svd.energy else 0.0  # between what was decomposed and the change
        self.by_rank.add(name, exact_sq, left * scale_sq)

    def tell(self, title: str, *, plot: str | None, way_out: str = "") -> None:
        """Say how good the result is, and draw it where asked; `way_out` of what clamping costs, if anything does."""
        self.report.log(title)
        stored, possible = self.report.total.error, self.by_rank.total.error
        if way_out and stored > CLAMPED and possible < stored / 2:
            logger.warning("the rank alone costs %s of these %s, limiting large numbers (%s, as the trade) the rest: "
                           "use --clamp_quantile 1", percent(possible), percent(stored), way_out)  # fmt: skip
        elif way_out and percent(stored) != percent(possible):
            logger.info("the rank alone costs %s; the rest comes of limiting large numbers, as the trade does (%s), "
                        "and of rounding", percent(possible), way_out)  # fmt: skip
        if plot is not None:
            draw_energy(self.spectra, Path(plot).expanduser())
            logger.info("%s: the picture of what the strongest directions hold", plot)
