"""Low-rank algebra against dense singular value decompositions in float64."""

import json
import math
from pathlib import Path

import pytest
import torch

from networks.weights.svd import chosen_rank, clamped, full_svd, matrix_svd, product_svd, quantile, sum_svd

RANKS = json.loads((Path(__file__).parents[1] / "data" / "resize_ranks.json").read_text(encoding="utf-8"))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(matrix, rank):
    """The best approximation of a rank, and its error."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank], float(s[rank:].square().sum().sqrt())


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (12, 60), (60, 12), (8, 8)])
def test_product_is_decomposed_exactly(shape):
    down, up = random(10, shape[1]), random(shape[0], 10, seed=1)
    product = up.double() @ down.double()
    svd = product_svd(down, up)
    exact = torch.linalg.svdvals(product)
    count = min(10, *shape)
    torch.testing.assert_close(svd.values_K[:count], exact[:count], rtol=1e-5, atol=1e-5)
    assert math.isclose(svd.energy, float(product.square().sum()), rel_tol=1e-5)
    for rank in (1, 4, count):
        found_down, found_up = svd.factors(rank)
        expected, _ = best(product, rank)
        torch.testing.assert_close(found_up.double() @ found_down.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_down @ found_down.T, torch.eye(rank), rtol=0, atol=1e-5)
        torch.testing.assert_close(found_up.norm(dim=0).double(), exact[:rank], rtol=1e-5, atol=1e-5)


def test_only_the_kept_directions_are_made():
    down, up = random(10, 50), random(40, 10, seed=1)
    all_of_them, few = product_svd(down, up), product_svd(down, up, keep=3)
    assert len(few.values_K) == 10 and few.directions_KI.shape == (3, 50)
    for one, other in zip(all_of_them.factors(3), few.factors(3), strict=True):
        torch.testing.assert_close(one, other)


def test_more_directions_than_there_are_change_nothing_and_can_be_trained():
    down, up = random(3, 20), random(30, 3, seed=1)
    found_down, found_up = product_svd(down, up).factors(8)
    assert found_down.shape == (8, 20) and found_up.shape == (30, 8)
    torch.testing.assert_close(found_up @ found_down, up @ down, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_down @ found_down.T, torch.eye(8), rtol=0, atol=1e-5)
    assert not found_up[:, 3:].any()


def test_sum_of_products():
    downs, ups = [random(4, 30), random(6, 30, seed=1)], [random(25, 4, seed=2), random(25, 6, seed=3)]
    down, up = sum_svd(downs, ups).factors(5)
    total = sum(b.double() @ a.double() for a, b in zip(downs, ups, strict=True))
    torch.testing.assert_close(up.double() @ down.double(), best(total, 5)[0], rtol=1e-4, atol=1e-4)


def flat(rows, columns):
    return random(rows, columns)


def falling(rows, columns):
    count = min(rows, columns)
    left, right = torch.linalg.qr(random(rows, count))[0], torch.linalg.qr(random(columns, count, seed=1))[0]
    return (left * torch.arange(1, count + 1) ** -0.7) @ right.T


def low_rank_and_noise(rows, columns):
    return random(rows, 6) @ random(6, columns, seed=1) + 1e-3 * random(rows, columns, seed=2)


def one_direction(rows, columns):
    return random(rows, 1) @ random(1, columns, seed=1)


@pytest.mark.parametrize("make", [flat, falling, low_rank_and_noise])
@pytest.mark.parametrize("shape", [(400, 400), (900, 300), (200, 700), (40, 30)])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_error_of_a_matrix_is_the_smallest_one_of_the_rank(make, shape, method):
    matrix, rank = make(*shape), 16
    svd = matrix_svd(matrix, rank, method)
    down, up = svd.factors(rank)
    error = float(torch.addmm(matrix.double(), up.double(), down.double(), alpha=-1).norm())
    smallest = best(matrix, rank)[1]
    assert smallest * 0.999999 <= error <= smallest * (1.002 if method == "exact" else 1.02)
    assert math.isclose(svd.energy, float(matrix.double().square().sum()), rel_tol=1e-6)
    left = svd.energy - float(svd.values_K[:rank].square().sum())
    rounding = 1e-12 if method == "exact" else 1e-6  # of the whole
    assert math.isclose(left, error**2, rel_tol=2e-2, abs_tol=rounding * svd.energy)
    torch.testing.assert_close(down @ down.T, torch.eye(rank), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(400, 400), (300, 900), (50, 20)])
def test_matrix_of_fewer_directions_than_asked_for(shape):
    matrix = one_direction(*shape)
    down, up = matrix_svd(matrix, 8).factors(8)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-4)


def test_results_are_the_same_in_every_run():
    first, second = (matrix_svd(flat(400, 400), 8).factors(8) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("case", RANKS["cases"], ids=lambda case: f"{case['method']} {case['param']}")
def test_ranks_that_the_rules_keep(case):
    values = torch.tensor(RANKS["values"], dtype=torch.float64)
    assert chosen_rank(values, case["method"], case["param"], RANKS["cap"]) == case["rank"]
    assert chosen_rank(values, case["method"], case["param"], RANKS["cap"], exactly=True) == case["exact_rank"]
    assert chosen_rank(values, case["method"], case["param"], 2) == min(case["rank"], 2)


def test_ranks_at_the_edges():
    values = torch.tensor(RANKS["values"], dtype=torch.float64)
    assert chosen_rank(values, None, 0.0, 4) == 4
    assert chosen_rank(values, None, 0.0, 16) == 6  # no more than there are
    assert chosen_rank(values * 1e-7, None, 0.0, 4) == 1  # nothing is worth one
    assert chosen_rank(values, "sv_cumulative", 1.0, 16) == 6
    assert chosen_rank(values[:1], "sv_fro", 0.5, 16) == 1


# ---------------------------------------------------------------------------------------------- clamping


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_quantile_is_torchs(share):
    values = random(1003)
    assert math.isclose(quantile(values, share), float(torch.quantile(values, share)), rel_tol=1e-5, abs_tol=1e-7)


def test_quantile_of_more_values_than_torch_takes():
    values = torch.arange(17_000_000, dtype=torch.float32).flip(0)
    with pytest.raises(RuntimeError):
        torch.quantile(values, 0.99)
    assert math.isclose(quantile(values, 0.99), 0.99 * (17_000_000 - 1), rel_tol=1e-6)


def test_clamping_goes_by_the_values_not_their_sizes():
    down, up = full_svd(random(20, 30)).factors(10)
    limit = float(torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.95))
    found_down, found_up = clamped(down, up, 0.95)
    torch.testing.assert_close(found_down, down.clamp(-limit, limit))
    torch.testing.assert_close(found_up, up.clamp(-limit, limit))
    assert clamped(down, up, 1.0)[0] is down
