"""Builds the starter model: Stable Diffusion 1.x with every width small, trained in less than an hour on one core.

    python starter/build.py --work FOLDER

It learns to draw the six photographs of `starter/base` for their captions. It is never told of the subject of
`starter/photos`, so that a LoRA has something to teach it; only its VAE, which knows no texts, has seen both. The
trained parts stay in FOLDER: a part that is there is not trained again. Writes starter/model.safetensors.

Shape letters: B samples, N all samples, C channels, H W pixels or latent pixels, T = 77 tokens, D text features.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

STARTER = Path(__file__).resolve().parent
sys.path.insert(0, str(STARTER.parent))

from library.checkpoints.architecture import TextArchitecture, UNetArchitecture, VaeArchitecture  # noqa: E402
from library.checkpoints.model_spec import ModelSpec, model_spec_metadata  # noqa: E402
from library.checkpoints.sd import ModelState, save_single_file  # noqa: E402
from library.models.build import build_text_encoder, build_unet, build_vae  # noqa: E402
from library.models.text_encoder import TextEncoder  # noqa: E402
from library.text.tokens import ClipTokenizer  # noqa: E402

SIZE = 128  # pixels: the size the model draws
LATENT_SCALE = 0.18215  # of SD 1.x: latents times this have standard deviation 1

# 64 channels or more where a picture or latent comes out: with one channel in each of its 32 groups, the group norm
# before the last convolution would give every picture the same mean colour.
VAE = VaeArchitecture(image_channels=3, latent_channels=4, channels=(64, 64, 64, 64), resnets=1)
TEXT_ENCODER = TextArchitecture(49408, 77, width=64, mlp_width=256, layers=2, heads=1, activation="quick_gelu")
UNET = UNetArchitecture(
    in_channels=4,
    out_channels=4,
    channels=(64, 64, 32, 32),
    heads=(8, 8, 8, 8),
    transformer_depths=(1, 1, 1, 0),
    resnets=2,
    context_width=64,
    linear_projection=False,
)

VAE_STEPS, VAE_LR, PIECE = 4000, 1e-3, 48
DIFFUSION_STEPS, DIFFUSION_LR = 2500, 1.5e-3
CROPS_PER_PHOTO = 96
TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
NO_CAPTION = 0.1  # share of samples trained without caption, for classifier-free guidance


# ---------------------------------------------------------------------------------------------- pictures


def photos(folder: Path) -> list[tuple[Image.Image, str]]:
    """The photographs under `folder` with their captions."""
    return [
        (Image.open(path).convert("RGB"), path.with_suffix(".txt").read_text(encoding="utf-8").strip())
        for path in sorted(folder.rglob("*.jpg"))
    ]


def crop(image: Image.Image, smallest: float, rng: random.Random) -> torch.Tensor:
    """A square crop of at least `smallest` of the short side, half of them mirrored, as (3, SIZE, SIZE) in -1..1."""
    side = round(min(image.size) * rng.uniform(smallest, 1))
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    picture = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    return pixels.flip(2) if rng.random() < 0.5 else pixels


# ---------------------------------------------------------------------------------------------- VAE


def train_vae(vae: AutoencoderKL) -> None:
    """First colours, then edges; first on pieces of crops, then on whole ones.

    Afterwards the 1x1 convolutions around the latents are changed so that these have the deviation SD 1.x expects.
    """
    rng = random.Random(1)
    pictures = [image for folder in ("base", "photos") for image, _ in photos(STARTER / folder)]
    vae.quant_conv.bias.data[4:] = -4  # log variance: little noise at first
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, betas=(0.9, 0.95), weight_decay=0)
    for step in (progress := tqdm(range(VAE_STEPS), "VAE")):
        done = step / VAE_STEPS
        images = torch.stack([crop(rng.choice(pictures), 0.7, rng) for _ in range(6 if done < 0.8 else 2)])
        if done < 0.8:
            y, x = rng.randint(0, SIZE - PIECE), rng.randint(0, SIZE - PIECE)
            images = images[:, :, y : y + PIECE, x : x + PIECE]
        latents = vae.encode(images).latent_dist
        restored = vae.decode(latents.sample()).sample
        loss = 3 * F.l1_loss(restored, images) + 1e-4 * latents.kl().mean() / latents.mean[0].numel()
        loss = loss + (5 * F.mse_loss(restored, images) if done < 0.4 else edge_loss(restored, images))
        update(optimizer, vae.parameters(), loss, VAE_LR * warm_cosine(step, VAE_STEPS))
        progress.set_postfix(loss=f"{loss.item():.4f}")
    rescale_latents(vae, torch.stack([crop(rng.choice(pictures), 0.8, rng) for _ in range(200)]))


def edge_loss(restored_BCHW: torch.Tensor, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical differences at two sizes: keeps edges sharp."""
    total = torch.zeros(())
    for _ in range(2):
        error_BCHW = restored_BCHW - images_BCHW
        total = total + error_BCHW.diff(dim=2).abs().mean() + error_BCHW.diff(dim=3).abs().mean()
        restored_BCHW, images_BCHW = F.avg_pool2d(restored_BCHW, 2), F.avg_pool2d(images_BCHW, 2)
    return total


