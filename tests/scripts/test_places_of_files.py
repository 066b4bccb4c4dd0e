"""What lies where a run would write: nothing of the user's is replaced, and that is said before training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runs import train_network
from tests.scripts.test_full_weights import run, start

__all__ = ["start"]  # a fixture


def refused(capfd, code: int) -> str:
    assert code == 2
    captured = capfd.readouterr().err
    assert "steps:" not in captured, "before training"
    return captured.strip().splitlines()[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("settings", [{}, {"save_state": True}])
def test_the_training_pictures_in_the_place_of_the_result(start, images, tmp_path, capfd, settings):
    folder = tmp_path / "out" / ("net-state" if settings else "net")
    shutil.copytree(images, folder)
    before = contents(folder)
    form = {} if settings else {"save_model_as": "diffusers"}
    options = start("train_db") | form | settings
    message = refused(capfd, run("train_db", **options | {"train_data_dir": folder}))
    assert f"--output_name: {folder} is the training data itself" in message or "holds the training data" in message
    message = refused(capfd, run("train_db", **options))
    assert "is not from an earlier run (it holds 2_disc" in message and "choose another --output_name" in message
    assert contents(folder) == before


def test_a_folder_of_an_earlier_run_is_replaced(start, tmp_path, capfd):
    options = start("train_db") | {"save_model_as": "diffusers_safetensors", "max_train_steps": 1}
    options |= {"save_state": True, "save_every_n_steps": 1}
    assert run("train_db", **options) == 0
    assert run("train_db", **options) == 0
    assert "out/net is there already, from an earlier run: it will be replaced" in capfd.readouterr().err
    base = {"pretrained_model_name_or_path": tmp_path / "out" / "net"}
    message = refused(capfd, run("train_db", **options | base))
    assert "net is the base model itself, which a save would replace" in message


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("net.safetensors", {}),
        ("net-step00000007.safetensors", {}),
        ("net-000002.safetensors", {"save_every_n_epochs": 1}),
        ("net-000002-ema.safetensors", {"save_every_n_epochs": 1, "ema_decay": 0.9}),
    ],
)
def test_the_base_model_in_the_place_of_the_result(start, tmp_path, tiny_sd1_path, capfd, name, settings):
    base = tmp_path / "out" / name
    base.parent.mkdir()
    shutil.copy(tiny_sd1_path, base)
    message = refused(capfd, run("train_db", **start("train_db") | settings | {"pretrained_model_name_or_path": base}))
    assert f"{name} is the base model itself, which a save would replace; choose another --output_name" in message


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder(options, start, tmp_path, capfd):
    (tmp_path / "out" / "net.safetensors").mkdir(parents=True)
    message = refused(capfd, train_network(**options))
    assert "net.safetensors is a folder, and the model is to be a file of that name" in message
    (tmp_path / "out" / "net").write_text("mine")
    message = refused(capfd, run("train_db", **start("train_db") | {"save_model_as": "diffusers"}))
    assert "is not from an earlier run (it is a file)" in message


def test_names_that_the_run_does_not_use_are_free(options, images, tmp_path):
    for name in ("net", "net-000001.safetensors", "net-2.safetensors", "net-state", "other"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "mine.txt").write_text("mine")
    assert train_network(**options | {"max_train_steps": 1}) == 0
