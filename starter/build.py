"""Builds the starter model: a Stable Diffusion 1.x checkpoint with every width small, trained in under an hour on one core.

    python starter/build.py --work DIR [--only vae|diffusion|write]

It learns the ten photographs of `starter/base` well enough to draw them for their captions, and has never been shown
the subject of `starter/photos` with a text, so that a LoRA has something visible to teach. Its VAE has seen both: it only
has to reproduce pixels. Each stage leaves a file in DIR and is skipped where that file exists.

Shape letters: B samples, C channels, H W pixels or latent pixels, T = 77 tokens, D text features.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

STARTER = Path(__file__).resolve().parent
sys.path.insert(0, str(STARTER.parent))

from library.text.tokens import ClipTokenizer  # noqa: E402

SIZE = 128  # pixels: the size the model draws
LATENT_SCALE = 0.18215  # of SD 1.x: latents times this have standard deviation 1
TEXT_WIDTH = 64  # one head: heads of CLIP are 64 wide
TEMPLATES = ("{}", "a photo of {}", "a picture of {}")

VAE_STEPS = 4000
DIFFUSION_STEPS = 6000
CROPS_PER_PHOTO = 96
NO_CAPTION = 0.1  # share of samples trained without caption, for classifier-free guidance


# ---------------------------------------------------------------------------------------------- architecture


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    )


def new_unet() -> UNet2DConditionModel:
    """SD 1.x's U-Net; `attention_head_dim` is what diffusers calls its number of heads."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(64, 64, 32, 32),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )


def new_text_encoder() -> CLIPTextModel:
    """CLIP's text model. Token vectors start large, so that words the training never shows still differ from each other."""
    config = CLIPTextConfig(
        hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=2, num_attention_heads=1
    )
    model = CLIPTextModel(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    return model


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
    """Absolute error of pixels and of their differences (edges), a trace of KL; the last quarter at full size.

    Afterwards the latents are rescaled to the deviation SD 1.x expects, by changing the two 1x1 convolutions around them.
    """
    rng = random.Random(1)
    pictures = [image for folder in ("base", "photos") for image, _ in photos(STARTER / folder)]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0)
    for step in (progress := tqdm(range(VAE_STEPS), "VAE")):
        full = step >= VAE_STEPS * 3 // 4
        images = torch.stack([crop(rng.choice(pictures), 0.5, rng) for _ in range(4 if full else 10)])
        if not full:
            y, x = rng.randint(0, SIZE // 2), rng.randint(0, SIZE // 2)
            images = images[:, :, y : y + SIZE // 2, x : x + SIZE // 2]
        latents = vae.encode(images).latent_dist
        restored = vae.decode(latents.sample()).sample
        loss = F.l1_loss(restored, images) + edge_loss(restored, images) + 1e-4 * latents.kl().mean() / latents.mean[0].numel()
        update(optimizer, vae.parameters(), loss, warm_cosine(step, VAE_STEPS) * 2e-3)
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


def train_diffusion(vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Noise prediction with min-SNR weights; both models end as the moving average of their last few hundred steps."""
    rng = random.Random(2)
    torch.manual_seed(2)
    latents_NCHW, captions = encode_crops(vae, rng)
    tokenizer = ClipTokenizer(pad_token="eos")
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    models = torch.nn.ModuleList([unet, text_encoder])
    average = torch.optim.swa_utils.AveragedModel(models, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(models.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    for step in (progress := tqdm(range(DIFFUSION_STEPS), "U-Net and text encoder")):
        chosen = [rng.randrange(len(captions)) for _ in range(8)]
        texts = ["" if rng.random() < NO_CAPTION else rng.choice(TEMPLATES).format(captions[i]) for i in chosen]
        context_BTD = text_encoder(tokenizer.windows(texts, 1)[:, 0]).last_hidden_state
        noise_BCHW = torch.randn_like(latents_NCHW[chosen])
        timesteps_B = torch.randint(0, 1000, (len(chosen),))
        noised_BCHW = schedule.add_noise(latents_NCHW[chosen], noise_BCHW, timesteps_B)
        error_B = (unet(noised_BCHW, timesteps_B, context_BTD).sample - noise_BCHW).square().mean(dim=(1, 2, 3))
        alphas_B = schedule.alphas_cumprod[timesteps_B]
        weight_B = (5 * (1 - alphas_B) / alphas_B).clamp(max=1)  # min(SNR, 5) / SNR
        loss = (error_B * weight_B).mean()
        update(optimizer, models.parameters(), loss, warm_cosine(step, DIFFUSION_STEPS) * 1e-3)
        average.update_parameters(models)
        progress.set_postfix(loss=f"{loss.item():.4f}")
    models.load_state_dict(average.module.state_dict())


@torch.no_grad()
def encode_crops(vae: AutoencoderKL, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents of many crops of the base photographs, and the caption of each."""
    crops = [(crop(image, 0.85, rng), caption) for image, caption in photos(STARTER / "base") for _ in range(CROPS_PER_PHOTO)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained parts before they are joined")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae, unet, text_encoder = new_vae(), new_unet(), new_text_encoder()
    vae_file, diffusion_file = work / "vae.pt", work / "diffusion.pt"
    if not vae_file.exists():
        train_vae(vae)
        torch.save(vae.state_dict(), vae_file)
    vae.load_state_dict(torch.load(vae_file, weights_only=True))
    if not diffusion_file.exists():
        train_diffusion(vae, unet, text_encoder)
        torch.save([unet.state_dict(), text_encoder.state_dict()], diffusion_file)
    for model, state in zip((unet, text_encoder), torch.load(diffusion_file, weights_only=True), strict=True):
        model.load_state_dict(state)


if __name__ == "__main__":
    main()
