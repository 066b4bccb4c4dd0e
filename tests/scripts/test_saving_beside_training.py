"""Whole models written in a thread while training goes on: the same files and the same training as without it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from library.checkpoints.safetensors_io import NonFiniteError
from library.options import OptionError
from library.targets.full import FullTarget
from library.train.run import Run
from tests.runs import equal_files, run_script

LONG = 20.0  # seconds; nothing waits that long unless it is stuck
NUMBERED = [f"net-step{step:08d}.safetensors" for step in (1, 2)]


def train_db(**options) -> int:
    import train_db as entry

    return run_script(entry, options)


@pytest.fixture
def full_options(options):
    """A short run of full weights that saves after every update."""
    network = ("network_module", "network_dim")
    return {name: value for name, value in options.items() if name not in network} | {
        "save_every_n_steps": 1, "use_safetensors": True, "learning_rate": 1e-4,
    }  # fmt: skip


@pytest.fixture
def in_its_thread(monkeypatch) -> list[Path]:
    """Numbered files are saved beside training, each while the next forward pass is under way; which ones were."""
    begun, forward = [], threading.Event()
    save, before_forward = FullTarget.save, FullTarget.before_forward

    def save_slowly(self, path, **kwargs) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.append(path)
            forward.clear()
            assert forward.wait(LONG), "nothing goes on beside it"
        save(self, path, **kwargs)

    def note(self, batch) -> None:
        forward.set()
        before_forward(self, batch)

    monkeypatch.setattr(FullTarget, "saves_beside_training", True)
    monkeypatch.setattr(FullTarget, "save", save_slowly)
    monkeypatch.setattr(FullTarget, "before_forward", note)
    return begun


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"fused_backward_pass": True, "optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=False"],
         "max_grad_norm": 0},
        {"gradient_accumulation_steps": 2, "mixed_precision": "bf16", "full_bf16": True, "save_precision": "fp16"},
    ],
    ids=["plain", "fused", "accumulated, in bfloat16"],
)  # fmt: skip
def test_the_same_files_and_the_same_training(full_options, tmp_path, monkeypatch, request, extra):
    monkeypatch.setattr(FullTarget, "saves_beside_training", False)
    assert train_db(**full_options, **extra) == 0
    begun = request.getfixturevalue("in_its_thread")
    assert train_db(**{**full_options, **extra, "output_dir": tmp_path / "beside"}) == 0
    assert [path.name for path in begun] == NUMBERED
    for name in [*NUMBERED, "net.safetensors"]:
        assert equal_files(tmp_path / "out" / name, tmp_path / "beside" / name), name


def test_callbacks_hear_of_complete_files_in_their_order(full_options, tmp_path, monkeypatch, in_its_thread):
    heard, tell = [], Run.tell_saved

    def note(self, path) -> None:
        assert threading.current_thread() is threading.main_thread()
        heard.append((path.name, path.exists()))
        tell(self, path)

    monkeypatch.setattr(Run, "tell_saved", note)
    assert train_db(**full_options) == 0
    assert heard == [(name, True) for name in [*NUMBERED, "net.safetensors"]]


@pytest.mark.parametrize("error", [OptionError("", "the disk is full"), NonFiniteError("a weight is not finite")])
def test_a_file_that_fails_is_said_and_training_goes_on(full_options, tmp_path, monkeypatch, error, caplog):
    save = FullTarget.save

    def fail_first(self, path, **kwargs) -> None:
        if path.name == NUMBERED[0]:
            raise error
        save(self, path, **kwargs)

    monkeypatch.setattr(FullTarget, "saves_beside_training", True)
    monkeypatch.setattr(FullTarget, "save", fail_first)
    assert train_db(**full_options, save_last_n_steps=1) == 0
    assert f"{NUMBERED[0]} was not saved, training goes on: {error}" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["net-step00000002.safetensors",
                                                                                      "net.safetensors"]  # fmt: skip


def test_a_run_that_fails_waits_for_the_file(full_options, tmp_path, monkeypatch, in_its_thread):
    backward = torch.Tensor.backward

    def fail_in_second_step(*args, **kwargs) -> None:
        if in_its_thread:
            raise ZeroDivisionError("in the second step")
        backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", fail_in_second_step)
    assert train_db(**full_options) == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {NUMBERED[0], "net-step00000001-state"} <= names and not any(name.endswith(".tmp") for name in names)
    assert not any(thread.name == "saving" for thread in threading.enumerate())


def test_averages_are_put_in_place_of_the_weights_so_training_waits(full_options, tmp_path, in_its_thread):
    assert train_db(**full_options, ema_decay=0.9) == 0
    assert in_its_thread == []
    assert (tmp_path / "out" / "net-step00000001-ema.safetensors").exists()
