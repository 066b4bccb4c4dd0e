"""train_network.py stopped, killed and resumed; split over workers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.targets.network import NetworkTarget
from library.train import loop
from library.train.resume import FileNames, RunState, find_state
from library.train.validation import Validation
from tests.runs import ENVIRONMENT, ROOT, equal_files, flags, logged, train_network
from tests.tiny_models import tiny_sd_checkpoint


def test_resume_in_mid_epoch_ends_in_the_same_weights(options, tmp_path):
    options |= {
        "max_train_steps": 9,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "network_dropout": 0.1,
    }
    options |= {"shuffle_caption": True, "flip_aug": True, "caption_dropout_rate": 0.3}
    assert train_network(**options, save_every_n_steps=2, save_state=True) == 0
    whole = tmp_path / "out" / "net.safetensors"
    for step in (2, 4):
        state = tmp_path / "out" / f"net-step{step:08d}-state"
        again = {**options, "output_dir": tmp_path / f"again{step}"}
        assert train_network(**again, resume=state) == 0
        assert equal_files(whole, tmp_path / f"again{step}" / "net.safetensors")


def test_a_state_holds_only_what_is_trained(options, tmp_path, tiny_sd1_path):
    assert train_network(**options, save_state=True) == 0
    state = tmp_path / "out" / "net-state"
    size = sum(path.stat().st_size for path in state.iterdir())
    trained = (tmp_path / "out" / "net.safetensors").stat().st_size
    assert size < 5 * trained, "weights and two moments, nothing of the frozen model"


def test_resume_with_other_settings_says_which(options, tmp_path, capfd):
    assert train_network(**options, save_state=True) == 0
    capfd.readouterr()
    state = tmp_path / "out" / "net-state"
    assert train_network(**{**options, "learning_rate": 5e-4, "network_dim": 2}, resume=state) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert "--learning_rate was 0.001 and is 0.0005" in message and "--network_dim was 4 and is 2" in message
    assert message.endswith("give the same settings, or start a new run from its model")
    assert train_network(**options, resume=state, unet_lr=1e-4) == 2
    assert "--unet_lr was not given and is 0.0001" in capfd.readouterr().err


def test_resume_with_other_captions_is_refused_but_a_moved_folder_is_not(options, tmp_path, images, capfd):
    options |= {"max_train_steps": 2, "save_every_n_steps": 1, "save_state": True}
    assert train_network(**options) == 0
    shutil.copytree(images, tmp_path / "moved")
    again = {**options, "train_data_dir": tmp_path / "moved", "resume": tmp_path / "out" / "net-step00000001-state"}
    assert train_network(**{**again, "output_dir": tmp_path / "again"}) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")
    sorted((tmp_path / "moved" / "2_disc").glob("*.txt"))[0].write_text("another caption")
    capfd.readouterr()
    assert train_network(**again) == 2
    assert ": the captions changed;" in capfd.readouterr().err.splitlines()[-1]


def test_resume_with_another_model_under_the_same_name_is_refused(options, tmp_path, tiny_sd1_path, capfd):
    model = tmp_path / "model.safetensors"
    shutil.copy(tiny_sd1_path, model)
    options |= {"pretrained_model_name_or_path": model, "save_state": True, "max_train_steps": 1}
    assert train_network(**options) == 0
    tiny_sd_checkpoint(model, seed=5)
    assert train_network(**{**options, "max_train_steps": 2}, resume=tmp_path / "out" / "net-state") == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert "base model was" in message and "give the base model that it began with" in message
    assert "training data" not in message


def test_resume_with_a_changed_dataset_file_is_refused(options, tmp_path, images, capfd):
    file = tmp_path / "data.toml"
    content = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{(images / "2_disc").as_posix()}"\n'
    file.write_text(content)
    options |= {"train_data_dir": None, "dataset_config": file, "save_state": True, "max_train_steps": 1}
    assert train_network(**options) == 0
    file.write_text(content + "shuffle_caption = true\n")
    assert train_network(**{**options, "max_train_steps": 2}, resume=tmp_path / "out" / "net-state") == 2
    assert ": the options of the data changed;" in capfd.readouterr().err.splitlines()[-1]


def test_what_an_earlier_run_of_the_name_left_is_said(options, tmp_path, capfd):
    assert train_network(**options, save_state=True, save_every_n_steps=2) == 0
    assert "earlier run" not in capfd.readouterr().err
    assert train_network(**options, plan=True) == 0
    messages = capfd.readouterr().err
    assert "net.safetensors is there already" in messages
    assert "states of an earlier run (net-state and 1 more)" in messages and "--resume latest" in messages
    assert train_network(**options, resume="latest") == 0
    assert "earlier run" not in capfd.readouterr().err


def test_resume_beyond_the_end(options, tmp_path, capfd):
    assert train_network(**options, save_state=True) == 0
    state = tmp_path / "out" / "net-state"
    assert train_network(**{**options, "max_train_steps": 2}, resume=state) == 2
    assert "step 3" in capfd.readouterr().err.splitlines()[-1]
    assert train_network(**options, resume=state) == 0
    capfd.readouterr()
    before = (state.parent / "net.safetensors").stat().st_mtime_ns
    assert train_network(**options, resume="latest") == 0
    messages = capfd.readouterr().err
    assert "nothing left to do" in messages and "saving" not in messages
    assert (state.parent / "net.safetensors").stat().st_mtime_ns == before
    (state.parent / "net.safetensors").unlink()
    assert train_network(**options, resume="latest") == 0
    assert (state.parent / "net.safetensors").is_file(), "it was lost, so it is written again"


@pytest.mark.parametrize("name", ["optimizer.pt", "trained.safetensors", "train_state.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"nonsense"])
def test_a_damaged_state_is_one_sentence(options, tmp_path, name, content, capfd):
    assert train_network(**{**options, "max_train_steps": 1}, save_state=True) == 0
    (tmp_path / "out" / "net-state" / name).write_bytes(content)
    assert train_network(**options, resume=tmp_path / "out" / "net-state") == 2
    assert "--resume" in capfd.readouterr().err.splitlines()[-1]


def test_latest_is_the_newest_also_where_it_was_cut_off_while_put_in_place(tmp_path):
    names = FileNames(tmp_path, "net", ".safetensors")
    states = {"net-state": 9, "net-step00000002-state": 2, ".net-step00000006-state.partial": 6}
    for age, (name, step) in enumerate(states.items()):
        (tmp_path / name).mkdir()
        state = RunState(step=step, epoch=1, settings={}, data={}, recent_losses=[], skipped_steps=0)
        file = tmp_path / name / "train_state.json"
        file.write_text(json.dumps({"format": 1, **vars(state)}))
        os.utime(file, (1_000_000 + age, 1_000_000 + age))
    assert find_state("latest", names) == tmp_path / "net-step00000006-state"
    assert not list(tmp_path.glob(".*"))


def test_resume_latest(options, tmp_path, capfd):
    options |= {"save_every_n_steps": 2, "save_state": True, "max_train_steps": 5, "resume": "latest"}
    assert train_network(**options) == 0
    assert "there is no state of this run yet" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out" / "net-state")
    first = (tmp_path / "out" / "net.safetensors").read_bytes()
    assert train_network(**options) == 0
    assert "going on after step 4" in capfd.readouterr().err
    del first
    assert train_network(**{**options, "output_dir": tmp_path / "b", "resume": None}) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "b" / "net.safetensors")


def test_kill_at_random_steps_and_resume_ends_in_the_same_weights(options, tmp_path):
    """Three times SIGKILL while it runs, each time resumed from the newest complete state: bit for bit the same."""
    options |= {"max_train_steps": 24, "save_every_n_steps": 3, "save_state": True, "lr_scheduler": "linear"}
    assert train_network(**options) == 0
    whole = tmp_path / "out" / "net.safetensors"
    options |= {"output_dir": tmp_path / "killed", "resume": "latest"}
    draw = random.Random(3)
    for _ in range(3):
        target = f"net-step{3 * draw.randrange(1, 3) + _progress(tmp_path / 'killed'):08d}-state"
        process = subprocess.Popen(
            [sys.executable, ROOT / "train_network.py", *flags(**options)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        _wait_for(tmp_path / "killed" / target, process)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "net.safetensors").exists(), "killed too late to show anything"
    assert train_network(**options) == 0
    assert equal_files(whole, tmp_path / "killed" / "net.safetensors")


def _progress(folder: Path) -> int:
    steps = [int(path.name.split("step")[1][:8]) for path in folder.glob("net-step*-state")]
    return max(steps, default=0)


def _wait_for(path: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None, f"{path.name} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(options, tmp_path, number, code):
    options |= {"max_train_steps": 5000, "max_data_loader_n_workers": 1}
    command = [sys.executable, ROOT / "train_network.py", *flags(**options, save_every_n_steps=2)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "out" / "net-step00000002.safetensors", process)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code
    (state,) = (tmp_path / "out").glob("net-step*-state")
    assert f'--resume "{state}"' in messages and "Traceback" not in messages
    step = int(state.name.split("step")[1][:8])
    assert (tmp_path / "out" / f"net-step{step:08d}.safetensors").exists()
    assert train_network(**{**options, "max_train_steps": step + 1}, resume=state) == 0


def test_a_signal_while_the_final_file_is_written_is_heard_after_it(options, tmp_path, monkeypatch):
    save = NetworkTarget.save

    def interrupted_save(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(NetworkTarget, "save", interrupted_save)
    assert train_network(**options) == 0
    assert (tmp_path / "out" / "net.safetensors").exists()


def test_an_error_on_the_way_saves_the_work(options, tmp_path, monkeypatch, capfd):
    options |= {"max_train_steps": 6}
    assert train_network(**options) == 0
    update = loop.update

    def failing_update(run, batches, step):
        if step == 4:
            raise RuntimeError("a loader died")
        return update(run, batches, step)

    again = {**options, "output_dir": tmp_path / "again"}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", failing_update)
        assert train_network(**again) == 1
    messages = capfd.readouterr().err
    state = tmp_path / "again" / "net-step00000004-state"
    assert f'--resume "{state}"' in messages and "a loader died" in messages.splitlines()[-1]
    assert train_network(**again, resume=state) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")


def test_an_error_in_the_last_validation_does_not_lose_the_model(options, tmp_path, monkeypatch, capfd):
    options |= {"max_train_steps": 2}
    assert train_network(**options, validation_split=0.34) == 0

    def failing_measurement(self, step):
        raise RuntimeError("out of something")

    again = {**options, "output_dir": tmp_path / "again"}
    monkeypatch.setattr(Validation, "at_end", failing_measurement)
    assert train_network(**again, validation_split=0.34) == 1
    assert "out of something" in capfd.readouterr().err.splitlines()[-1]
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")


def test_fused_updates_follow_the_schedule_of_a_resumed_run(options, tmp_path):
    options |= {"max_train_steps": 5, "fused_backward_pass": True, "lr_scheduler": "linear", "lr_warmup_steps": 3}
    assert train_network(**options, save_every_n_steps=2, save_state=True) == 0
    again = {**options, "output_dir": tmp_path / "again", "resume": tmp_path / "out" / "net-step00000002-state"}
    assert train_network(**again) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler": "cosine"},
        {"lr_scheduler_type": "CosineAnnealingLR"},
        {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=1e-3"]},
    ],
)
def test_a_longer_run_has_the_schedule_of_its_own_length(options, tmp_path, schedule, capfd):
    assert train_network(**{**options, **schedule, "max_train_steps": 2, "save_state": True}) == 0
    longer = {**options, **schedule, "max_train_steps": 4}
    capfd.readouterr()
    again = {"output_dir": tmp_path / "again", "logging_dir": tmp_path / "again_log"}
    assert train_network(**{**longer, **again}, resume=tmp_path / "out" / "net-state") == 0
    assert "was planned for 2 steps and now has 4" in capfd.readouterr().err
    assert train_network(**{**longer, "output_dir": tmp_path / "straight"}, logging_dir=tmp_path / "log") == 0
    assert logged(tmp_path / "again_log", "lr/unet") == logged(tmp_path / "log", "lr/unet")[2:]


@pytest.mark.parametrize("when", ["at the end", "after Ctrl-C"])
def test_an_output_folder_that_is_gone_loses_nothing(options, tmp_path, monkeypatch, when):
    update, out, refuges = loop.update, tmp_path / "out", tmp_path / "refuges"
    refuges.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(refuges))

    def update_then_lose_the_folder(run, batches, step):
        record = update(run, batches, step)
        if step == 1:
            shutil.rmtree(out)
            out.write_text("a file where the folder was")
            if when == "after Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
        return record

    monkeypatch.setattr(loop, "update", update_then_lose_the_folder)
    assert train_network(**options) == (2 if when == "at the end" else 130)
    (saved,) = refuges.glob("training-*/*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


@pytest.mark.parametrize(
    "files",
    [
        {"train_state.json": '{"current_epoch": 2, "current_step": 10}', "optimizer.bin": "x"},
        {"optimizer.bin": "x", "scheduler.bin": "x", "random_states_0.pkl": "x"},
    ],
)
def test_a_state_of_another_program_is_named_as_such(options, tmp_path, files, capfd):
    folder = tmp_path / "out" / "net-state"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    assert train_network(**options, resume=folder) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"--resume: {folder} was written by another program; start from its weights with --network_weights" in last


# ---------------------------------------------------------------------------------------------- equalities


def test_any_number_of_workers_gives_the_same_weights(options, tmp_path):
    options |= {"max_train_steps": 5, "flip_aug": True, "shuffle_caption": True, "random_crop": True}
    files = []
    for workers in (0, 1, 4):
        folder = tmp_path / str(workers)
        assert train_network(**{**options, "output_dir": folder, "max_data_loader_n_workers": workers}) == 0
        files.append(folder / "net.safetensors")
    assert equal_files(files[0], files[1]) and equal_files(files[0], files[2])


def test_a_state_older_than_an_option_had_its_default(options, tmp_path):
    assert train_network(**options, save_state=True) == 0
    state = tmp_path / "out" / "net-state"
    content = json.loads((state / "train_state.json").read_text())
    del content["settings"]["loss_type"], content["settings"]["noise_offset"]
    (state / "train_state.json").write_text(json.dumps(content))
    longer = {**options, "max_train_steps": 4, "resume": state}
    assert train_network(**longer) == 0
    assert train_network(**longer, loss_type="l1") == 2
