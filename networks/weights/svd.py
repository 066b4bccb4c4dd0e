"""Low-rank algebra: singular values of products and of matrices, the ranks that resizing rules choose, clamping.

A product B A of low-rank factors is never multiplied out: with B = Q_B R_B and A^T = Q_A R_A, the singular value
decomposition of the small R_B R_A^T = U S V^T gives that of the product, (Q_B U) S (Q_A V)^T, exactly. Of a matrix
only the leading part is computed, by block Golub-Kahan iteration (Golub, Luk, Overton 1981; Musco and Musco 2015),
which goes on until the error is within `TOLERANCE` of the best one that this rank can have.

Shape letters: O outputs, I inputs (times the kernel's pixels for convolutions), R rank, K computed singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TOLERANCE = 4e-4  # relative excess of the error over the best one of this rank, as estimated; see _Convergence
ALL_AT_ONCE = 10  # where the shorter side is less than this many times the rank, all of it is decomposed
MOST_STEPS = 24
ALMOST_ALL = 1e-2  # below this share of energy left over, float32 can't tell how much: float64 then
ROUNDING = 1e-15  # of sums in float64, relative
RANDOMIZED_PASSES = 2
OVERSAMPLING = 64  # of the randomised method
NOTHING = 1e-6  # a largest singular value up to this is none


@dataclass(frozen=True)
class Svd:
    """The leading part of a singular value decomposition: M = U S V^T + rest."""

    scaled_OK: torch.Tensor  # U S
    directions_KI: torch.Tensor  # V^T, rows of unit length
    values_K: torch.Tensor  # S, float64, descending; may be more of them than directions
    energy: float  # of the whole: the squared Frobenius norm, that is the sum of all S^2

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(down_RI, up_OR) whose product up @ down is the best approximation of this rank.

        Where there are fewer directions than `rank`, the others are orthogonal to them and `up` is zero there, so that
        they change nothing and can be trained.
        """
        down_RI, up_OR = self.directions_KI[:rank], self.scaled_OK[:, :rank]
        missing = rank - len(down_RI)
        if missing <= 0:
            return down_RI.contiguous(), up_OR.contiguous()
        fill = _noise(down_RI.shape[1], missing, down_RI)
        all_IR = torch.linalg.qr(torch.cat([down_RI.T, fill], dim=1))[0]
        down_RI = torch.cat([down_RI, all_IR[:, len(down_RI) :].T])
        return down_RI.contiguous(), torch.cat([up_OR, up_OR.new_zeros(len(up_OR), missing)], dim=1)


# ---------------------------------------------------------------------------------------------- products


def product_svd(down_RI: torch.Tensor, up_OR: torch.Tensor, *, keep: int | None = None) -> Svd:
    """All singular values of up @ down, min(O, R, I) of them, and the first `keep` directions (None: all)."""
    rank = len(down_RI)
    if rank >= min(len(up_OR), down_RI.shape[1]):
        return full_svd(up_OR @ down_RI)
    left, left_tau = torch.geqrf(up_OR)
    right, right_tau = torch.geqrf(down_RI.T)
    small_U, values, small_V = torch.linalg.svd(left[:rank].triu() @ right[:rank].triu().T)
    keep = rank if keep is None else min(keep, rank)
    u_OK, v_IK = up_OR.new_zeros(len(up_OR), keep), up_OR.new_zeros(down_RI.shape[1], keep)
    u_OK[:rank] = (small_U * values)[:, :keep]
    v_IK[:rank] = small_V[:keep].T
    scaled_OK, directions_IK = torch.ormqr(left, left_tau, u_OK), torch.ormqr(right, right_tau, v_IK)
    values = values.double()
    return Svd(scaled_OK, directions_IK.T, values, float(values.square().sum()))


def sum_svd(downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor]) -> Svd:
    """Of the sum of up @ down over the pairs: the product of the factors side by side."""
    return product_svd(torch.cat(list(downs)), torch.cat(list(ups), dim=1))


# ---------------------------------------------------------------------------------------------- matrices


def full_svd(matrix_OI: torch.Tensor) -> Svd:
    """All of it, for small matrices."""
    left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    exact = values.double()
    return Svd(left * values, right, exact, float(exact.square().sum()))


