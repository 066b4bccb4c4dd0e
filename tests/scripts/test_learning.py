"""That training teaches, and what it keeps: on the starter pictures, measured on noise that training never saw."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_db
from library.data.images import to_tensor
from library.diffusion.schedule import NoiseSchedule
from library.families.base import LoadPlan, ModelBundle, PictureSizes
from library.families.options import ModelOptions, TextOptions
from library.families.sd import StableDiffusion
from library.models import vae
from library.models.options import AttentionOptions
from networks.lora import create_network_from_weights
from tests.runs import ROOT, run_script, train_network

MODEL = ROOT / "starter" / "model.safetensors"
PHOTOS = sorted((ROOT / "starter" / "photos").glob("*/*.jpg"))
TIMESTEPS = (100, 300, 500, 700, 900)
MARGIN = 0.4  # at most this share of the base model's loss is left after 200 steps
FAMILY = StableDiffusion()


def load(model: Path = MODEL) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(model)), AttentionOptions(), plan)


@torch.no_grad()
def predictions(bundle: ModelBundle, noised_BCHW, timesteps_B, captions) -> torch.Tensor:
    token_ids = FAMILY.tokenize(bundle.tokenizers, captions, 1).ids
    text = FAMILY.encode_text(bundle.text_encoders, token_ids, TextOptions())
    conditioning = FAMILY.condition(text, PictureSizes.whole(0, 0, len(captions), noised_BCHW.device))
    return FAMILY.predict(bundle.unet, noised_BCHW, timesteps_B, conditioning)


@torch.no_grad()
def held_out_batches(bundle: ModelBundle, photos: Sequence[Path] = PHOTOS, caption: str | None = None):
    """Every photo at fixed timesteps with noise that training does not use; captions beside them, or one for all."""
    generator, schedule = torch.Generator().manual_seed(987_654_321), NoiseSchedule.make()
    for path in photos:
        with Image.open(path) as photo:
            side = min(photo.size)
            left, top = (photo.width - side) // 2, (photo.height - side) // 2
            square = photo.convert("RGB").crop((left, top, left + side, top + side)).resize((128, 128))
        image = to_tensor(np.asarray(square))[None]
        latents = vae.encode(bundle.vae, image, torch.zeros(1, 4, 16, 16)) * FAMILY.latent_scale
        latents = latents.repeat(len(TIMESTEPS), 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.tensor(TIMESTEPS)
        text = caption or path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        yield schedule.add_noise(latents, noise, timesteps), timesteps, [text] * len(TIMESTEPS), noise


def held_out_loss(bundle: ModelBundle, photos: Sequence[Path] = PHOTOS, caption: str | None = None) -> float:
    losses = [
        (predictions(bundle, noised, timesteps, captions) - noise).square().mean()
        for noised, timesteps, captions, noise in held_out_batches(bundle, photos, caption)
    ]
    return float(torch.stack(losses).mean())


@pytest.mark.slow
def test_200_steps_lower_the_loss_on_held_out_noise(tmp_path):
    before = held_out_loss(load())
    code = train_network(
        config_file=ROOT / "starter" / "train.toml", pretrained_model_name_or_path=MODEL, output_dir=tmp_path,
        dataset_config=ROOT / "starter" / "dataset.toml", output_name="lora", max_train_steps=200,
        logging_dir=tmp_path / "log",
    )  # fmt: skip
    assert code == 0

    applied, merged = load(), load()
    for bundle, is_merged in ((applied, False), (merged, True)):
        network, weights = create_network_from_weights(
            1.0,
            str(tmp_path / "lora.safetensors"),
            bundle.vae,
            bundle.text_encoders[0],
            bundle.unet,
            for_inference=True,
        )
        if is_merged:
            network.merge_to(bundle.text_encoders[0], bundle.unet, weights, torch.float32, torch.device("cpu"))
        else:
            network.apply_to(bundle.text_encoders[0], bundle.unet)
            network.load_state_dict(weights, strict=False)
    after = held_out_loss(applied)
    print(f"loss on held-out noise: {before:.4f} before, {after:.4f} after 200 steps ({after / before:.0%})")
    assert after < MARGIN * before

    for noised, timesteps, captions, _ in random.Random(1).sample(list(held_out_batches(applied)), 2):
        first, second = (predictions(bundle, noised, timesteps, captions) for bundle in (applied, merged))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_regularisation_pictures_keep_the_class(tmp_path):
    """DreamBooth of a cat as "sks raccoon": what was known of raccoons is kept with their picture, lost without."""
    data, reg = tmp_path / "data", tmp_path / "reg"
    shutil.copytree(PHOTOS[0].parent, data / "1_sks raccoon", ignore=shutil.ignore_patterns("*.txt"))
    (reg / "1_raccoon").mkdir(parents=True)
    for extension in ("jpg", "txt"):
        shutil.copy(ROOT / "starter" / "base" / f"raccoon.{extension}", reg / "1_raccoon")
    raccoon = [ROOT / "starter" / "base" / "raccoon.jpg"]
    subject = {"before": held_out_loss(load(), PHOTOS, "sks raccoon")}
    known = {"before": held_out_loss(load(), raccoon)}
    for name, reg_data_dir in (("without", None), ("with", reg)):
        code = run_script(train_db, {
            "pretrained_model_name_or_path": MODEL, "train_data_dir": data, "reg_data_dir": reg_data_dir,
            "output_dir": tmp_path / name, "output_name": "model", "save_model_as": "safetensors", "resolution": 128,
            "train_batch_size": 2, "max_train_steps": 60, "learning_rate": 5e-4, "seed": 1, "cache_latents": True,
            "max_data_loader_n_workers": 0,
        })  # fmt: skip
        assert code == 0
        trained = load(tmp_path / name / "model.safetensors")
        subject[name], known[name] = held_out_loss(trained, PHOTOS, "sks raccoon"), held_out_loss(trained, raccoon)
    print(f"subject {subject}, class {known}")
    assert max(subject["with"], subject["without"]) < 0.5 * subject["before"], "both learned the subject"
    assert known["without"] > 3 * known["before"], "which costs the class"
    assert known["with"] < 0.5 * known["without"], "unless its picture is shown beside"
