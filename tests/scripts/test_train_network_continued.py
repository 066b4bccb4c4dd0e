"""train_network.py with all that could remember something: resumed, longer, begun in the middle, on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import equal_files, in_two_processes, logged, metadata_of, train_network
from tests.tiny_data import tiny_images


@pytest.fixture
def everything(options, tmp_path):
    """A run with all that could remember something: two datasets, regularisation, previews, validation, EMA ..."""
    for name, count, seed in (("a", 5, 0), ("b", 4, 20), ("reg", 6, 40)):
        tiny_images(tmp_path / name, count, seed=seed)
    (tmp_path / "data.toml").write_text(
        f"""[general]
shuffle_caption = true
caption_dropout_rate = 0.3
caption_tag_dropout_rate = 0.2
color_aug = true
random_crop = true
flip_aug = true
validation_split = 0.3
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = '{(tmp_path / "a").as_posix()}'
num_repeats = 2
[[datasets.subsets]]
image_dir = '{(tmp_path / "reg").as_posix()}'
is_reg = true
[[datasets]]
resolution = 128
enable_bucket = false
[[datasets.subsets]]
image_dir = '{(tmp_path / "b").as_posix()}'
"""
    )
    (tmp_path / "prompts.txt").write_text("a disc --w 64 --h 64 --s 1\n")
    del options["train_data_dir"]
    return options | {
        "dataset_config": tmp_path / "data.toml", "gradient_accumulation_steps": 2, "network_dropout": 0.1,
        "sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2, "validate_every_n_steps": 3,
        "max_validation_steps": 3, "save_best": True, "ema_decay": 0.9, "save_every_n_steps": 2, "save_state": True,
        "lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 8, "noise_offset": 0.1,
    }  # fmt: skip


BEST = "net-best.safetensors"


def results_after(whole: Path, state: Path) -> list[str]:
    """What a run that goes on at `state` writes as the whole one did: the best file too if it is of a later step."""
    start, best = json.loads((state / "train_state.json").read_text())["step"], metadata_of(whole / BEST)["ss_steps"]
    return ["net.safetensors", "net-ema.safetensors"] + [BEST] * (int(best) > start)


def test_resume_twice_in_mid_epoch_with_all_that_could_remember_something(everything, tmp_path):
    assert train_network(**everything) == 0
    whole = tmp_path / "out"
    for folder, state in (
        ("second", whole / "net-step00000002-state"),
        ("third", tmp_path / "second" / "net-step00000006-state"),
    ):
        assert train_network(**{**everything, "output_dir": tmp_path / folder}, resume=state) == 0
        names = results_after(whole, state)
        assert (tmp_path / folder / BEST).exists() == (BEST in names)
        for name in names:
            assert equal_files(whole / name, tmp_path / folder / name), (folder, name)
    states = [json.loads((tmp_path / name / "net-state" / "train_state.json").read_text()) for name in ("out", "third")]
    assert states[0]["recent_losses"] == states[1]["recent_losses"]
    validation = [
        torch.load(tmp_path / name / "net-state" / "optimizer.pt", weights_only=True)["validation"]
        for name in ("out", "third")
    ]
    assert validation[0] == validation[1], "the best loss and the patience are those of the whole run"


def test_resume_after_changing_only_the_length(options, tmp_path, capfd):
    """With a constant rate a run of 2 steps made longer is the run of 5; other schedules get the new length."""
    options |= {"validation_split": 0.34, "max_validation_steps": 2, "ema_decay": 0.9, "save_state": True}
    for name, schedule in (("constant", {"lr_warmup_steps": 1}), ("cosine", {"lr_scheduler": "cosine"})):
        settings = {**options, **schedule, "logging_dir": tmp_path / "log" / name}
        whole, part, longer = (tmp_path / f"{name}-{which}" for which in ("whole", "part", "longer"))
        assert train_network(**{**settings, "max_train_steps": 5, "output_dir": whole}) == 0
        assert train_network(**{**settings, "max_train_steps": 2, "output_dir": part, "logging_dir": None}) == 0
        settings |= {"max_train_steps": 5, "output_dir": longer, "logging_dir": tmp_path / "log" / f"{name} longer"}
        capfd.readouterr()
        assert train_network(**settings, resume=part / "net-state") == 0
        is_equal = equal_files(whole / "net.safetensors", longer / "net.safetensors")
        assert is_equal == equal_files(whole / "net-ema.safetensors", longer / "net-ema.safetensors")
        assert is_equal == (name == "constant")
        said = "planned for 2 steps and now has 5" in capfd.readouterr().err
        assert said == (name == "cosine")
    rates = [logged(tmp_path / "log" / name, "lr/unet") for name in ("cosine", "cosine longer")]
    assert rates[1] == rates[0][2:], "from the first resumed step on"


def test_initial_step_is_the_place_of_a_run_whose_state_is_lost(options, tmp_path, capfd):
    """Data order, noise and schedule go on there: with plain SGD, which remembers nothing, the end is the same."""
    options |= {"optimizer_type": "torch.optim.SGD", "learning_rate": 0.1, "lr_scheduler": "cosine"}
    options |= {"shuffle_caption": True, "max_train_steps": 10, "save_every_n_epochs": 1}
    assert train_network(**options) == 0
    whole = tmp_path / "out"
    epoch_file = whole / "net-000001.safetensors"  # 12 showings in batches of 2: after step 6
    for start in ({"initial_step": 6}, {"initial_epoch": 2}, {"initial_step": 6, "skip_until_initial_step": True}):
        again = {
            **options,
            "output_dir": tmp_path / "again",
            "network_weights": epoch_file,
            "save_state": True,
            **start,
        }
        assert train_network(**again) == 0
        assert equal_files(whole / "net.safetensors", tmp_path / "again" / "net.safetensors")
        metadata = metadata_of(tmp_path / "again" / "net.safetensors")
        assert (metadata["ss_steps"], metadata["ss_epoch"]) == ("10", "2")
    assert "--skip_until_initial_step has no effect: the steps before are left out without it" in capfd.readouterr().err
    assert train_network(**{**again, "max_train_steps": 11, "resume": "latest"}) == 0
    assert "--initial_step has no effect: the state goes on after step 10" in capfd.readouterr().err


def test_two_processes_that_leave_out_different_modules(options, tmp_path):
    in_two_processes("train_network.py", **{**options, "network_args": ["module_dropout=0.5"], "max_train_steps": 2})
    assert (tmp_path / "out" / "net.safetensors").exists()


def test_two_processes_resume_in_the_same_weights(everything, tmp_path):
    in_two_processes("train_network.py", **everything)
    whole, state = tmp_path / "out", tmp_path / "out" / "net-step00000002-state"
    in_two_processes("train_network.py", **{**everything, "output_dir": tmp_path / "again", "resume": state})
    names = results_after(whole, state)
    assert BEST in names
    for name in names:
        assert equal_files(whole / name, tmp_path / "again" / name), name


def test_two_processes_equal_one(options, tmp_path):
    """2 processes x batch 2 = 1 process x batch 4: the same losses to 1e-5, the same steps and rates."""
    # plain SGD: AdamW divides by the size of a gradient, and would turn rounding of tiny ones into large steps
    options |= {"max_train_steps": 5, "lr_scheduler": "linear", "lr_warmup_steps": 2}
    options |= {"optimizer_type": "SGDNesterov", "learning_rate": 0.1, "max_grad_norm": 1.0}
    options |= {"resolution": 128, "max_bucket_reso": 128}  # at 64 px a group norm sees two numbers: all rounding
    options |= {"validation_split": 0.17, "validate_every_n_steps": 3, "ema_decay": 0.9}
    one = {**options, "train_batch_size": 4, "logging_dir": tmp_path / "log1", "output_dir": tmp_path / "one"}
    assert train_network(**one) == 0
    two = {**options, "train_batch_size": 2, "logging_dir": tmp_path / "log2", "output_dir": tmp_path / "two"}
    in_two_processes("train_network.py", **two, ddp_timeout=5, ddp_gradient_as_bucket_view=True, ddp_static_graph=True)
    assert logged(tmp_path / "log1", "loss/current") == pytest.approx(
        logged(tmp_path / "log2", "loss/current"), abs=1e-5
    )
    validation = [logged(tmp_path / name, "loss/validation") for name in ("log1", "log2")]
    assert len(validation[0]) == 3 and validation[0] == pytest.approx(validation[1], abs=1e-5)
    for tag in ("lr/unet", "lr/textencoder"):
        assert logged(tmp_path / "log1", tag) == logged(tmp_path / "log2", tag)
    for file in ("net.safetensors", "net-ema.safetensors"):
        first, second = (load_file(tmp_path / name / file) for name in ("one", "two"))
        distance = sum((first[name] - second[name]).square().sum() for name in first).sqrt()
        length = sum(first[name].square().sum() for name in first if "lora_up" in name).sqrt()
        assert 0 < distance < 1e-4 * length, "the same training up to rounding"
    steps = [metadata_of(tmp_path / name / "net.safetensors")["ss_steps"] for name in ("one", "two")]
    assert steps == ["5", "5"]
