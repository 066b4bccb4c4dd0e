"""train_network.py with held-out images: what is measured, the best file, the early end, the average of the weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.data.validation_set import held_out
from library.train import validation
from tests.runs import equal_files, logged, metadata_of, train_network

HELD_OUT = {"validation_split": 0.34}  # 2 of 6 images


def test_what_is_logged(options, tmp_path, capfd):
    options |= {"max_train_steps": 5, "validate_every_n_steps": 2}
    assert train_network(**options, **HELD_OUT, logging_dir=tmp_path / "log") == 0
    losses, best = (logged(tmp_path / "log", name) for name in ("loss/validation", "loss/validation/best"))
    assert len(losses) == 4, "at the start, after steps 2 and 4, and at the end"
    assert best == [min(losses[1 : last + 1]) for last in (1, 2, 3)]
    relative = logged(tmp_path / "log", "loss/validation/relative")
    assert relative == pytest.approx([loss / losses[0] for loss in losses])
    assert len(logged(tmp_path / "log", "loss/validation/divergence")) == 3
    messages = capfd.readouterr().err
    assert "validation before the first step: loss" in messages and "validation after step 4: loss" in messages


def test_after_every_epoch_unless_told_otherwise(options, capfd):
    options |= {"max_train_steps": 9, "train_batch_size": 4}  # 4 images x 2: two steps an epoch
    assert train_network(**options, **HELD_OUT) == 0
    assert _measured_after(capfd) == [2, 4, 6, 8, 9]
    assert train_network(**options, **HELD_OUT, validate_every_n_epochs=3) == 0
    assert _measured_after(capfd) == [6, 9]


def _measured_after(capfd) -> list[int]:
    lines = [line for line in capfd.readouterr().err.splitlines() if "validation after step" in line]
    return [int(line.split("after step ")[1].split(":")[0]) for line in lines]


def test_the_number_depends_on_weights_and_validation_seed_alone(options, tmp_path):
    """The loss before the first step, in runs that train otherwise; with cached latents too, up to their one sample."""
    learned = tmp_path / "learned"
    assert train_network(**{**options, "output_dir": learned, "learning_rate": 0.05}) == 0
    options["network_weights"] = learned / "net.safetensors"

    def at_start(folder, **changes):
        settings = {**options, "max_train_steps": 1, "output_dir": tmp_path / folder, "logging_dir": tmp_path / folder}
        assert train_network(**{**settings, **HELD_OUT, "validation_seed": 3, **changes}) == 0
        return logged(tmp_path / folder, "loss/validation")[0]

    plain = at_start("plain")
    varied = {"color_aug": True, "flip_aug": True, "random_crop": True, "shuffle_caption": True}
    varied |= {"caption_dropout_rate": 0.9, "network_dropout": 0.5, "train_batch_size": 3, "seed": 8}
    assert at_start("varied", **varied) == pytest.approx(plain, rel=1e-5)
    assert at_start("other seed", validation_seed=4) != pytest.approx(plain, rel=1e-3)
    assert at_start("cached", cache_latents=True) == pytest.approx(plain, rel=0.2)
    assert at_start("few", max_validation_steps=1) != plain


@pytest.mark.parametrize(
    ("settings", "average"),
    [
        ({}, {"ema_decay": 0.9}),
        ({"cache_latents": True, "vae_batch_size": 3}, {"ema_decay": 0.9}),
        ({"optimizer_type": "AdamWScheduleFree"}, {}),  # measures other weights than it trains
    ],
)
def test_training_is_bit_equal_to_a_run_without_validation(options, tmp_path, images, settings, average):
    options |= {"network_dropout": 0.2, "gradient_checkpointing": True, **settings}
    assert train_network(**options, **HELD_OUT, **average, validate_every_n_steps=1) == 0
    rest = tmp_path / "rest"
    shutil.copytree(images, rest)
    for path in held_out([str(path) for path in rest.rglob("*.[pj]*g")], 0.34, options["seed"]):
        Path(path).unlink()
    again = {**options, "train_data_dir": rest, "output_dir": tmp_path / "again"}
    assert train_network(**again) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")


def test_metadata(options, tmp_path):
    assert train_network(**options, **HELD_OUT, validate_every_n_steps=2, max_validation_steps=3) == 0
    metadata = metadata_of(tmp_path / "out" / "net.safetensors")
    expected = {
        "ss_num_validation_images": "2", "ss_num_train_images": "8", "ss_validation_split": "0.34",
        "ss_validation_seed": "None", "ss_validate_every_n_steps": "2", "ss_validate_every_n_epochs": "None",
        "ss_max_validation_steps": "3",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected
    assert float(metadata["ss_validation_loss"]) > 0
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_disc": {"n_repeats": 2, "img_count": 4}}


# ---------------------------------------------------------------------------------------------- best file, early end


def test_the_best_file_is_that_of_the_lowest_loss(options, tmp_path):
    """At such a rate it gets better, and then worse."""
    options |= {"max_train_steps": 6, "learning_rate": 0.02, "cache_latents": True, "save_every_n_steps": 1}
    folder = tmp_path / "out"
    log = {"logging_dir": tmp_path / "log", "validate_every_n_steps": 1}
    assert train_network(**options, **HELD_OUT, **log, save_best=True, save_state=True) == 0
    losses = logged(tmp_path / "log", "loss/validation")[1:]
    best = losses.index(min(losses)) + 1
    assert equal_files(folder / "net-best.safetensors", _file_of(folder, best, 6))
    metadata = metadata_of(folder / "net-best.safetensors")
    assert metadata["ss_steps"] == str(best) and float(metadata["ss_validation_loss"]) == pytest.approx(min(losses))
    assert json.loads((folder / "net-best-state" / "train_state.json").read_text())["step"] == best


def _file_of(folder: Path, step: int, steps: int) -> Path:
    return folder / ("net.safetensors" if step == steps else f"net-step{step:08d}.safetensors")


def test_a_run_that_gets_no_better_ends_early(options, tmp_path, capfd):
    options |= {"max_train_steps": 40, "learning_rate": 0.3, "cache_latents": True, "max_validation_steps": 2}
    patience = {"early_stop_patience": 2, "validate_every_n_steps": 1}
    assert train_network(**options, **HELD_OUT, **patience, save_state_on_train_end=True) == 0
    messages = capfd.readouterr().err
    assert "2 validations without a loss below" in messages and "model saved." in messages
    assert "add --save_best" in messages
    steps = int(metadata_of(tmp_path / "out" / "net.safetensors")["ss_steps"])
    assert 3 <= steps < 40
    again = {**options, **HELD_OUT, "resume": tmp_path / "out" / "net-state"}
    assert train_network(**again, **patience) == 0, "it ends at once: nothing has got better"
    messages = capfd.readouterr().err
    assert f"ends after step {steps} of 40" in messages and "a larger --early_stop_patience" in messages
    assert "nothing left to do" in messages
    assert train_network(**{**again, "max_train_steps": steps + 1}, **{**patience, "early_stop_patience": 9}) == 0
    assert metadata_of(tmp_path / "out" / "net.safetensors")["ss_steps"] == str(steps + 1)


def test_a_measurement_that_is_broken_off_is_made_up_for(options, tmp_path, monkeypatch):
    options |= HELD_OUT | {"max_train_steps": 4, "validate_every_n_steps": 2, "save_best": True}
    loss_of, calls = validation.batch_loss, []

    def stopped_at_call(number):
        def measured(run, batch, **kwargs):
            calls.append(run.step)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return loss_of(run, batch, **kwargs)

        return measured

    monkeypatch.setattr(validation, "batch_loss", stopped_at_call(None))
    assert train_network(**options, logging_dir=tmp_path / "log") == 0
    at_start = calls.count(0)
    assert at_start > 1 and calls.count(2) == at_start
    calls.clear()
    monkeypatch.setattr(validation, "batch_loss", stopped_at_call(at_start + 1))
    options |= {"output_dir": tmp_path / "again"}
    assert train_network(**options) == 130
    assert len(calls) == at_start + 1, "the batch at which the signal came was the last one"
    monkeypatch.setattr(validation, "batch_loss", loss_of)
    assert train_network(**options, resume="latest", logging_dir=tmp_path / "again_log") == 0
    straight = logged(tmp_path / "log", "loss/validation")
    assert logged(tmp_path / "again_log", "loss/validation") == straight[1:]
    assert equal_files(tmp_path / "out" / "net-best.safetensors", tmp_path / "again" / "net-best.safetensors")


def test_losses_that_are_not_finite_are_no_convergence(options, tmp_path, capfd):
    options |= {"max_train_steps": 9, "learning_rate": 1e20, "max_validation_steps": 1, "validate_every_n_steps": 1}
    assert train_network(**options, **HELD_OUT, early_stop_patience=2, save_best=True) == 0
    messages = capfd.readouterr().err
    assert "validation after step 1: the loss is not finite (lower --learning_rate)" in messages
    assert "2 validations without a finite loss" in messages and "inf" not in messages.replace("info", "")
    assert "there is no -best file" not in messages, "the weights that were gone back to have a finite loss"
    assert metadata_of(tmp_path / "out" / "net-best.safetensors")["ss_steps"] == "0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_best": True}, "--save_best: needs a validation loss; hold images out with --validation_split"),
        ({"early_stop_patience": 2}, "--early_stop_patience: needs a validation loss"),
        ({"validation_split": 1.2}, "--validation_split: 1.2 is out of range"),
        ({"validation_split": 0.01}, "--validation_split: 0.01 of 6 images is none of them"),
        ({"validation_split": 1}, "--validation_split: 1 leaves no image to train on"),
        ({"validate_every_n_steps": -1, **HELD_OUT}, "--validate_every_n_steps: -1 is out of range"),
        ({"max_validation_steps": -1, **HELD_OUT}, "--max_validation_steps: -1 is out of range"),
        ({"ema_decay": 1.0}, "--ema_decay: 1.0 is out of range"),
        ({"ema_decay": 0.9, "optimizer_type": "AdamWScheduleFree"}, "--ema_decay: AdamWScheduleFree averages"),
        ({"initial_step": 3}, "--initial_step: 3 leaves nothing to train: the run has 3 steps"),
        ({"initial_step": -1}, "--initial_step: -1 is out of range"),
        ({"initial_epoch": -1}, "--initial_epoch: -1 is out of range"),
        ({"initial_epoch": 2}, "--initial_epoch: 2 leaves nothing to train"),
    ],
)
def test_mistakes(options, settings, message, capfd):
    assert train_network(**{**options, **settings}) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"validate_every_n_epochs": 2}, "--validate_every_n_epochs has no effect without --validation_split"),
        ({"validation_seed": 2}, "--validation_seed has no effect without --validation_split"),
        ({"skip_until_initial_step": True}, "--skip_until_initial_step has no effect: no --initial_step"),
        ({"initial_step": 2, "initial_epoch": 1}, "--initial_epoch has no effect beside --initial_step"),
        ({"save_state": True, "save_state_on_train_end": True}, "--save_state_on_train_end has no effect"),
    ],
)
def test_settings_without_effect_are_said(options, settings, note, capfd):
    assert train_network(**{**options, **settings}) == 0
    assert note in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- the average


def test_the_average_is_saved_beside_every_file_and_removed_with_it(options, tmp_path):
    options |= {"save_every_n_steps": 1, "max_train_steps": 4, "save_last_n_steps": 1}
    assert train_network(**options, ema_decay=0.5, lr_scheduler="constant") == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [
        "net-ema.safetensors", "net-step00000002-ema.safetensors", "net-step00000002.safetensors",
        "net-step00000003-ema.safetensors", "net-step00000003.safetensors", "net.safetensors",
    ]  # fmt: skip


def test_the_average_of_the_saved_weights_by_hand(options, tmp_path):
    assert train_network(**options, ema_decay=0.15, save_every_n_steps=1) == 0
    folder = tmp_path / "out"
    files = [load_file(_file_of(folder, step, 3)) for step in (1, 2, 3)]
    average = load_file(folder / "net-ema.safetensors")
    for name in (name for name in average if "lora_up" in name):  # these begin as zeros
        expected = torch.zeros_like(average[name])
        for n, weights in enumerate(files):
            decay = min(0.15, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * weights[name]
        assert torch.allclose(average[name], expected, atol=1e-7)


def test_the_average_is_what_validation_looks_at(options, tmp_path, capfd):
    """Its loss is what a run measures that begins with it; and it is the best file."""
    folder = tmp_path / "out"
    options |= {"learning_rate": 0.05, "cache_latents": True, "validate_every_n_steps": 3, **HELD_OUT}
    assert train_network(**options, ema_decay=0.1, save_best=True, logging_dir=tmp_path / "log") == 0
    again = {"output_dir": tmp_path / "again", "network_weights": folder / "net-ema.safetensors", "max_train_steps": 1}
    assert train_network(**{**options, **again}, logging_dir=tmp_path / "log again") == 0
    first, second = (logged(tmp_path / name, "loss/validation") for name in ("log", "log again"))
    assert second[0] == pytest.approx(first[-1], rel=1e-6) and second[0] != pytest.approx(first[0], rel=1e-3)
    assert equal_files(folder / "net-best.safetensors", folder / "net-ema.safetensors")
    assert not equal_files(folder / "net-best.safetensors", folder / "net.safetensors")
    assert "ss_validation_loss" in metadata_of(folder / "net-ema.safetensors")
    assert "ss_validation_loss" not in metadata_of(folder / "net.safetensors"), "these weights were not measured"
    titles = [metadata_of(folder / f"net{end}.safetensors")["modelspec.title"] for end in ("", "-ema", "-best")]
    assert titles == ["net", "net-ema", "net-best"]
    messages = capfd.readouterr().err
    assert f"saving {folder / 'net-ema.safetensors'}" in messages
    assert "every 3 steps" in messages and "previews, validation and the best file use it" in messages
