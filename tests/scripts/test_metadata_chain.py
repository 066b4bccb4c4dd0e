"""From pictures with captions and tags to a trained model: merge, clean, prepare, fine_tune.py, and what it draws."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fine_tune
from library.families.base import LoadPlan
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.models.build import build_text_encoder, build_unet
from library.models.options import AttentionOptions
from tests.runs import ROOT, logged, run_script, script

NAMES = ("coffee", "flower", "rocket")
LOSS = 0.1  # the mean of the last epoch; a model that has learned nothing has about 1
ALIKE = 0.6  # correlation of a picture drawn and the one it was taught, at 16 x 16 pixels
STEPS = 400


def untaught_model(path: Path) -> Path:
    """The starter model's VAE with a U-Net and a text encoder of random weights."""
    spec = importlib.util.spec_from_file_location("starter_build", ROOT / "starter" / "build.py")
    assert spec is not None and spec.loader is not None
    starter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(starter)
    family, plan = StableDiffusion(), LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    bundle = family.load(ModelOptions(str(ROOT / "starter" / "model.safetensors")), AttentionOptions(), plan)
    torch.manual_seed(0)
    bundle.unet, bundle.text_encoders = build_unet(starter.UNET), (build_text_encoder(starter.TEXT_ENCODER),)
    family.save(bundle, path, dtype=torch.float32, metadata={}, as_diffusers=False)
    return path


def look(picture: Path) -> np.ndarray:
    """What a picture looks like from afar: its middle square in 16 x 16 pixels, without mean and of length 1."""
    with Image.open(picture) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        small = image.convert("RGB").crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BOX)
    values = np.asarray(small, float)
    values -= values.mean()
    return (values / np.linalg.norm(values)).ravel()


def step(name: str, *words: object) -> None:
    done = script(name, *map(str, words))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_from_captions_to_pictures(tmp_path):
    model, pictures = untaught_model(tmp_path / "untaught.safetensors"), tmp_path / "pictures"
    pictures.mkdir()
    for name in NAMES:
        shutil.copy(ROOT / "starter" / "base" / f"{name}.jpg", pictures)
        shutil.copy(ROOT / "starter" / "base" / f"{name}.txt", pictures / f"{name}.caption")
        (pictures / f"{name}.txt").write_text(f"{name}, a_photo, rating:safe\n", encoding="utf-8")
    captions, tags, clean, ready = (tmp_path / f"{stage}.json" for stage in ("captions", "tags", "clean", "ready"))
    step("finetune/merge_captions_to_metadata.py", pictures, captions)
    step("finetune/merge_dd_tags_to_metadata.py", pictures, tags, "--in_json", captions)
    step("finetune/clean_captions_and_tags.py", tags, clean)
    sizes = ("--max_resolution", "128,128", "--min_bucket_reso", "64", "--batch_size", "2")
    step("finetune/prepare_buckets_latents.py", pictures, clean, ready, model, *sizes)
    entries = json.loads(ready.read_text(encoding="utf-8"))
    assert {name: sorted(entry) for name, entry in entries.items()} == dict.fromkeys(
        NAMES, ["caption", "tags", "train_resolution"]
    )
    assert all((pictures / f"{name}.npz").is_file() for name in NAMES)

    code = run_script(fine_tune, {
        "pretrained_model_name_or_path": model, "train_data_dir": pictures, "in_json": ready, "dataset_repeats": 50,
        "output_dir": tmp_path / "out", "output_name": "taught", "save_model_as": "safetensors", "resolution": 128,
        "train_batch_size": 3, "max_train_steps": STEPS, "learning_rate": 1.5e-3, "lr_scheduler": "cosine",
        "lr_warmup_steps": 20, "train_text_encoder": True, "min_snr_gamma": 5, "seed": 1,
        "max_data_loader_n_workers": 0, "logging_dir": tmp_path / "log",
    })  # fmt: skip
    assert code == 0
    loss = logged(tmp_path / "log", "loss/average")[-1]
    prompts = [f"{entries[name]['caption']}, {entries[name]['tags']} --w 128 --h 128 --s 20 --d 1" for name in NAMES]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    options = (
        "--from_file",
        tmp_path / "prompts.txt",
        "--outdir",
        tmp_path / "drawn",
        "--scale",
        "3",
        "--sequential_file_name",
    )
    step("gen_img_diffusers.py", "--ckpt", tmp_path / "out" / "taught.safetensors", *options)
    drawn = [look(path) for path in sorted((tmp_path / "drawn").glob("*.png"))]
    taught = [look(pictures / f"{name}.jpg") for name in NAMES]
    alike = np.array([[one @ other for other in taught] for one in drawn])
    print(f"loss {loss:.3f}, correlations of drawn (rows) and taught (columns)\n{alike.round(2)}")
    assert loss < LOSS
    assert (alike.argmax(axis=1) == np.arange(len(NAMES))).all() and alike.diagonal().min() > ALIKE
