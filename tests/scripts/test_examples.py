"""The examples in docs/examples: their flags and keys are those of the program, and they train."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import train_network as entry
from library.cli.config_file import read_config_file
from library.cli.training import build_parser
from library.data import dataset_file
from tests.runs import ROOT, metadata_of, train_network
from tests.tiny_data import tiny_images

EXAMPLES = ROOT / "docs" / "examples"
CONTINUES = {".sh": "\\", ".bat": "^"}
MORE_WORDS = {".sh": "$@", ".bat": "%*"}


def command_words(script: Path) -> list[str]:
    """The words after train_network.py, without the place for the user's own."""
    lines = [line.rstrip() for line in script.read_text(encoding="utf-8").splitlines()]
    text = " ".join(line.removesuffix(CONTINUES[script.suffix]) for line in lines[lines.index("") :])
    words = shlex.split(text.replace("\\", "/"))
    first = next(index for index, word in enumerate(words) if word.endswith("train_network.py"))
    return words[first + 1 : words.index(MORE_WORDS[script.suffix])]


@pytest.mark.parametrize("name", ["train_lora.sh", "train_lora.bat"])
def test_batch_files_give_flags_that_exist(name):
    words = command_words(EXAMPLES / name)
    namespace = build_parser(entry.SCRIPT).parse_strictly(words)
    assert namespace.config_file == "lora.toml" and namespace.metadata_trigger_phrase == "mydog dog"
    assert all((EXAMPLES / word).is_file() for word in words if word.endswith(".toml"))


def test_the_windows_file_has_windows_lines():
    content = (EXAMPLES / "train_lora.bat").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n")


def test_files_have_only_known_keys():
    values, notes = read_config_file(EXAMPLES / "lora.toml", entry.SCRIPT.options())
    assert values["network_module"] == "networks.lora" and not notes
    assert dataset_file.read(EXAMPLES / "dataset.toml").datasets


def test_the_examples_train(tmp_path, tiny_sd1_path, monkeypatch):
    tiny_images(tmp_path / "pictures" / "mydog", 2, captions=["mydog dog, in the grass"])
    data = (EXAMPLES / "dataset.toml").read_text(encoding="utf-8").replace("\\", "/")
    data = data.replace("resolution = 512", "resolution = 64").replace("min_bucket_reso = 256", "min_bucket_reso = 64")
    (tmp_path / "dataset.toml").write_text(data, encoding="utf-8")
    settings = (EXAMPLES / "lora.toml").read_text(encoding="utf-8")
    settings = settings.replace('"models/model.safetensors"', f"'{tiny_sd1_path}'")
    settings = settings.replace("max_train_steps = 1600", "max_train_steps = 2")
    (tmp_path / "lora.toml").write_text(settings.replace("lr_warmup_steps = 100", "lr_warmup_steps = 1"))
    monkeypatch.chdir(tmp_path)
    assert train_network(config_file="lora.toml", max_data_loader_n_workers=0) == 0
    metadata = metadata_of(tmp_path / "outputs" / "mydog.safetensors")
    assert metadata["ss_steps"] == "2" and metadata["ss_text_encoder_lr"] == "5e-05"
