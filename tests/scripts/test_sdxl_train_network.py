"""sdxl_train_network.py end to end on a tiny model: golden losses, files, caches of text, rates, previews, mistakes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import equal_files, in_two_processes, logged, metadata_of, sdxl_train_network
from tests.scripts.conftest import short_run
from tests.tiny_models import tiny_sdxl_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden_losses_sdxl_train_network.json"
CACHED = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}
VARIED = {"shuffle_caption": True, "caption_dropout_rate": 0.3, "text_variations": 3}


@pytest.fixture
def options(tmp_path, images, tiny_sdxl_path):
    return short_run(tmp_path, images, tiny_sdxl_path)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, images, tiny_sdxl_path):
    folder = tmp_path_factory.mktemp("plain")
    assert sdxl_train_network(**short_run(folder, images, tiny_sdxl_path)) == 0
    return folder / "out" / "net.safetensors"


def last_line(capfd) -> str:
    return capfd.readouterr().err.splitlines()[-1]


def difference(first: Path, second: Path) -> float:
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


GOLDEN_RUNS = {
    "epsilon": {},
    "conv-LoRA, blocks": {"network_args": ["conv_dim=2", f"block_dims={','.join(['3'] * 23)}"], "noise_offset": 0.1},
    "v-prediction, zero terminal SNR": {"v_prediction": True, "zero_terminal_snr": True},
    "cached text": {**CACHED, **VARIED},
}


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_golden_losses(options, tmp_path, name):
    """Three steps' losses as stored; made by running this test with GOLDEN_UPDATE=1."""
    settings = dict(GOLDEN_RUNS[name])
    if settings.pop("v_prediction", False):  # both are found in the file
        del settings["zero_terminal_snr"]
        model = tiny_sdxl_checkpoint(tmp_path / "v.safetensors", v_prediction=True, zero_terminal_snr=True)
        options["pretrained_model_name_or_path"] = model
    assert sdxl_train_network(**{**options, **settings}, logging_dir=tmp_path / "log") == 0
    losses = logged(tmp_path / "log", "loss/current")
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN_UPDATE"):
        stored[name] = losses
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    assert losses == pytest.approx(stored[name], rel=1e-4)
    assert len(losses) == 3


# ---------------------------------------------------------------------------------------------- files


def test_files_and_metadata(plain_run):
    tensors, metadata = load_file(plain_run), metadata_of(plain_run)
    modules = {name.partition(".")[0] for name in tensors}
    assert {"_".join(name.split("_")[:2]) for name in modules} == {"lora_te1", "lora_te2", "lora_unet"}
    assert "lora_unet_input_blocks_4_1_proj_in" in modules and not any("down_blocks" in name for name in modules)
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "ss_network_module": "networks.lora",
        "ss_text_encoder_lr": "None", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected


def test_everything_reached_is_trained(plain_run):
    tensors = load_file(plain_run)
    untouched = {name for name, tensor in tensors.items() if "lora_up" in name and not tensor.any()}
    # the first encoder's last layer conditions nothing; at 64 px self-attention in the middle sees few positions
    assert all("lora_te1" in name and "layers_1" in name or "attn1_to_" in name for name in untouched)
    assert any("lora_te1" in name for name in untouched)


def test_v_prediction_of_a_file_is_in_the_metadata(options, tmp_path):
    options["pretrained_model_name_or_path"] = tiny_sdxl_checkpoint(tmp_path / "v.safetensors", v_prediction=True)
    assert sdxl_train_network(**{**options, "max_train_steps": 1}) == 0
    assert metadata_of(tmp_path / "out" / "net.safetensors")["modelspec.prediction_type"] == "v"


def test_a_rate_for_each_text_encoder(options, tmp_path, plain_run):
    settings = {"text_encoder_lr": [0.0, 1e-3], "logging_dir": tmp_path / "log"}
    assert sdxl_train_network(**options, **settings) == 0
    file = tmp_path / "out" / "net.safetensors"
    tensors = load_file(file)
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_te1" in name and "lora_up" in name)
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_te2" in name and "lora_up" in name)
    assert metadata_of(file)["ss_text_encoder_lr"] == "[0.0, 0.001]"
    assert logged(tmp_path / "log", "lr/textencoder2") == pytest.approx([1e-3] * 3)
    again = {**options, "output_dir": tmp_path / "again"}
    assert sdxl_train_network(**again, text_encoder_lr=[1e-3, 1e-3]) == 0
    assert equal_files(plain_run, tmp_path / "again" / "net.safetensors"), "as one rate"


def test_block_learning_rates(options, tmp_path):
    """A block of weight 0 gets no modules."""
    weights = ["down_lr_weight=0,0,0,0,1,1,1,1,1", "mid_lr_weight=1,1,1", f"up_lr_weight={','.join(['0'] * 9)}"]
    assert sdxl_train_network(**options, network_args=weights, network_train_unet_only=True) == 0
    modules = {name.partition(".")[0] for name in load_file(tmp_path / "out" / "net.safetensors")}
    blocks = {"_".join(name.split("_")[2:5]) for name in modules}
    assert blocks == {"input_blocks_4", "input_blocks_5", "input_blocks_7", "input_blocks_8", "middle_block_1"}


