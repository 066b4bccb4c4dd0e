"""fine_tune.py, train_db.py and sdxl_train.py on tiny models: golden losses, rates, forms of files, mistakes."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.checkpoints.probe import probe
from library.checkpoints.weights import open_weights
from tests.runs import equal_files, logged, metadata_of, run_script
from tests.tiny_data import tiny_images
from tests.tiny_metadata import tiny_metadata
from tests.tiny_models import tiny_sd_checkpoint, tiny_sdxl_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden_losses_full_weights.json"


def run(script: str, **options) -> int:
    return run_script(importlib.import_module(script), options)


@pytest.fixture
def start(tmp_path, images, tiny_sd1_path, tiny_sdxl_path):
    """The options of a short run of a script."""

    def options_of(script: str) -> dict:
        source = {"train_data_dir": images}
        if script == "fine_tune":
            metadata = tiny_metadata(images / "2_disc", tmp_path / "meta.json")
            source = {"train_data_dir": images / "2_disc", "in_json": metadata, "dataset_repeats": 2}
        return {
            "pretrained_model_name_or_path": tiny_sdxl_path if script == "sdxl_train" else tiny_sd1_path, **source,
            "output_dir": tmp_path / "out", "output_name": "net", "save_model_as": "safetensors", "resolution": 64,
            "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128, "train_batch_size": 2,
            "max_train_steps": 3, "learning_rate": 1e-3, "seed": 1, "max_data_loader_n_workers": 0,
            "logging_dir": tmp_path / "log",
        }  # fmt: skip

    return options_of


def moved(before: Path, after: Path, part: str = "") -> float:
    """How far the tensors of a part, by its prefix, are from those of the base model."""
    old, new = load_file(before), load_file(after)
    names = [name for name in new if name.startswith(part) and name in old]
    assert names
    return math.sqrt(sum((new[name].float() - old[name].float()).square().sum().item() for name in names))


UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.", "conditioner.embedders.1."

GOLDEN_RUNS = {
    "fine_tune": ("fine_tune", {}),
    "fine_tune, text": ("fine_tune", {"train_text_encoder": True, "learning_rate_te": 1e-4, "noise_offset": 0.1}),
    "train_db": ("train_db", {}),
    "train_db, v-prediction": ("train_db", {"stop_text_encoder_training": 1, "v_prediction": True}),
    "sdxl_train": ("sdxl_train", {"block_lr": ",".join(["1e-3"] * 23)}),
    "sdxl_train, text": ("sdxl_train", {"train_text_encoder": True, "learning_rate_te2": 1e-4}),
    "sdxl_train, v-prediction": ("sdxl_train", {"v_prediction": True, "full_bf16": True, "mixed_precision": "bf16"}),
}


def with_velocity(script: str, folder: Path) -> Path:
    """A tiny model that says that it predicts velocity."""
    if script == "sdxl_train":
        return tiny_sdxl_checkpoint(folder / "v.safetensors", v_prediction=True)
    return tiny_sd_checkpoint(folder / "v.safetensors", "sd2", v_prediction=True)


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_golden_losses(start, tmp_path, name):
    """Three steps' losses as stored; made by running this test with GOLDEN_UPDATE=1."""
    script, settings = GOLDEN_RUNS[name]
    options = {**start(script), **settings}
    if options.pop("v_prediction", False):
        options["pretrained_model_name_or_path"] = with_velocity(script, tmp_path)
    assert run(script, **options) == 0
    losses = logged(tmp_path / "log", "loss/current")
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN_UPDATE"):
        stored[name] = losses
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    assert losses == pytest.approx(stored[name], rel=1e-4)
    assert len(losses) == 3


# ---------------------------------------------------------------------------------------------- what learns


def test_the_text_encoder_stops(start, tmp_path, tiny_sd1_path, capfd):
    """After its last update its weights stay, whatever an optimizer remembers; -1 trains it never."""
    options = start("train_db") | {"max_train_steps": 4}
    stop = {"stop_text_encoder_training": 2, "save_every_n_steps": 2}
    assert run("train_db", **options, **stop) == 0
    assert "has been trained for 2 steps" in capfd.readouterr().err
    half, whole = tmp_path / "out" / "net-step00000002.safetensors", tmp_path / "out" / "net.safetensors"
    assert moved(tiny_sd1_path, half, TEXT) > 0
    assert moved(half, whole, TEXT) == 0 and moved(half, whole, UNET) > 0
    assert run("train_db", **options | {"output_dir": tmp_path / "never"}, stop_text_encoder_training=-1) == 0
    assert moved(tiny_sd1_path, tmp_path / "never" / "net.safetensors", TEXT) == 0


