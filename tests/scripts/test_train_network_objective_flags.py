"""Flags of noise and loss beside each other change the losses of a run, and the file says how it was trained."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.runs import logged, metadata_of, train_network
from tests.scripts.conftest import short_run

VELOCITY = {"v_parameterization": True}
OFFSET = {"noise_offset": 0.3}
PYRAMID = {"multires_noise_iterations": 4}
PERTURBATION = {"ip_noise_gamma": 0.3}
HUBER = {"loss_type": "huber"}


class Flag(NamedTuple):
    """A flag's value, and what it is added to."""

    value: object
    beside: dict[str, object] = {}


# each flag alone is in tests/flag_rows.py
FLAGS = {
    "adaptive_noise_scale": [Flag(0.5, OFFSET | PYRAMID)],
    "multires_noise_iterations": [Flag(2, PYRAMID), Flag(4, OFFSET)],
    "ip_noise_gamma": [Flag(0.1, PERTURBATION)],
    "min_snr_gamma": [Flag(1.0, VELOCITY)],
    "debiased_estimation_loss": [Flag(True, VELOCITY), Flag(True, {"min_snr_gamma": 1.0})],
    "loss_type": [Flag("smooth_l1", HUBER)],
    "huber_schedule": [Flag("exponential", HUBER)],
    "huber_scale": [Flag(0.5, HUBER | {"huber_schedule": "constant"})],
}
DEFAULT_METADATA = {
    "noise_offset": "None", "noise_offset_random_strength": "False", "adaptive_noise_scale": "None",
    "multires_noise_iterations": "None", "multires_noise_discount": "0.3", "ip_noise_gamma": "None",
    "ip_noise_gamma_random_strength": "False", "zero_terminal_snr": "False", "min_snr_gamma": "None",
    "debiased_estimation": "False", "loss_type": "l2", "huber_schedule": "snr", "huber_c": "0.1", "huber_scale": "1.0",
}  # fmt: skip
CASES = [(name, flag) for name, flags in FLAGS.items() for flag in flags]


@pytest.fixture(scope="module")
def run_with(tmp_path_factory, images, tiny_sd1_path):
    """Settings -> the folder of a run of two steps with them; each run is made once."""

    @functools.cache
    def run(settings: tuple[tuple[str, object], ...]) -> Path:
        folder = tmp_path_factory.mktemp("run")
        short = short_run(folder, images, tiny_sd1_path) | {"max_train_steps": 2, "network_train_unet_only": True}
        assert train_network(**short, **dict(settings), logging_dir=folder / "log") == 0
        return folder

    return lambda settings: run(tuple(sorted(settings.items())))


def losses_of(folder: Path) -> list[float]:
    return logged(folder / "log", "loss/current")


@pytest.mark.parametrize(
    ("name", "flag"), CASES, ids=[f"{name}-{flag.value}-{len(flag.beside)}" for name, flag in CASES]
)
def test_each_flag_changes_the_losses(run_with, name, flag):
    without, with_flag = losses_of(run_with(flag.beside)), losses_of(run_with(flag.beside | {name: flag.value}))
    assert len(with_flag) == 2 and all(map(math.isfinite, with_flag))
    assert abs(with_flag[0] - without[0]) > 1e-4 * without[0], "in the very first step"


def test_the_file_says_how_it_was_trained(run_with):
    plain = metadata_of(run_with({}) / "out" / "net.safetensors")
    assert {name: plain[f"ss_{name}"] for name in DEFAULT_METADATA} == DEFAULT_METADATA
    settings = {
        "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.2,
        "multires_noise_iterations": 4, "multires_noise_discount": 0.5, "ip_noise_gamma": 0.1,
        "ip_noise_gamma_random_strength": True, "loss_type": "smooth_l1", "huber_schedule": "exponential",
        "huber_c": 0.2, "huber_scale": 2.0, "zero_terminal_snr": True, "v_parameterization": True,
    }  # fmt: skip
    folder = run_with(settings | {"debiased_estimation_loss": True, "min_snr_gamma": 5.0})
    found = metadata_of(folder / "out" / "net.safetensors")
    del settings["v_parameterization"]
    expected = {name: str(value) for name, value in settings.items()}
    expected |= {"debiased_estimation": "True", "min_snr_gamma": "5.0"}
    assert {name: found[f"ss_{name}"] for name in expected} == expected
    assert all(map(math.isfinite, losses_of(folder)))
