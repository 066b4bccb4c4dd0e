"""What a model is, and one clear sentence for everything that is no SD 1.x / 2.x model."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.probe import check_vae, probe
from library.checkpoints.weights import open_weights
from library.families.base import LoadPlan
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from library.options import OptionError

UNET = "model.diffusion_model."
FLAG = "--pretrained_model_name_or_path"


def load(path: Path | str, **options):
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return StableDiffusion().load(ModelOptions(str(path), **options), AttentionOptions(), plan)


def changed(source: Path, path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    save_file({**load_file(source), **tensors}, path, metadata)
    return path


def folder_of(path: Path, folder: Path) -> Path:
    StableDiffusion().save(load(path), folder, dtype=None, metadata={}, as_diffusers=True)
    return folder


# -------------------------------------------------------------------------------------------- findings


def test_kinds_of_files_and_folders(tiny_sd1_path: Path, tiny_sd2_path: Path, tmp_path: Path):
    for path, kind, is_v in ((tiny_sd1_path, "sd1", False), (tiny_sd2_path, "sd2", True)):
        source = probe(str(path))
        assert (source.kind, source.is_single_file, source.v_prediction) == (kind, True, is_v)
        source = probe(str(folder_of(path, tmp_path / kind)))
        assert (source.kind, source.is_single_file, source.v_prediction) == (kind, False, is_v)


@pytest.mark.parametrize(
    ("metadata", "is_v"),
    [
        ({"modelspec.prediction_type": "v"}, True),
        ({"modelspec.prediction_type": "v_prediction"}, True),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, True),
        ({"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"}, False),
        ({"modelspec.prediction_type": "epsilon"}, False),
        (None, False),
    ],
)
def test_v_prediction_from_metadata(metadata: dict | None, is_v: bool, tiny_sd1_path: Path, tmp_path: Path):
    path = changed(tiny_sd1_path, tmp_path / "model.safetensors", metadata)
    assert probe(str(path)).v_prediction == is_v
    assert load(path, v_parameterization=True).source.v_prediction


def test_probe_of_a_safetensors_file_imports_no_torch(tiny_sd1_path: Path):
    code = (
        "import sys; from library.checkpoints.probe import check_vae, probe; "
        f"assert probe({str(tiny_sd1_path)!r}).kind == 'sd1'; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_source_keeps_the_path_as_given(tiny_sd1_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_sd1_path.parent)
    assert load(tiny_sd1_path.name).source.path == tiny_sd1_path.name


def test_link_to_a_model(tiny_sd1_path: Path, tmp_path: Path):
    """Hub caches store models as links to files without an extension."""
    blob = tmp_path / "0123abcd"
    blob.write_bytes(tiny_sd1_path.read_bytes())
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert probe(str(tmp_path / "model.safetensors")).kind == "sd1"


# -------------------------------------------------------------------------------------------- refusals


def refusal(path: Path | str, **options) -> str:
    """The sentence both probe and load answer with."""
    with pytest.raises(OptionError) as probed:
        probe(str(path), **options)
    with pytest.raises(OptionError) as loaded:
        load(path, **options)
    assert str(loaded.value) == str(probed.value)
    return str(probed.value)


def test_missing_file(tmp_path: Path):
    path = tmp_path / "no" / "model.safetensors"
    assert refusal(path) == f"{FLAG}: {path} does not exist; check the path"
    assert "does not exist" in refusal("models/none.safetensors")


def test_v2_flag_on_an_sd1_model(tiny_sd1_path: Path, tmp_path: Path):
    assert refusal(tiny_sd1_path, v2=True) == f"--v2: the model {tiny_sd1_path} is SD 1.x; remove the flag"
    assert "is SD 1.x; remove the flag" in refusal(folder_of(tiny_sd1_path, tmp_path / "folder"), v2=True)


def test_v2_flag_on_an_sd2_model(tiny_sd2_path: Path):
    assert load(tiny_sd2_path, v2=True).source == load(tiny_sd2_path).source


def test_sdxl_file_names_the_right_script(tmp_path: Path):
    path = tmp_path / "xl.safetensors"
    save_file({f"{UNET}label_emb.0.0.weight": torch.zeros(1), "conditioner.embedders.0.x": torch.zeros(1)}, path)
    assert refusal(path) == f"{FLAG}: {path} is an SDXL model; use sdxl_train_network.py"
    with pytest.raises(OptionError, match="^--ckpt: .* is an SDXL model; use sdxl_gen_img.py$"):
        probe(str(path), flag="--ckpt", sdxl_script="sdxl_gen_img.py")


def test_sdxl_folder(tmp_path: Path):
    (tmp_path / "text_encoder_2").mkdir()
    assert "it has no unet/config.json" in refusal(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert "is an SDXL model" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["lora_unet_down_blocks_0.lora_down.weight", "unet.x.lora_A.weight", "lora_te_x.alpha"])
def test_lora_given_as_model(key: str, tmp_path: Path):
    save_file({key: torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "is a LoRA, not a base model; give it as --network_weights" in refusal(tmp_path / "lora.safetensors")


def test_file_without_a_unet(tmp_path: Path):
    save_file({"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    assert "is no Stable Diffusion model: it holds no U-Net" in refusal(tmp_path / "vae.safetensors")


def test_truncated_model(tiny_sd1_path: Path, tmp_path: Path):
    content = tiny_sd1_path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "cut.safetensors is truncated" in refusal(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("name", ["page.safetensors", "page.ckpt", "page"])
def test_text_given_as_model(name: str, tmp_path: Path):
    (tmp_path / name).write_text("<html>404</html>" * 50)
    assert "is no" in refusal(tmp_path / name) and str(tmp_path / name) in refusal(tmp_path / name)


def test_inpainting_model(tiny_sd1_path: Path, tmp_path: Path):
    stem = {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    path = changed(tiny_sd1_path, tmp_path / "inpaint.safetensors", **stem)
    assert "is an inpainting model: its U-Net takes 9 channels, not 4" in refusal(path)


def test_unclip_model(tiny_sd2_path: Path, tmp_path: Path):
    layers = {"0.0": (256, 64), "0.2": (256, 256)}
    vector = {f"{UNET}label_emb.{name}.weight": torch.zeros(shape) for name, shape in layers.items()}
    path = changed(tiny_sd2_path, tmp_path / "unclip.safetensors", **vector)
    assert "is an unCLIP model, which also takes a picture; use the plain model" in refusal(path)


def test_incomplete_model(tiny_sd1_path: Path, tmp_path: Path):
    content = load_file(tiny_sd1_path)
    save_file({k: t for k, t in content.items() if "cond_stage" not in k}, tmp_path / "no_text.safetensors")
    assert "is no complete SD 1.x model: it has no text encoder" in refusal(tmp_path / "no_text.safetensors")
    save_file({k: t for k, t in content.items() if "first_stage" not in k}, tmp_path / "no_vae.safetensors")
    with pytest.raises(OptionError, match="name a VAE with --vae"):
        load(tmp_path / "no_vae.safetensors")
    content.pop(f"{UNET}output_blocks.5.1.norm.bias")
    save_file(content, tmp_path / "hole.safetensors")
    with pytest.raises(OptionError, match=r"lacks 1 tensors of the U-Net \(model.*output_blocks.5.1.norm.bias\)"):
        load(tmp_path / "hole.safetensors")


def test_folder_that_is_no_model(tmp_path: Path, tiny_sd1_path: Path):
    assert "is no Diffusers model: it has no unet/config.json" in refusal(tmp_path)
    folder = folder_of(tiny_sd1_path, tmp_path / "folder")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OptionError, match="holds no diffusion_pytorch_model.safetensors"):
        load(folder)
    (folder / "text_encoder" / "config.json").write_text("{broken")
    assert "is no valid JSON" in refusal(folder)
    (folder / "text_encoder" / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


def test_nothing_touches_the_network(tiny_sd1_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(tiny_sd1_path, tmp_path / "folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for path in (tiny_sd1_path, folder):
        bundle = load(path, vae=str(tiny_sd1_path))
        StableDiffusion().tokenize(bundle.tokenizers, ["a cat"], 1)
        StableDiffusion().save(bundle, tmp_path / "out", dtype=None, metadata={}, as_diffusers=True)


def test_hub_id_without_a_network():
    """The test session is offline; an id that is nowhere on this machine gets one sentence."""
    assert "nobody/no-such-model is no file or folder here" in refusal("nobody/no-such-model")


def test_hub_id_that_is_in_the_hub_cache(tiny_sd1_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "models--somebody--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    folder_of(tiny_sd1_path, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    bundle = load("somebody/tiny")
    assert (bundle.source.path, bundle.source.is_single_file) == ("somebody/tiny", False)
    assert torch.equal(bundle.unet.conv_in.weight, load(tiny_sd1_path).unet.conv_in.weight)


def test_bad_vae(tiny_sd1_path: Path, tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    refusals = {
        "none.pt": "^--vae: .*none.pt does not exist",
        "x.safetensors": "^--vae: .*x.safetensors is no VAE of Stable Diffusion",
        ".": "^--vae: .*config.json is missing",
    }
    for name, sentence in refusals.items():
        with pytest.raises(OptionError, match=sentence):
            check_vae(str(tmp_path / name))
        with pytest.raises(OptionError, match=sentence):
            load(tiny_sd1_path, vae=str(tmp_path / name))


# -------------------------------------------------------------------------------------------- pickles


def run_by_a_file(*words: object) -> None:
    raise SystemExit("code of the file was run")


class Foreign:
    """An object of a program that is not installed."""

    def __reduce__(self):
        return run_by_a_file, ("now",)


class Worse:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


def test_pickle_with_foreign_objects_is_read_without_running_them(tmp_path: Path):
    weight = torch.ones(2, dtype=torch.float16)
    content = {"epoch": 3, "callbacks": {Foreign: Foreign()}, "state_dict": OrderedDict(w=weight, note="text")}
    torch.save(content, tmp_path / "a.ckpt")
    weights = open_weights(tmp_path / "a.ckpt")
    assert weights.shapes == {"w": (2,)} and weights.dtypes == {"w": "F16"} and weights.extra == {"epoch": 3}
    assert torch.equal(weights.tensor("w"), weight)


def test_pickle_before_pytorch_1_6(tmp_path: Path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(open_weights(tmp_path / "old.ckpt").tensor("w"), torch.ones(2))
    torch.save({"w": Foreign()}, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(OptionError, match="can't be read safely; convert it to .safetensors"):
        open_weights(tmp_path / "bad.ckpt")


@pytest.mark.parametrize("is_new", [True, False])
def test_pickle_that_calls_python_itself_is_refused(is_new: bool, tmp_path: Path):
    torch.save({"w": torch.ones(2), "x": Worse()}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=is_new)
    with pytest.raises(OptionError, match=r"holds code that would run when it is loaded \((builtins\.)?exec\)"):
        open_weights(tmp_path / "a.ckpt")


def test_damaged_pickle(tmp_path: Path, tiny_sd1_path: Path):
    torch.save({"state_dict": load_file(tiny_sd1_path)}, tmp_path / "a.ckpt")
    content = (tmp_path / "a.ckpt").read_bytes()
    assert probe(str(tmp_path / "a.ckpt")).kind == "sd1"
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    assert "cut.ckpt is damaged or truncated; copy or download it again" in refusal(tmp_path / "cut.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "holds no dictionary of tensors" in refusal(tmp_path / "list.ckpt")
