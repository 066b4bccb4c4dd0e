"""How well a result keeps what it was made from: relative errors of weight changes, per block and in total.

The error of a module is ||stored - exact||_F / ||exact||_F, where `exact` is the change that a perfect tool would have
made and `stored` the one that the written file makes. Of a block and of the total the squares are summed first:
sqrt(sum ||stored - exact||^2 / sum ||exact||^2).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from networks.weights.block_names import block_name, block_order

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LEAST_TOLD = 1e-4

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # (down, up): [r, in, ...] and [out, r, ...]; up @ down


@dataclass
class Kept:
    """Sums over the modules of a block."""

    modules: int = 0
    exact_sq: float = 0.0
    error_sq: float = 0.0

    def add(self, exact_norm_sq: float, error_norm_sq: float) -> None:
        self.modules += 1
        self.exact_sq += exact_norm_sq
        self.error_sq += error_norm_sq

    @property
    def norm(self) -> float:
        """Frobenius norm of the exact change."""
        return math.sqrt(self.exact_sq)

    @property
    def error(self) -> float:
        """Relative; infinite where something is stored and nothing should be."""
        if not self.exact_sq:
            return math.inf if self.error_sq else 0.0
        return math.sqrt(self.error_sq / self.exact_sq)


@dataclass
class FidelityReport:
    """Relative errors of the modules of a result, collected one by one."""

    blocks: dict[str, Kept] = field(default_factory=dict)
    total: Kept = field(default_factory=Kept)
    worst: tuple[str, float] = ("", 0.0)  # module and its relative error

    def add(self, name: str, exact_norm_sq: float, error_norm_sq: float, *, is_empty: bool = False) -> None:
        """A module: squared Frobenius norms of its exact change, and of the difference of the stored one from it.

        `is_empty`: so small a change that its own relative error says nothing.
        """
        for kept in (self.blocks.setdefault(block_name(name), Kept()), self.total):
            kept.add(exact_norm_sq, max(error_norm_sq, 0.0))
        module = Kept()
        module.add(exact_norm_sq, max(error_norm_sq, 0.0))
        if not is_empty and module.error > self.worst[1]:
            self.worst = (name, module.error)

    def add_factors(self, name: str, exact: Sequence[Factors], stored: Sequence[Factors]) -> None:
        """A module whose exact and stored changes are sums of low-rank products."""
        self.add(name, *low_rank_error(exact, stored))

    def rows(self) -> list[tuple[str, Kept]]:
        """(block, what it keeps) from the text encoders to the last block, and the total."""
        return [*sorted(self.blocks.items(), key=lambda row: block_order(row[0])), ("total", self.total)]

    def table(self) -> str:
        """Lines of text: block, number of modules, size of the change, relative error."""
        texts = [("block", "modules", "norm", "error (norm)")]
        texts += [
            (block, str(kept.modules), f"{kept.norm:.4g}", percent(kept.error)) for block, kept in self.rows()
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        return "\n".join(
            f"{block.ljust(widths[0])}  {count.rjust(widths[1])}  {norm.rjust(widths[2])}  {error.rjust(widths[3])}"
            for block, count, norm, error in texts
        )

    def log(self, title: str) -> None:
        """Show the table under a title; the worst module below it."""
        name, error = self.worst
        worst = f"\nlargest error of a module: {percent(error)} ({name})" if name else ""
        logger.info("%s\n%s%s", title, self.table(), worst)


def percent(error: float) -> str:
    """ "1.23 %": three digits that count. What is below a hundredth comes of rounding, also that of the comparison."""
    if 0 < error < LEAST_TOLD:
        return f"< {100 * LEAST_TOLD:g} %"
    return "0 %" if not error else f"{100 * error:.3g} %"


# ------------------------------------------------------------------------------------------- low-rank products


def low_rank_error(exact: Sequence[Factors], stored: Sequence[Factors]) -> tuple[float, float]:
    """(||exact||^2, ||stored - exact||^2) of sums of products up @ down, without the products.

    With the factors side by side ||B A||^2 = tr(A A^T B^T B), a sum over matrices of the size of the ranks. Computed
    in float64; the difference of equal sums comes out as 1e-8 of them (rounding of the squares), not as 0.
    """
    import torch

    ranks = sum(down.shape[0] for down, _ in exact)
    pairs = [*exact, *stored]
    down_RI = torch.cat([down.double().flatten(1) for down, _ in pairs])
    up_OR = torch.cat([up.double().flatten(1) for _, up in pairs], dim=1)
    gram_RR = (down_RI @ down_RI.T).mul_(up_OR.T @ up_OR)
    sign_R = torch.ones_like(gram_RR[0])
    sign_R[ranks:] = -1
    return float(gram_RR[:ranks, :ranks].sum().clamp(min=0)), float((sign_R @ gram_RR @ sign_R).clamp(min=0))