# ---------------------------------------------------------------------------------------------- caches of text


def test_cached_text_is_the_text(options, tmp_path, images):
    """Memory, disk, and disk the second time: what is trained is the same; without a cache it is, to rounding."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    runs = {
        "plain": {"network_train_unet_only": True},
        "memory": CACHED,
        "disk": {**CACHED, "cache_text_encoder_outputs_to_disk": True},
        "again": {**CACHED, "cache_text_encoder_outputs_to_disk": True},
    }
    files = {}
    for name, settings in runs.items():
        changed = {**options, "output_dir": tmp_path / name, "train_data_dir": data, **settings}
        assert sdxl_train_network(**changed) == 0
        files[name] = tmp_path / name / "net.safetensors"
    assert len(list(data.rglob("*_te_outputs.npz"))) == 6
    assert equal_files(files["memory"], files["disk"]) and equal_files(files["disk"], files["again"])
    assert difference(files["plain"], files["memory"]) < 1e-4


def test_versions_of_captions_change_what_is_learned(options, tmp_path):
    for name, settings in (("one", CACHED), ("several", {**CACHED, **VARIED})):
        assert sdxl_train_network(**{**options, "output_dir": tmp_path / name}, **settings) == 0
    assert difference(tmp_path / "one" / "net.safetensors", tmp_path / "several" / "net.safetensors") > 1e-5


def test_validation_with_cached_text(options, tmp_path):
    settings = {**CACHED, "validation_split": 0.3, "logging_dir": tmp_path / "log"}
    assert sdxl_train_network(**options, **settings) == 0
    assert len(logged(tmp_path / "log", "loss/validation")) >= 2


@pytest.mark.parametrize("settings", [{}, {**CACHED, **VARIED, "cache_latents": True}], ids=["plain", "cached"])
def test_resume_ends_in_the_same_weights(options, tmp_path, settings):
    options |= {"max_train_steps": 7, "lr_scheduler": "cosine", "flip_aug": True, "network_dropout": 0.1, **settings}
    assert sdxl_train_network(**options, save_every_n_steps=3, save_state=True) == 0
    state = tmp_path / "out" / "net-step00000003-state"
    assert sdxl_train_network(**{**options, "output_dir": tmp_path / "again"}, resume=state) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")


@pytest.mark.parametrize("how", ["text trained", "text cached"])
def test_two_processes_equal_one(options, tmp_path, images, how):
    """2 processes x batch 1 = 1 process x batch 2, with text encoders that are trained and with cached captions."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    options |= {"train_data_dir": data, "resolution": 256, "max_bucket_reso": 256, "optimizer_type": "SGDNesterov"}
    options |= {"learning_rate": 0.1, "text_encoder_lr": [0.1, 0.2]} if how == "text trained" else CACHED
    one = {**options, "logging_dir": tmp_path / "log1", "output_dir": tmp_path / "one"}
    assert sdxl_train_network(**one) == 0
    two = {**options, "train_batch_size": 1, "logging_dir": tmp_path / "log2", "output_dir": tmp_path / "two"}
    on_disk = {"cache_text_encoder_outputs_to_disk": how == "text cached"}  # by both, each its share
    in_two_processes("sdxl_train_network.py", **two, **on_disk)
    assert len(list(data.rglob("*_te_outputs.npz"))) == 6 * (how == "text cached")
    losses = [logged(tmp_path / name, "loss/current") for name in ("log1", "log2")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    first, second = (load_file(tmp_path / name / "net.safetensors") for name in ("one", "two"))
    distance = sum((first[name] - second[name]).square().sum() for name in first).sqrt()
    length = sum(first[name].square().sum() for name in first if "lora_up" in name).sqrt()
    assert distance < 1e-3 * length, "the same training up to rounding"


# ---------------------------------------------------------------------------------------------- other options


def test_gradient_checkpointing_workers_and_low_memory(options, tmp_path, plain_run):
    for name, settings in (("checkpointing", {"gradient_checkpointing": True}), ("workers", {})):
        workers = 2 * (name == "workers")
        changed = {**options, "output_dir": tmp_path / name, "max_data_loader_n_workers": workers}
        assert sdxl_train_network(**changed, **settings) == 0
        assert equal_files(plain_run, tmp_path / name / "net.safetensors"), name


VARIATIONS = {
    "max_token_length": {"max_token_length": 150},
    "mixed_precision": {"mixed_precision": "bf16"},
    "fp8_base": {"fp8_base": True, "mixed_precision": "bf16"},
    "no_half_vae": {"no_half_vae": True, "mixed_precision": "bf16"},
    "v_parameterization": {"v_parameterization": True},
    "shuffle_caption": {"shuffle_caption": True},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_options_change_what_is_learned(options, tmp_path, plain_run, name):
    assert sdxl_train_network(**options, **VARIATIONS[name]) == 0
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert difference(plain_run, tmp_path / "out" / "net.safetensors") > 1e-7


@pytest.mark.parametrize("settings", [{}, CACHED], ids=["plain", "cached text"])
def test_previews(options, tmp_path, settings):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a disc --n square --d 7 --s 2\na (cat:1.3) BREAK a dog --s 2\n")
    assert sdxl_train_network(**options, **settings) == 0
    with_previews = {**options, "output_dir": tmp_path / "drawn", "sample_prompts": prompts}
    assert sdxl_train_network(**with_previews, sample_every_n_steps=2, **settings) == 0
    assert len(list((tmp_path / "drawn" / "sample").glob("net_000002_*.png"))) == 2
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "drawn" / "net.safetensors")


def test_plan_of_a_run_with_cached_text(options, tmp_path, capfd):
    assert sdxl_train_network(**options, plan=True) == 0
    plain = capfd.readouterr().err
    assert sdxl_train_network(**options, **CACHED, plan=True) == 0
    cached = capfd.readouterr().err
    assert "SDXL, predicts noise" in plain
    assert "text encoder weights" in plain and "text encoder weights" not in cached


def test_debug_dataset(options, tmp_path):
    assert sdxl_train_network(**options, debug_dataset=True) == 0
    assert (tmp_path / "out" / "net-dataset" / "samples.csv").is_file()


def test_lycoris_files_have_the_names_of_the_trade(options, tmp_path):
    pytest.importorskip("lycoris")
    settings = {"network_module": "lycoris.kohya", "network_args": ["algo=lora", "conv_dim=2"]}
    assert sdxl_train_network(**{**options, **settings}) == 0
    file = tmp_path / "out" / "net.safetensors"
    names = {name.partition(".")[0] for name in load_file(file)}
    assert "lora_unet_input_blocks_4_1_proj_in" in names and "lora_unet_output_blocks_2_2_conv" in names
    assert not any("down_blocks" in name for name in names)
    again = {**options, **settings, "output_dir": tmp_path / "again", "network_weights": file}
    assert sdxl_train_network(**again) == 0


# ---------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "text encoders trained": ({"cache_text_encoder_outputs": True}, "add --network_train_unet_only"),
    "shuffled captions": ({**CACHED, "shuffle_caption": True}, "add --text_variations 10"),
    "growing captions": ({**CACHED, "token_warmup_step": 5, "text_variations": 3}, "token_warmup_step"),
    "captions of a class": ({**CACHED, "dataset_class": "some.Class"}, "contradicts --dataset_class some.Class"),
    "bucket steps": ({"bucket_reso_steps": 48}, "--bucket_reso_steps: 48 is not a multiple of 32"),
    "v2": ({"v2": True}, "--v2: the model"),
    "three rates": ({"text_encoder_lr": [1, 2, 3]}, "--text_encoder_lr"),
    "a negative rate": ({"text_encoder_lr": [1e-4, -1e-4]}, "--text_encoder_lr: -0.0001 is negative"),
    "too many blocks": ({"network_args": [f"block_dims={','.join(['4'] * 25)}"]}, "SDXL U-Net has 23 blocks"),
    "no versions": ({**CACHED, "text_variations": -1}, "--text_variations: -1 is out of range; use 1 or more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(options, capfd, name):
    settings, sentence = MISTAKES[name]
    capfd.readouterr()
    assert sdxl_train_network(**{**options, **settings}) == 2
    assert sentence in last_line(capfd)


def test_models_of_the_other_family(options, tiny_sd1_path, capfd):
    assert sdxl_train_network(**{**options, "pretrained_model_name_or_path": tiny_sd1_path}) == 2
    assert "is an SD 1.x model; use train_network.py" in last_line(capfd)


def test_settings_without_effect_are_named(options, capfd, plain_run, tmp_path):
    settings = {"clip_skip": 2, "text_variations": 3, "disable_mmap_load_safetensors": True}
    assert sdxl_train_network(**options, **settings) == 0
    said = capfd.readouterr().err
    for sentence in ("--clip_skip has no effect", "--text_variations has no effect", "--disable_mmap_load_safetensors"):
        assert sentence in said
    assert equal_files(plain_run, tmp_path / "out" / "net.safetensors")


def test_several_rates_for_a_module_that_takes_one(options, capfd):
    pytest.importorskip("lycoris")
    settings = {"network_module": "lycoris.kohya", "text_encoder_lr": [1e-4, 1e-5]}
    assert sdxl_train_network(**{**options, **settings}) == 2
    assert "take one rate for all text encoders" in last_line(capfd)
    assert torch.is_grad_enabled()
