"""One clear sentence for everything that is no SDXL base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.probe import probe
from library.options import OptionError
from tests.sdxl_files import load, rewritten, save

UNET = "model.diffusion_model."
CLIP = "conditioner.embedders.0.transformer."
OPENCLIP = "conditioner.embedders.1.model."


def refusal(path: Path | str, **options) -> str:
    """The sentence both probe and load answer with."""
    with pytest.raises(OptionError) as probed:
        probe(str(path), family="sdxl", **options)
    with pytest.raises(OptionError) as loaded:
        load(path, **options)
    assert str(loaded.value) == str(probed.value)
    return str(probed.value)


def changed(source: Path, path: Path, **tensors: torch.Tensor) -> Path:
    save_file({**load_file(source), **tensors}, path)
    return path


def test_models_of_the_other_family(tiny_sd1_path: Path, tiny_sdxl_path: Path, tmp_path: Path):
    assert f"{tiny_sd1_path} is an SD 1.x model; use train_network.py" in refusal(tiny_sd1_path)
    with pytest.raises(OptionError, match="is an SD 1.x model; use gen_img_diffusers.py$"):
        probe(str(tiny_sd1_path), family="sdxl", sd_script="gen_img_diffusers.py")
    for path in (tiny_sdxl_path, save(load(tiny_sdxl_path), tmp_path / "folder")):
        with pytest.raises(OptionError, match="is an SDXL model; use sdxl_gen_img.py$"):
            probe(str(path), sdxl_script="sdxl_gen_img.py")
    assert "is SDXL; remove the flag" in refusal(tiny_sdxl_path, v2=True)


def test_refiner(tiny_sdxl_path: Path, tmp_path: Path):
    def as_refiner(name: str) -> str:
        return "" if name.startswith(CLIP) else name.replace("embedders.1.", "embedders.0.")

    path = rewritten(tiny_sdxl_path, tmp_path / "refiner.safetensors", as_refiner)
    assert "is the SDXL refiner, which can't be trained here; use an SDXL base model" in refusal(path)
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 1280}))
    assert "is the SDXL refiner" in refusal(folder)


def test_inpainting_model(tiny_sdxl_path: Path, tmp_path: Path):
    stem = {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    path = changed(tiny_sdxl_path, tmp_path / "inpaint.safetensors", **stem)
    assert "is an inpainting model: its U-Net takes 9 channels, not 4" in refusal(path)
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    assert "is an inpainting model" in refusal(folder)


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_models_with_another_noise_schedule(key: str, tiny_sdxl_path: Path, tmp_path: Path):
    path = changed(tiny_sdxl_path, tmp_path / "edm.safetensors", **{key: torch.zeros(1)})
    assert "was trained with an EDM noise schedule" in refusal(path)
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "EDMDPMSolverMultistepScheduler"}))
    assert "was trained with an EDM noise schedule" in refusal(folder)


def test_incomplete_models(tiny_sdxl_path: Path, tmp_path: Path):
    for i, prefix in enumerate((CLIP, OPENCLIP)):
        path = rewritten(
            tiny_sdxl_path, tmp_path / f"{i}.safetensors", lambda n, prefix=prefix: "" if n.startswith(prefix) else n
        )
        assert "is no complete SDXL model: it lacks SDXL's two text encoders" in refusal(path)
    alone = rewritten(tiny_sdxl_path, tmp_path / "unet.safetensors", lambda n: n if n.startswith(UNET) else "")
    assert "is no complete SDXL model: it lacks SDXL's two text encoders" in refusal(alone)
    path = rewritten(
        tiny_sdxl_path, tmp_path / "unprojected.safetensors", lambda name: "" if "text_projection" in name else name
    )
    assert f"the tensor {OPENCLIP}text_projection is missing" in refusal(path)
    narrow = {f"{OPENCLIP}text_projection": torch.zeros(128, 64)}
    path = changed(tiny_sdxl_path, tmp_path / "narrow.safetensors", **narrow)
    assert "its U-Net takes a vector of 1664 numbers, not 64 + 6 x 256" in refusal(path)
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    (folder / "text_encoder_2" / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)