@torch.no_grad()
def rescale_latents(vae: AutoencoderKL, images_BCHW: torch.Tensor) -> None:
    """Give latents mean 0 and deviation 1 / LATENT_SCALE, channel by channel, without changing what is decoded."""
    means = torch.cat([vae.encode(images).latent_dist.mean for images in images_BCHW.split(8)])
    mean_C = means.mean(dim=(0, 2, 3))
    factor_C = 1 / (LATENT_SCALE * means.std(dim=(0, 2, 3)))
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= factor_C[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean_C) * factor_C
    quant.bias[4:] += 2 * factor_C.log()  # the log variance follows the mean
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean_C
    post_quant.weight /= factor_C[None, :, None, None]


# ---------------------------------------------------------------------------------------------- U-Net and text encoder


def train_diffusion(vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: TextEncoder) -> None:
    """Noise prediction with min-SNR weights; both models end as the moving average of their last few hundred steps."""
    rng = random.Random(2)
    torch.manual_seed(2)
    latents_NCHW, captions = encode_crops(vae, rng)
    tokenizer = ClipTokenizer(pad_token="eos")
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    models = torch.nn.ModuleList([unet, text_encoder])
    average = AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(models.parameters(), lr=DIFFUSION_LR, betas=(0.9, 0.99), weight_decay=0)
    for step in (progress := tqdm(range(DIFFUSION_STEPS), "U-Net and text encoder")):
        chosen = [rng.randrange(len(captions)) for _ in range(8)]
        texts = ["" if rng.random() < NO_CAPTION else rng.choice(TEMPLATES).format(captions[i]) for i in chosen]
        context_BTD = text_encoder(tokenizer.windows(texts, 1)[:, 0])
        noise_BCHW = torch.randn_like(latents_NCHW[chosen])
        timesteps_B = torch.randint(0, 1000, (len(chosen),))
        noised_BCHW = schedule.add_noise(latents_NCHW[chosen], noise_BCHW, timesteps_B)
        error_B = (unet(noised_BCHW, timesteps_B, context_BTD).sample - noise_BCHW).square().mean(dim=(1, 2, 3))
        alphas_B = schedule.alphas_cumprod[timesteps_B]
        weight_B = (5 * (1 - alphas_B) / alphas_B).clamp(max=1)  # min(SNR, 5) / SNR
        loss = (error_B * weight_B).mean()
        update(optimizer, models.parameters(), loss, DIFFUSION_LR * warm_cosine(step, DIFFUSION_STEPS))
        average.update_parameters(models)
        progress.set_postfix(loss=f"{loss.item():.4f}")
    models.load_state_dict(average.module.state_dict())


@torch.no_grad()
def encode_crops(vae: AutoencoderKL, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents of many crops of the base photographs, and the caption of each."""
    crops = [
        (crop(image, 0.85, rng), caption) for image, caption in photos(STARTER / "base") for _ in range(CROPS_PER_PHOTO)
    ]
    images_NCHW = torch.stack([pixels for pixels, _ in crops])
    latents = [vae.encode(images).latent_dist.mean * LATENT_SCALE for images in images_NCHW.split(8)]
    return torch.cat(latents), [caption for _, caption in crops]


# ---------------------------------------------------------------------------------------------- shared


def warm_cosine(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: 100 steps up, then down to 0 along a cosine."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def update(optimizer: torch.optim.Optimizer, parameters, loss: torch.Tensor, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def trained(file: Path, models: Iterable[torch.nn.Module], train: Callable[[], None]) -> None:
    """Load the weights of `models` from `file`; where it does not exist yet, train them and write it."""
    parts = torch.nn.ModuleList(models)
    if not file.exists():
        train()
        torch.save(parts.state_dict(), file)
    parts.load_state_dict(torch.load(file, weights_only=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained parts")
    parser.add_argument("--output", type=Path, default=STARTER / "model.safetensors")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae, unet, text_encoder = build_vae(VAE), build_unet(UNET, sample_size=SIZE // 8), build_text_encoder(TEXT_ENCODER)
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.1)  # words never trained differ as well
    trained(options.work / "vae.pt", [vae], lambda: train_vae(vae))
    trained(options.work / "diffusion.pt", [unet, text_encoder], lambda: train_diffusion(vae, unet, text_encoder))
    spec = ModelSpec(
        kind="sd1",
        v_prediction=False,
        title="Starter model",
        resolution=(SIZE, SIZE),
        description="Stable Diffusion 1.x with small widths; it can draw six photographs. For first steps and tests",
        license="Apache-2.0; see starter/ATTRIBUTION.md for the photographs",
        date=datetime(2026, 11, 20),
    )
    state = ModelState("sd1", unet.state_dict(), text_encoder.state_dict(), vae.state_dict())
    save_single_file(state, options.output, source=None, dtype=torch.float16, metadata=model_spec_metadata(spec))


if __name__ == "__main__":
    main()