def test_rates_of_text_encoders(start, tmp_path, tiny_sdxl_path):
    rates = {"train_text_encoder": True, "learning_rate_te1": 0, "learning_rate_te2": 1e-4}
    assert run("sdxl_train", **start("sdxl_train"), **rates) == 0
    file = tmp_path / "out" / "net.safetensors"
    assert moved(tiny_sdxl_path, file, TEXT_1) == 0 < moved(tiny_sdxl_path, file, TEXT_2)
    assert logged(tmp_path / "log", "lr") == pytest.approx([1e-3] * 3)
    assert logged(tmp_path / "log", "lr/text_encoder2") == pytest.approx([1e-4] * 3)


def test_rates_of_blocks(start, tmp_path, tiny_sdxl_path):
    """Blocks with a rate of 0 stay; the others are logged by number."""
    rates = ["0"] * 23
    rates[4], rates[22] = "1e-3", "2e-3"
    assert run("sdxl_train", **start("sdxl_train"), block_lr=",".join(rates)) == 0
    old, new = load_file(tiny_sdxl_path), load_file(tmp_path / "out" / "net.safetensors")
    blocks = {
        ".".join(name.removeprefix(UNET).split(".")[:2])
        for name in new
        if name in old and not torch.equal(new[name], old[name])
    }
    assert blocks == {"input_blocks.3", "out.0", "out.2"}
    assert logged(tmp_path / "log", "lr/block4") == pytest.approx([1e-3] * 3)
    assert logged(tmp_path / "log", "lr/block22") == pytest.approx([2e-3] * 3)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdaFactor"])
def test_groups_updated_inside_the_backward_pass(start, tmp_path, optimizer):
    options = start("sdxl_train") | {"max_grad_norm": 0.0, "optimizer_type": optimizer}
    if optimizer == "AdaFactor":
        options["optimizer_args"] = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
    runs = {"plain": {}, "groups": {"fused_optimizer_groups": 3}, "single": {"fused_backward_pass": True}}
    for name, settings in runs.items():
        assert run("sdxl_train", **options | {"output_dir": tmp_path / name}, **settings) == 0
    plain = tmp_path / "plain" / "net.safetensors"
    assert equal_files(plain, tmp_path / "groups" / "net.safetensors")
    assert equal_files(plain, tmp_path / "single" / "net.safetensors")


def test_small_updates_of_bfloat16_weights_add_up(start, tmp_path):
    """Steps of a thousandth of a bfloat16's spacing: rounded to the nearest they would all be lost."""
    model = load_file(start("fine_tune")["pretrained_model_name_or_path"])
    options = start("fine_tune") | {"mixed_precision": "bf16", "learning_rate": 1e-6, "max_train_steps": 4}
    assert run("fine_tune", **options, full_bf16=True) == 0
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    unet = [name for name in tensors if name.startswith(UNET)]
    assert {tensors[name].dtype for name in unet} == {torch.bfloat16}
    steps = torch.cat([(tensors[name].float() - model[name].to(torch.bfloat16).float()).flatten() for name in unet])
    assert 0 < (steps != 0).float().mean() < 0.2  # a few of them, each by a whole spacing
    assert steps.abs().mean() < 1e-5


def test_no_token_padding(start, tmp_path):
    """Captions are shorter for the text encoder, so the U-Net sees fewer tokens and the loss is another one."""
    assert run("train_db", **start("train_db") | {"max_train_steps": 1}) == 0
    settings = {"no_token_padding": True, "max_train_steps": 1, "logging_dir": tmp_path / "log2"}
    assert run("train_db", **start("train_db") | settings) == 0
    first, second = (logged(tmp_path / name, "loss/current") for name in ("log", "log2"))
    assert first != second and first == pytest.approx(second, rel=0.2)
    assert run("train_db", **start("train_db"), no_token_padding=True, max_token_length=150) == 2


