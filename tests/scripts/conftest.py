"""Fixtures of the tests that run whole scripts."""

from __future__ import annotations

import pytest

from tests.runs import train_network
from tests.tiny_data import tiny_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tiny_images(folder / "2_disc", 6)
    return folder


def short_run(folder, images, model):
    """A short run; tests change what they are about."""
    return {
        "pretrained_model_name_or_path": model, "train_data_dir": images, "output_dir": folder / "out",
        "output_name": "net", "network_module": "networks.lora", "network_dim": 4, "resolution": 64,
        "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128, "train_batch_size": 2,
        "max_train_steps": 3, "learning_rate": 1e-3, "seed": 1, "max_data_loader_n_workers": 0,
    }  # fmt: skip


@pytest.fixture
def options(tmp_path, images, tiny_sd1_path):
    return short_run(tmp_path, images, tiny_sd1_path)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory, images, tiny_sd1_path):
    folder = tmp_path_factory.mktemp("plain")
    assert train_network(**short_run(folder, images, tiny_sd1_path)) == 0
    return folder / "out" / "net.safetensors"
