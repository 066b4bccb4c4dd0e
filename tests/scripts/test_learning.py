"""That training teaches: a LoRA on the starter pictures, measured on noise it never saw."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.images import to_tensor
from library.diffusion.schedule import NoiseSchedule
from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions, TextOptions
from library.families.sd import StableDiffusion
from library.models import vae
from library.models.options import AttentionOptions
from networks.lora import create_network_from_weights
from tests.runs import ROOT, train_network

MODEL = ROOT / "starter" / "model.safetensors"
PHOTOS = sorted((ROOT / "starter" / "photos").glob("*/*.jpg"))
TIMESTEPS = (100, 300, 500, 700, 900)
MARGIN = 0.4  # at most this share of the base model's loss is left after 200 steps
FAMILY = StableDiffusion()


def load() -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(MODEL)), AttentionOptions(), plan)


@torch.no_grad()
def predictions(bundle: ModelBundle, noised_BCHW, timesteps_B, captions) -> torch.Tensor:
    token_ids = FAMILY.tokenize(bundle.tokenizers, captions, 1).ids
    conditioning = FAMILY.encode_text(bundle.text_encoders, token_ids, TextOptions())
    return FAMILY.predict(bundle.unet, noised_BCHW, timesteps_B, conditioning)


@torch.no_grad()
def held_out_batches(bundle: ModelBundle):
    """Every training picture at fixed timesteps with noise from a seed that training does not use."""
    generator, schedule = torch.Generator().manual_seed(987_654_321), NoiseSchedule.make()
    for path in PHOTOS:
        with Image.open(path) as photo:
            side = min(photo.size)
            left, top = (photo.width - side) // 2, (photo.height - side) // 2
            square = photo.convert("RGB").crop((left, top, left + side, top + side)).resize((128, 128))
        image = to_tensor(np.asarray(square))[None]
        latents = vae.encode(bundle.vae, image, torch.zeros(1, 4, 16, 16)) * FAMILY.latent_scale
        latents = latents.repeat(len(TIMESTEPS), 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.tensor(TIMESTEPS)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        yield schedule.add_noise(latents, noise, timesteps), timesteps, [caption] * len(TIMESTEPS), noise


def held_out_loss(bundle: ModelBundle) -> float:
    losses = [
        (predictions(bundle, noised, timesteps, captions) - noise).square().mean()
        for noised, timesteps, captions, noise in held_out_batches(bundle)
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