@pytest.mark.parametrize("script", ["train_db", "sdxl_train"])
def test_prior_preservation(start, tmp_path, script):
    """The weight of regularisation images counts."""
    tiny_images(tmp_path / "reg" / "1_class", 6, seed=50)
    losses = {}
    for weight in (1.0, 0.0):
        folder = tmp_path / f"log{weight}"
        settings = {"reg_data_dir": tmp_path / "reg", "prior_loss_weight": weight, "logging_dir": folder}
        assert run(script, **start(script) | settings) == 0
        losses[weight] = logged(folder, "loss/current")
    assert losses[1.0] != losses[0.0]


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"save_model_as": None}, "net.ckpt"),
        ({"save_model_as": None, "use_safetensors": True}, "net.safetensors"),
        ({"save_model_as": "ckpt", "use_safetensors": True}, "net.safetensors"),
        ({"save_model_as": "diffusers"}, "net/unet/diffusion_pytorch_model.bin"),
        ({"save_model_as": "diffusers_safetensors"}, "net/unet/diffusion_pytorch_model.safetensors"),
        ({"save_model_as": "diffusers", "use_safetensors": True}, "net/unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_forms_of_files(start, tmp_path, given, written):
    options = start("fine_tune") | {"max_train_steps": 1} | given
    assert run("fine_tune", **options) == 0
    assert (tmp_path / "out" / written).is_file()
    path = tmp_path / "out" / written.split("/")[0]
    assert probe(str(path)).kind == "sd1"
    again = options | {"pretrained_model_name_or_path": path, "output_dir": tmp_path / "again", "save_model_as": None}
    again.pop("use_safetensors", None)
    assert run("fine_tune", **again) == 0
    assert (tmp_path / "again" / ("net/model_index.json" if path.is_dir() else "net.ckpt")).is_file(), "as the input"


def test_names_and_metadata_of_files(start, tmp_path):
    options = start("sdxl_train") | {"save_every_n_steps": 1, "save_last_n_steps": 1, "save_precision": "fp16"}
    options["max_train_steps"] = 4
    assert run("sdxl_train", **options, metadata_title="mine") == 0
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == {"net.safetensors", "net-step00000002.safetensors", "net-step00000003.safetensors"}
    metadata = metadata_of(tmp_path / "out" / "net.safetensors")
    assert all(name.startswith("modelspec.") or name == "format" for name in metadata)
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.title"] == "mine"
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith((UNET, VAE))} == {torch.float16}


def test_frozen_text_encoders_in_8_bits(start, tmp_path, tiny_sdxl_path):
    """Files are in the asked precision throughout, and hold the text encoders as they were read for training."""
    options = start("sdxl_train") | {"mixed_precision": "bf16", "fp8_base": True, "max_train_steps": 1}
    assert run("sdxl_train", **options, save_precision="fp16") == 0
    before, after = load_file(tiny_sdxl_path), load_file(tmp_path / "out" / "net.safetensors")
    weights = [name for name in after if name.endswith((".weight", ".bias"))]
    assert len(weights) > 200 and {after[name].dtype for name in weights} == {torch.float16}
    assert all(
        torch.equal(after[name], before[name].bfloat16().half())
        for name in weights
        if name.startswith((TEXT_1, TEXT_2))
    )


def test_counters_of_a_ckpt(start, tmp_path):
    assert run("train_db", **start("train_db") | {"save_model_as": "ckpt"}) == 0
    content = torch.load(tmp_path / "out" / "net.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (1, 3)
    with open_weights(tmp_path / "out" / "net.ckpt") as weights:
        assert any(name.startswith(UNET) for name in weights.shapes)


def test_zero_terminal_snr_is_told_to_readers(start, tmp_path):
    model = with_velocity("sdxl_train", tmp_path)
    options = start("sdxl_train") | {"pretrained_model_name_or_path": model, "max_train_steps": 1}
    assert run("sdxl_train", **options, zero_terminal_snr=True) == 0
    source = probe(str(tmp_path / "out" / "net.safetensors"), family="sdxl")
    assert source.v_prediction and source.zero_terminal_snr


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [
        ("fine_tune", {"in_json": None}, ["--in_json", "metadata files", "train_db.py"]),
        ("fine_tune", {"stop_text_encoder_training": 3}, ["--stop_text_encoder_training", "train_db"]),
        ("train_db", {"block_lr": "1"}, ["--block_lr", "sdxl_train.py"]),
        ("train_db", {"learning_rate_te": -1.0}, ["--learning_rate_te", "negative"]),
        ("sdxl_train", {"block_lr": "1e-4,1e-4"}, ["--block_lr", "2 numbers", "23"]),
        ("sdxl_train", {"block_lr": ",".join(["0"] * 23)}, ["--block_lr", "only zeros"]),
        ("sdxl_train", {"cache_text_encoder_outputs": True, "train_text_encoder": True}, ["--train_text_encoder"]),
        (
            "sdxl_train",
            {"cache_text_encoder_outputs": True, "dataset_class": "my.Own"},
            ["--cache_text_encoder_outputs", "--dataset_class my.Own"],
        ),
        ("sdxl_train", {"fused_optimizer_groups": 2, "fused_backward_pass": True}, ["--fused_optimizer_groups"]),
        ("sdxl_train", {"network_module": "networks.lora"}, ["--network_module", "train_network"]),
        ("sdxl_train", {"bucket_reso_steps": 8}, ["--bucket_reso_steps", "32"]),
        ("train_db", {"save_model_as": "pt"}, ["--save_model_as", "diffusers"]),
        ("train_db", {"stop_text_encoder_training": -7}, ["--stop_text_encoder_training: -7 is out of range", "-1"]),
    ],
)
def test_mistakes(start, capfd, script, settings, words):
    assert run(script, **start(script) | settings) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert all(word in message for word in words), message


