"""tools/merge_models.py and tools/show_metadata.py: commands, messages, what they leave behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.probe import probe
from tests.runs import ROOT, script
from tests.tiny_models import tiny_sd_checkpoint
from tools.merge_models import TOOL
from tools.show_metadata import TOOL as SHOW

MERGE, SHOW_FILE = "tools/merge_models.py", "tools/show_metadata.py"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd_checkpoint(tmp_path_factory.mktemp("other") / "other.safetensors", seed=5, dtype=torch.float16)


def run(*words: object) -> int:
    return TOOL.run([str(word) for word in words])


def test_a_whole_model(tiny_sd1_path, other, tmp_path):
    command = ["--models", tiny_sd1_path, other, "--output", "sum", "--ratios", 0.75, 0.25]
    result = script(MERGE, *command, "--saving_precision", "bf16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sum.safetensors"]
    one, two, made = (load_file(path) for path in (tiny_sd1_path, other, tmp_path / "sum.safetensors"))
    assert set(made) == set(one)
    for name, tensor in made.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(tensor, one[name])
        else:
            right = (0.75 * one[name].double() + 0.25 * two[name].double()).bfloat16()
            assert tensor.dtype == torch.bfloat16 and (tensor - right).abs().max() <= right.abs().max() / 128, name
    with safe_open(tmp_path / "sum.safetensors", "pt") as file:
        assert not file.metadata()
    assert probe(str(tmp_path / "sum.safetensors")).kind == "sd1"  # which trains


RUN_AND_REPORT = """
import sys
from tools.merge_models import TOOL
assert "torch" not in sys.modules
code = TOOL.run(sys.argv[1:])
print(code, [name for name in ("diffusers", "transformers", "accelerate", "cv2", "PIL") if name in sys.modules])
"""


def test_only_what_moves_tensors_is_imported(tiny_sd1_path, tmp_path):
    words = ["--models", str(tiny_sd1_path), "--output", str(tmp_path / "a.safetensors"), "--unet_only"]
    command = [sys.executable, "-c", RUN_AND_REPORT, *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "0 []", result.stderr


def test_metadata_where_asked_for(tiny_sd1_path, other, tmp_path, capsys):
    assert run("--models", tiny_sd1_path, other, "--output", tmp_path / "sum.safetensors", "--add_metadata") == 0
    assert SHOW.run(["--model", str(tmp_path / "sum.safetensors")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["modelspec.merged_from"] == "tiny_sd1, other" and shown["modelspec.title"] == "sum"
    assert shown["modelspec.architecture"] == "stable-diffusion-v1"


def test_what_differs_is_told(tiny_sd1_path, other, tmp_path, caplog):
    tensors = load_file(other) | {"model_ema.decay": torch.ones(1)}
    del tensors["first_stage_model.encoder.conv_in.bias"]
    save_file(tensors, tmp_path / "odd.safetensors")
    words = ["--models", tiny_sd1_path, tmp_path / "odd.safetensors", "--output", tmp_path / "sum"]
    assert run(*words, "--ratios", 0.5, 0.7) == 0
    assert "--ratios add up to 1.2" in caplog.text
    assert "stand in for what is not in it: 1 tensor (first_stage_model 1)" in caplog.text
    assert "left out, only in it: 1 tensor (model_ema 1)" in caplog.text
    assert "  model_ema.decay" not in caplog.text
    caplog.clear()
    assert run(*words, "--show_skipped", "--unet_only") == 0
    assert "  model_ema.decay" in caplog.text and "conv_in.bias" not in caplog.text


def test_other_predictions_are_told(tmp_path, caplog):
    plain = tiny_sd_checkpoint(tmp_path / "plain.safetensors", "sd2")
    tensors = load_file(plain)
    save_file(tensors, tmp_path / "velocity.safetensors", {"modelspec.prediction_type": "v"})
    words = ["--models", tmp_path / "velocity.safetensors", plain, "--output", tmp_path / "sum"]
    assert run(*words) == 0
    assert f"{plain} predicts noise, as far as it says" in caplog.text
    assert "use --add_metadata to keep that" in caplog.text
    assert run(*words, "--add_metadata") == 0
    assert probe(str(tmp_path / "sum.safetensors")).v_prediction


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--models is needed"),
        (["--models", "{sd1}"], "--output is needed"),
        (["--models", "{sd1}", "--output", "{tmp}/o", "--ratios", "1", "2"], "2 ratios for 1 model; give one for each"),
        (["--models", "{sd1}", "{tmp}/none.safetensors", "--output", "{tmp}/o"], "none.safetensors does not exist"),
        (["--models", "{sd1}", "{tmp}/cut.safetensors", "--output", "{tmp}/o"], "cut.safetensors is truncated"),
        (["--models", "{sd1}", "{sdxl}", "--output", "{tmp}/o"], "is SD 1.x, and {sdxl} is SDXL; merge models of one"),
        (["--models", "{tmp}/copy.safetensors", "--output", "{tmp}/copy"], "is one of the models, which would be repl"),
        (["--models", "{tmp}/copy.safetensors", "--output", "{tmp}/f.safetensors"], "f.safetensors is a folder"),
        (["--models", "{sd1}", "--output", "{tmp}/copy.safetensors/x"], "can't be written"),
        (["--models", "{sd1}", "--output", "{tmp}/o", "--device", "abacus"], "--device: 'abacus' is no device"),
        (["--models", "{sd1}", "--output", "{tmp}/o", "--precision", "half"], "'half' is not one of float, fp16, bf16"),
    ],
)
def test_mistakes_are_sentences(tiny_sd1_path, tiny_sdxl_path, tmp_path, capsys, words, said):
    shutil.copy(tiny_sd1_path, tmp_path / "copy.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(tiny_sd1_path.read_bytes()[:100_000])
    (tmp_path / "f.safetensors").mkdir()
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    names = {"sd1": tiny_sd1_path, "sdxl": tiny_sdxl_path, "tmp": tmp_path}
    try:
        code = run(*(word.format(**names) for word in words))
    except SystemExit as end:  # as the parser ends a program
        code = end.code
    assert code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.format(**names) in told
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_shown_metadata(tmp_path):
    metadata = {"ss_b": '{"1girl": 2}', "ss_a": "1", "title": "Größe", "list": "[1, x"}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata)
    result = script(SHOW_FILE, "--model", str(tmp_path / "a.safetensors"))
    assert (result.returncode, result.stdout) == (0, json.dumps(metadata, indent=4, sort_keys=True) + "\n")
    readable = script(SHOW_FILE, "--model", str(tmp_path / "a.safetensors"), "--readable").stdout
    assert json.loads(readable) == metadata | {"ss_b": {"1girl": 2}} and "Größe" in readable
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert script(SHOW_FILE, "--model", str(tmp_path / "b.safetensors")).stdout == "No metadata found\n"
    (tmp_path / "c.ckpt").write_bytes(b"PK\x03\x04 and so on")
    result = script(SHOW_FILE, "--model", str(tmp_path / "c.ckpt"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "is no safetensors file" in result.stderr
    assert script(SHOW_FILE).returncode == 2


def test_showing_takes_no_torch(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"a": "b"})
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {"PYTHONPATH": str(tmp_path)}
    result = script(SHOW_FILE, "--model", str(tmp_path / "a.safetensors"), env=environment)
    assert result.returncode == 0, result.stderr
