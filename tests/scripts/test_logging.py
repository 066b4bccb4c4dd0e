"""What a run says and where: console level and file, trackers and what they are told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from library.cli.console import start_console
from library.targets.options import NetworkOptions
from library.train.logs import rates_by_log_name, settings_to_show
from library.train.output_options import HubOptions, LoggingOptions, SavingOptions
from tests.runs import ENVIRONMENT, flags, logged, script, train_network

STAND_INS = Path(__file__).parents[1] / "data" / "stand_ins"


@pytest.fixture(autouse=True)
def console_afterwards():
    yield
    start_console()


def test_the_level_leaves_lighter_messages_out_of_the_screen_and_not_out_of_the_log(options, tmp_path, capfd):
    options |= {"max_train_steps": 1, "clip_skip": 2, "lowram": True, "console_log_level": "WARNING"}
    assert train_network(**options) == 0
    said = capfd.readouterr().err
    assert "--lowram has no effect" in said and "This run" not in said and "model saved." not in said
    assert "model saved." in (tmp_path / "out" / "net.log").read_text(encoding="utf-8")


def test_with_debug_the_libraries_speak_too():
    start_console("DEBUG")
    assert logging.getLogger().level == logging.DEBUG
    assert logging.getLogger("accelerate").isEnabledFor(logging.INFO)
    start_console()
    assert not logging.getLogger("accelerate").isEnabledFor(logging.INFO)


def test_messages_in_a_file_are_not_on_the_screen(options, tmp_path, capfd):
    file = tmp_path / "console.txt"
    file.write_text("kept\n")
    assert train_network(**{**options, "max_train_steps": 1}, console_log_file=file, console_log_simple=True) == 0
    said, text = capfd.readouterr().err, file.read_text(encoding="utf-8")
    assert text.startswith("kept\n") and "model saved." in text and "INFO" in text
    assert "model saved." not in said and "steps" in said, "the progress bar stays"
    assert "--console_log_simple has no effect" in text
    assert train_network(**options, console_log_file=tmp_path / "no" / "folder.txt") == 2
    assert "--console_log_file" in capfd.readouterr().err


def test_epochs_and_the_norms_on_the_bar(options, tmp_path, capfd):
    assert train_network(**options, scale_weight_norms=1e-3) == 0
    said = capfd.readouterr().err
    assert said.count("epoch 1/1") == 1 and (tmp_path / "out" / "net.log").read_text().count("epoch 1/1") == 1
    last_bar = said[said.rindex("steps:") :]
    assert "Keys Scaled=" in last_bar and "Average key norm=" in last_bar and "loss=" in last_bar
    assert train_network(**{**options, "max_train_steps": 8}) == 0
    said = capfd.readouterr().err
    assert [said.count(f"epoch {epoch}/2") for epoch in (1, 2)] == [1, 1] and "Keys Scaled" not in said


@pytest.mark.parametrize(
    ("groups", "factors", "expected"),
    [
        (["text encoder", "unet"], [], {"lr/textencoder": 0.0, "lr/unet": 1.0}),
        (["unet"], [0.5], {"lr/unet": 0.0, "lr/d*lr": 0.0}),
        (["unet", "unet plus"], [], {"lr/unet": 0.0, "lr/group1": 1.0}),
        (["text encoder", "text encoder"], [], {"lr/textencoder": 0.0, "lr/group1": 1.0}),
        (
            ["text encoder", "unet block 1", "unet"],
            [0.5, 0.5, 0.25],
            {"lr/textencoder": 0.0, "lr/group1": 1.0, "lr/group2": 2.0, "lr/d*lr/group1": 0.5, "lr/d*lr/group2": 0.5},
        ),
        (
            ["text encoder 1", "text encoder 2", "unet"],
            [],
            {"lr/textencoder1": 0.0, "lr/textencoder2": 1.0, "lr/unet": 2.0},
        ),
        (
            ["text encoder 1", "unet block 1", "unet"],
            [],
            {"lr/textencoder1": 0.0, "lr/group1": 1.0, "lr/group2": 2.0},
        ),
        (["unet", "unet plus", "x"], [], {"lr/group0": 0.0, "lr/group1": 1.0, "lr/group2": 2.0}),
        (
            ["unet", "unet plus", "x"],
            [0.5] * 3,
            {f"lr/group{n}": float(n) for n in range(3)} | {f"lr/d*lr/group{n}": n / 2 for n in range(3)},
        ),
    ],
)
def test_names_of_rates(groups, factors, expected):
    assert rates_by_log_name(groups, [0.0, 1.0, 2.0][: len(groups)], factors) == expected


def test_weights_and_biases(options, tmp_path):
    """Numbers arrive without --logging_dir, under the run's name; settings without keys and folders."""
    record = tmp_path / "wandb.jsonl"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(STAND_INS), "WANDB_STAND_IN": str(record)}
    (tmp_path / "tracker.toml").write_text('[wandb]\ntags = ["a", "b"]\n')
    words = flags(
        **options, log_with="wandb", wandb_api_key="secret", wandb_run_name="third try", log_tracker_name="cats",
        log_tracker_config=tmp_path / "tracker.toml", log_config=True,
    )  # fmt: skip
    done = script("train_network.py", *words, env=environment)
    assert done.returncode == 0, done.stderr
    notes = [json.loads(line) for line in record.read_text().splitlines()]
    assert notes[0] == {"login": "secret"}
    assert notes[1]["init"] == {"project": "cats", "name": "third try", "tags": ["a", "b"]}
    assert "***" in notes[1]["argv"] and "secret" not in notes[1]["argv"], "the command line goes to the tracker too"
    config = next(note["config"] for note in notes if "config" in note)
    assert config["network_dim"] == 4 and config["train_data_dir"] == Path(options["train_data_dir"]).name
    assert "secret" not in json.dumps(config) and str(tmp_path) not in json.dumps(config)
    steps = [note["step"] for note in notes if "loss/current" in note.get("log", {})]
    assert steps == [1, 2, 3] and notes[-1] == {"finish": True}
    assert "secret" not in done.stderr + (tmp_path / "out" / "net.log").read_text()