@pytest.mark.parametrize("script", ["fine_tune", "train_db", "sdxl_train"])
def test_a_model_of_the_other_family(start, capfd, script, tiny_sd1_path, tiny_sdxl_path):
    model = tiny_sd1_path if script == "sdxl_train" else tiny_sdxl_path
    assert run(script, **start(script) | {"pretrained_model_name_or_path": model}) == 2
    assert ("fine_tune.py" if script == "sdxl_train" else "sdxl_train.py") in capfd.readouterr().err


@pytest.mark.parametrize("script", ["fine_tune", "train_db", "sdxl_train"])
def test_plan(start, tmp_path, capfd, script):
    """A plan says what is trained and how large the files are, from headers alone."""
    assert run(script, **start(script) | {"plan": True}) == 0
    text = capfd.readouterr().err
    assert "trained: unet" in text and "U-Net weights" in text and "trained parameters" not in text
    assert not (tmp_path / "out" / "net.safetensors").exists()


def test_previews_draw_what_was_learned(start, tmp_path):
    (tmp_path / "prompts.txt").write_text("a disc --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    settings = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 1, "max_train_steps": 2}
    for script in ("train_db", "sdxl_train"):
        folder = tmp_path / script
        assert run(script, **start(script) | settings | {"output_dir": folder, "learning_rate": 1e-2}) == 0
        pictures = sorted(folder.glob("sample/net_0*.png"))
        assert len(pictures) == 2 and pictures[0].read_bytes() != pictures[1].read_bytes()


def test_a_large_model_that_diverges(start, tmp_path, capfd, monkeypatch):
    """No copies are kept in memory: the newest state on the disk is named, and nothing broken is written."""
    monkeypatch.setattr("library.train.run.LARGEST", 0)
    settings = {"max_train_steps": 8, "max_nonfinite_steps": 3, "save_every_n_steps": 1, "save_state": True}
    assert run("train_db", **start("train_db") | settings | {"learning_rate": 1e30}) == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert "3 updates in a row without a finite loss" in message
    states = sorted(path.name for path in (tmp_path / "out").glob("*-state"))
    assert (states[-1] in message) if states else ("no state was saved before" in message)
    assert not (tmp_path / "out" / "net.safetensors").exists()


def test_a_plan_says_when_the_text_encoder_stops(start, tmp_path):
    options = {**start("train_db"), "plan": True}
    assert run("train_db", **options, stop_text_encoder_training=1) == 0
    text = (tmp_path / "out" / "net-plan.txt").read_text(encoding="utf-8")
    assert "text encoder" in text and "trained in the first 1 step, then left as it is" in text
    assert run("train_db", **options, stop_text_encoder_training=9) == 0
    text = (tmp_path / "out" / "net-plan.txt").read_text(encoding="utf-8")
    assert "the text encoder is trained for 9 steps at most, and the run ends after 3" in text


def test_previews_are_not_signed_by_the_base_model(start, tmp_path):
    """What has learned itself is not what the base model's hash names."""
    (tmp_path / "prompts.txt").write_text("a disc --s 1 --w 64 --h 64 --d 1", encoding="utf-8")
    options = {**start("fine_tune"), "sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 3}
    assert run("fine_tune", **options) == 0
    path = min((tmp_path / "out" / "sample").glob("net_*.png"))
    with Image.open(path) as image:
        assert "Model: net" in image.info["parameters"] and "Model hash" not in image.info["parameters"]


def test_a_flag_of_other_scripts_names_those_that_are_here(start, capfd):
    assert run("train_db", **start("train_db"), cache_text_encoder_outputs=True) == 2
    assert "is a flag of sdxl_train.py and sdxl_train_network.py, not of this script" in capfd.readouterr().err


def test_a_frozen_first_layer_does_not_end_the_program(start, tmp_path):
    """torch's group normalisation crashes on pictures with channels last that need no gradient; two make them so."""
    rates = ",".join(["0.001", "0", *["0.001"] * 21])
    options = {**start("sdxl_train"), "max_train_steps": 1, "train_batch_size": 2, "max_bucket_reso": 64}
    assert run("sdxl_train", **options, block_lr=rates) == 0
