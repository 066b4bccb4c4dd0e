"""Relative errors of low-rank results against dense products."""

import pytest
import torch

from networks.weights.fidelity import FidelityReport, low_rank_error, percent


def factors(rank, generator, shape=(20, 12, 3, 3)):
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], rank, 1, 1, generator=generator)


def dense(pairs):
    return sum(up.double().flatten(1) @ down.double().flatten(1) for down, up in pairs)


def test_as_dense_products():
    generator = torch.Generator().manual_seed(0)
    exact = [factors(3, generator), factors(5, generator)]
    stored = [factors(4, generator)]
    exact_sq, error_sq = low_rank_error(exact, stored)
    assert exact_sq == pytest.approx(float(dense(exact).square().sum()))
    assert error_sq == pytest.approx(float((dense(stored) - dense(exact)).square().sum()))


def test_small_errors_are_seen():
    down, up = factors(4, torch.Generator().manual_seed(0))
    exact_sq, error_sq = low_rank_error([(down, up)], [(down.half(), up.half())])
    reference = (dense([(down.half(), up.half())]) - dense([(down, up)])).norm() / dense([(down, up)]).norm()
    assert (error_sq / exact_sq) ** 0.5 == pytest.approx(float(reference), rel=1e-3)
    assert 1e-5 < reference < 1e-3
    exact_sq, error_sq = low_rank_error([(down, up)], [(down, up)])
    assert (error_sq / exact_sq) ** 0.5 < 1e-7


def test_table():
    report = FidelityReport()
    report.add("lora_unet_up_blocks_3_attentions_2_proj_out", 4.0, 1.0)
    report.add("lora_unet_down_blocks_0_attentions_0_proj_in", 16.0, 0.0)
    report.add("lora_unet_down_blocks_0_attentions_0_proj_out", 9.0, 0.0)
    report.add("lora_te_text_model_encoder_layers_0_mlp_fc1", 0.0, 0.0)
    assert [(block, kept.modules) for block, kept in report.rows()] == [
        ("TE", 1), ("IN01", 2), ("OUT11", 1), ("total", 4)
    ]  # fmt: skip
    assert report.total.error == pytest.approx((1 / 29) ** 0.5)
    assert report.worst == ("lora_unet_up_blocks_3_attentions_2_proj_out", 0.5)
    assert report.table().splitlines()[2] == "IN01         2      5           0 %"
    assert report.table().splitlines()[-1] == "total        4  5.385        18.6 %"
    assert report.blocks["TE"].error == 0
    report.add("lora_te_text_model_encoder_layers_0_mlp_fc2", 1e-20, 1e-20, is_empty=True)
    assert report.worst[1] == 0.5


@pytest.mark.parametrize(
    ("error", "text"), [(0.0, "0 %"), (3e-8, "< 0.01 %"), (9.9e-5, "< 0.01 %"), (1.234e-3, "0.123 %")]
)
def test_what_rounding_makes_has_no_digits(error, text):
    assert percent(error) == text