def matrix_svd(matrix_OI: torch.Tensor, rank: int, method: str = "exact") -> Svd:
    """At least the first min(rank, O, I) singular values and directions of a float32 matrix.

    "exact": the rest is within 1.002 of the smallest one possible. "randomized": two passes of randomised subspace
    iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4), within about 1.01.
    """
    outputs, inputs = matrix_OI.shape
    if outputs < inputs:
        return _transposed(matrix_svd(matrix_OI.T, rank, method))
    rank = min(rank, inputs)
    if inputs < ALL_AT_ONCE * rank:
        return _gram_svd(matrix_OI, rank)
    if method == "randomized":
        return _randomized(matrix_OI, rank)
    return (
        _block_iteration(matrix_OI, rank)
        or _in_float64(_block_iteration, matrix_OI, rank)
        or _gram_svd(matrix_OI, rank)
    )


def _in_float64(way: Callable[[torch.Tensor, int], Svd | None], matrix: torch.Tensor, rank: int) -> Svd | None:
    found = way(matrix.double(), rank)
    return found and Svd(found.scaled_OK.float(), found.directions_KI.float(), found.values_K, found.energy)


def _width(rank: int) -> int:
    """Directions of a block of the iteration; small blocks reach further at the same cost."""
    return max(16, rank // 2)


def _is_lost(left: float, energy: float, dtype: torch.dtype) -> bool:
    """Whether what is left of the energy is too little to be known in this precision."""
    return dtype == torch.float32 and left < ALMOST_ALL * energy


def _transposed(svd: Svd) -> Svd:
    """Of M^T: its directions become the scaled ones. Directions of the value 0 become 0 and stay without effect."""
    values = svd.values_K[: len(svd.directions_KI)].to(svd.scaled_OK)
    inverse = torch.where(values > 0, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0)
    return Svd(svd.directions_KI.T * values, (svd.scaled_OK * inverse).T, svd.values_K, svd.energy)


def _gram_svd(matrix_OI: torch.Tensor, rank: int) -> Svd:
    """By the eigenvectors of M^T M; O >= I. In float64, rounding is below that of float32 numbers."""
    squares, vectors = torch.linalg.eigh(matrix_OI.T @ matrix_OI)
    energy = _energy(matrix_OI)
    squares, directions_KI = squares.double().flip(0).clamp(min=0), vectors.flip(1)[:, :rank].T
    if _is_lost(energy - float(squares[:rank].sum()), energy, matrix_OI.dtype):
        found = _in_float64(_gram_svd, matrix_OI, rank)
        assert found is not None
        return found
    return Svd(matrix_OI @ directions_KI.T, directions_KI, squares.sqrt(), energy)


def _randomized(matrix_OI: torch.Tensor, rank: int) -> Svd:
    width = min(rank + OVERSAMPLING, matrix_OI.shape[1])
    basis_OK = matrix_OI @ _noise(matrix_OI.shape[1], width, matrix_OI)
    for _ in range(RANDOMIZED_PASSES):
        basis_OK = matrix_OI @ torch.linalg.qr(matrix_OI.T @ basis_OK)[0]
    basis_OK = torch.linalg.qr(basis_OK)[0]
    left, values, right = torch.linalg.svd(basis_OK.T @ matrix_OI, full_matrices=False)
    return Svd(basis_OK @ (left * values), right, values.double(), _energy(matrix_OI))


def _block_iteration(matrix_OI: torch.Tensor, rank: int) -> Svd | None:
    """Rayleigh-Ritz over the block Krylov space of M^T M; O >= I.

    None where two thirds of all directions are not enough, or the precision is not.
    """
    inputs, width = matrix_OI.shape[1], _width(rank)
    convergence = _Convergence(_energy(matrix_OI))
    basis_IK = torch.linalg.qr(matrix_OI.T @ _noise(len(matrix_OI), width, matrix_OI))[0]
    images_OK = matrix_OI @ basis_IK
    gram_KK = (images_OK.T @ images_OK).double()
    for _ in range(MOST_STEPS):
        if len(gram_KK) >= rank:
            convergence.add(float(torch.linalg.eigvalsh(gram_KK)[-rank:].sum()))
        if convergence.is_reached and not _is_lost(convergence.left, convergence.energy, basis_IK.dtype):
            squares, vectors = torch.linalg.eigh(gram_KK)
            chosen = vectors[:, -rank:].flip(1).to(matrix_OI)
            values = squares[-rank:].flip(0).clamp(min=0).sqrt()
            return Svd(images_OK @ chosen, (basis_IK @ chosen).T, values, convergence.energy)
        if 3 * (basis_IK.shape[1] + width) > 2 * inputs or _is_lost(
            convergence.left, convergence.energy, basis_IK.dtype
        ):
            return None
        new_IB = matrix_OI.T @ images_OK[:, -width:]
        for _ in range(2):  # a second time on unit vectors: what is left of a block may be rounding alone
            new_IB = torch.linalg.qr(new_IB - basis_IK @ (basis_IK.T @ new_IB))[0]
        image_OB = matrix_OI @ new_IB
        side = (images_OK.T @ image_OB).double()
        gram_KK = torch.cat([torch.cat([gram_KK, side], 1), torch.cat([side.T, (image_OB.T @ image_OB).double()], 1)])
        basis_IK, images_OK = torch.cat([basis_IK, new_IB], 1), torch.cat([images_OK, image_OB], 1)
    return None


class _Convergence:
    """Whether another step could lower the error by more than TOLERANCE of it.

    What a step adds to the captured energy falls like a geometric series; its sum says what is still missing.
    """

    def __init__(self, energy: float) -> None:
        self.energy = energy
        self.captured: list[float] = []

    def add(self, captured: float) -> None:
        self.captured.append(captured)

    @property
    def left(self) -> float:
        return max(self.energy - self.captured[-1], 0.0) if self.captured else self.energy

    @property
    def is_reached(self) -> bool:
        if len(self.captured) < 3:
            return False
        before, last = (self.captured[-2] - self.captured[-3], self.captured[-1] - self.captured[-2])
        ratio = min(max(last / before, 0.5), 0.9) if before > 0 else 0.5  # a first leap says nothing of the next steps
        missing = max(last, 0.0) * ratio / (1 - ratio)
        return missing <= 2 * TOLERANCE * self.left or last <= ROUNDING * self.energy


def _energy(matrix: torch.Tensor) -> float:
    """Squared Frobenius norm, summed in float64 a row block at a time."""
    return sum(float(rows.double().square().sum()) for rows in matrix.split(1024))


def _noise(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Random directions, the same in every run."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(like)


# ---------------------------------------------------------------------------------------------- rules


def chosen_rank(values: torch.Tensor, method: str | None, param: float, cap: int, *, exactly: bool = False) -> int:
    """The rank that a rule of resizing keeps, at most `cap`, of descending singular values that are all there are.

    None: `cap`. "sv_ratio": values above S_0 / param. "sv_cumulative": until their sum reaches `param` of all.
    "sv_fro": until sqrt(sum S^2) reaches `param` of all. The trade keeps one more than the rule says, except with
    `exactly`, and never fewer than two.
    """
    count = len(values)
    if float(values[0]) <= NOTHING:
        return 1
    if method is None:
        return min(cap, count)
    if method == "sv_ratio":
        index = int((values > values[0] / param).sum())
    else:
        sizes, share = (values.square(), param**2) if method == "sv_fro" else (values, param)
        shares = sizes.cumsum(0) / sizes.sum()
        index = int(torch.searchsorted(shares, torch.tensor(share, dtype=shares.dtype))) + 1
    rank = min(max(index, 1), count) if exactly else min(max(index, 1), count - 1) + 1
    return min(rank, cap, count)


# ---------------------------------------------------------------------------------------------- clamping


def clamped(down: torch.Tensor, up: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both limited to +-q, the `share` quantile of all their numbers (not of their sizes); with 1 as they are."""
    if share >= 1:
        return down, up
    limit = quantile(torch.cat([up.flatten(), down.flatten()]), share)
    return down.clamp(-limit, limit), up.clamp(-limit, limit)


def quantile(values: torch.Tensor, share: float) -> float:
    """The linearly interpolated quantile of any number of values; `torch.quantile` ends at 16 million."""
    place = share * (values.numel() - 1)
    low, high = math.floor(place), math.ceil(place)
    numbers = np.partition(values.cpu().numpy(), (low, high))
    return float(numbers[low]) + (float(numbers[high]) - float(numbers[low])) * (place - low)
