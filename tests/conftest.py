"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
settings.load_profile("any machine")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing under test may look for a network

FULL_SIZE = "FULL_SIZE"  # environment variable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes minutes and many gigabytes, unless it is asked for."""
    if os.environ.get(FULL_SIZE) == "1":
        return
    for item in items:
        if item.get_closest_marker("full_size"):
            item.add_marker(pytest.mark.skip(reason=f"takes minutes and up to 14 GB; set {FULL_SIZE}=1"))


@pytest.fixture(scope="session")
def tiny_sd1_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint; don't write to it."""
    from tests.tiny_models import tiny_sd_checkpoint

    return tiny_sd_checkpoint(tmp_path_factory.mktemp("models") / "tiny_sd1.safetensors", "sd1")


@pytest.fixture(scope="session")
def tiny_sd2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 2.x checkpoint that predicts velocity; don't write to it."""
    from tests.tiny_models import tiny_sd_checkpoint

    return tiny_sd_checkpoint(tmp_path_factory.mktemp("models") / "tiny_sd2.safetensors", "sd2", v_prediction=True)


@pytest.fixture(scope="session")
def tiny_sdxl_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL checkpoint; don't write to it."""
    from tests.tiny_models import tiny_sdxl_checkpoint

    return tiny_sdxl_checkpoint(tmp_path_factory.mktemp("models") / "tiny_sdxl.safetensors")