def test_settings_at_tensorboard(options, tmp_path):
    options["max_train_steps"] = 1
    assert train_network(**options, logging_dir=tmp_path / "log", log_config=True, huggingface_token="secret") == 0
    (file,) = (tmp_path / "log").rglob("hparams.yml")
    settings = yaml.safe_load(file.read_text())
    assert settings["learning_rate"] == 1e-3 and settings["resolution"] == "64, 64"
    assert "huggingface_token" not in settings and "logging_dir" in settings and str(tmp_path) not in file.read_text()


def test_what_settings_show(tmp_path):
    groups = [
        HubOptions(huggingface_token="secret", huggingface_repo_id="me/cats"),
        LoggingOptions(log_with="wandb", wandb_api_key="secret"),
        SavingOptions(output_dir=tmp_path / "out", resume=r"C:\runs\net-state"),
        NetworkOptions(network_module="networks.lora", network_args=(f"preset={tmp_path}/full.toml", "conv_dim=4")),
    ]
    shown = settings_to_show(groups)
    assert shown["huggingface_repo_id"] == "me/cats" and shown["log_with"] == "wandb"
    assert shown["output_dir"] == "out" and shown["resume"] == "net-state"
    assert shown["network_args"] == "preset=full.toml, conv_dim=4"
    assert "secret" not in str(shown)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[wandb", ["tracker.toml", "is not TOML"]),
        ("tags = ['a']", ["tags", "[wandb]"]),
        ("[wnadb]\ntags = ['a']", ["wnadb", "[wandb]"]),
    ],
)
def test_mistakes_in_the_file_for_the_tracker(options, tmp_path, text, words, capfd):
    (tmp_path / "tracker.toml").write_text(text)
    files = {"log_tracker_config": tmp_path / "tracker.toml", "logging_dir": tmp_path / "log"}
    assert train_network(**options, **files) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_a_tracker_is_given_its_arguments(options, tmp_path):
    (tmp_path / "tracker.toml").write_text("[tensorboard]\nfilename_suffix = '.cats'\n")
    files = {"log_tracker_config": tmp_path / "tracker.toml", "logging_dir": tmp_path / "log", "log_prefix": "a_"}
    assert train_network(**options, **files, log_tracker_name="cats") == 0
    assert list((tmp_path / "log").glob("a_*/cats/*.cats"))
    assert len(logged(tmp_path / "log", "loss/current")) == 3
