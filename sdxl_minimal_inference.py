"""One picture of a Stable Diffusion XL model, with every step of it in sight: an example of the library in use.

sdxl_gen_img.py is the script for everyday: weights of words, long prompts, other samplers, batches, metadata.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.checkpoints.probe import MODEL_FLAG, probe
from library.cli import networks
from library.cli.console import start_console
from library.cli.ending import Ending, leave
from library.diffusion.samplers import make_scheduler
from library.families.options import ModelOptions, TextOptions
from library.generate.network_options import NetworkOptions
from library.generate.options import check_seed, check_size
from library.generate.output import encode_png, numbered_names, prepare_folder, write_new
from library.generate.prompt_line import finite_number
from library.models.options import AttentionOptions
from library.options import OptionError, OptionParser, add_arguments, build, opt, require

if TYPE_CHECKING:
    from PIL import Image

    from library.families.base import Conditioning, ModelBundle, ModelFamily

logger = logging.getLogger(__name__)

SAMPLER, SCALE = "euler", 7.0
RENAMED = {MODEL_FLAG: "--ckpt_path", "--outdir": "--output_dir", networks.WEIGHTS: "--lora_weights"}


@dataclass(frozen=True)
class Options:
    """The picture."""

    ckpt_path: str | None = opt(help="SDXL model: a .safetensors or .ckpt file, or a Diffusers folder")
    prompt: str = opt("A photo of a cat", help="what the picture shows")
    prompt2: str | None = opt(help="what the second text encoder reads; the same without this option")
    negative_prompt: str = opt("", help="what the picture should not show")
    output_dir: str = opt(".", help="folder for the pictures; made where it is missing")
    lora_weights: tuple[str, ...] | None = opt(
        help='LoRA files to merge into the model, each with or without a multiplier: "file;0.8"'
    )
    interactive: bool = opt(False, help="ask for prompts and seeds, one picture after the other, until one is empty")
    steps: int = opt(50, help="denoising steps")
    seed: int | None = opt(help="of the noise that the picture starts from; a random one without this option")
    width: int = opt(1024, help="pixels, a multiple of 8")
    height: int = opt(1024, help="pixels, a multiple of 8")

    def __post_init__(self) -> None:
        require(bool(self.ckpt_path), "--ckpt_path", "no model given", "name an SDXL model")
        require(1 <= self.steps <= 1000, "--steps", f"{self.steps} is out of range", "use 1 to 1000")
        check_seed("--seed", self.seed)
        check_size("--width", self.width)
        check_size("--height", self.height)
        self.loras  # noqa: B018  checks the multipliers

    @property
    def loras(self) -> NetworkOptions:
        files, multipliers = [], []
        for text in self.lora_weights or ():
            file, _, multiplier = text.partition(";")
            require(bool(file), "--lora_weights", f"{text!r} names no file", "write file or file;0.8")
            files.append(file)
            try:
                multipliers.append(finite_number(multiplier or "1"))
            except ValueError:
                raise OptionError("--lora_weights", f"{multiplier!r} is not a number", "write file;0.8") from None
        if not files:
            return NetworkOptions()
        return NetworkOptions(("networks.lora",) * len(files), tuple(files), tuple(multipliers), network_merge=True)


def run(argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 for a mistake of the user's, 130 when interrupted, 1 for anything else."""
    parser = build_parser()
    values = vars(parser.parse_strictly(argv))
    start_console()
    with Ending(parser.prog, renamed=RENAMED) as ending:
        options = build(Options, values)
        networks.check(options.loras)
        probe(str(options.ckpt_path), flag="--ckpt_path", family="sdxl", sd_script="gen_img_diffusers.py")
        folder = prepare_folder(options.output_dir, 3 * options.width * options.height)
        family, bundle = load(options)
        for index, wish in enumerate(typed(options) if options.interactive else [options]):
            image = draw(family, bundle, wish)
            name = f"image_{time.strftime('%Y%m%d-%H%M%S')}_{index:03d}"
            logger.info("%s", write_new(folder, numbered_names(name), encode_png(image, {})))
    return ending.code


def build_parser() -> OptionParser:
    parser = OptionParser(description=__doc__)
    add_arguments(parser, Options)
    return parser


def typed(options: Options) -> Iterator[Options]:
    """What is asked for at the keyboard, until a prompt is empty or the input ends."""
    try:
        while prompt := input("prompt: ").strip():
            prompt2, negative = input("prompt for the second text encoder: ").strip(), input("negative prompt: ")
            seed = input("seed: ").strip()
            try:
                yield replace(options, prompt=prompt, prompt2=prompt2 or None, negative_prompt=negative.strip(),
                              seed=int(seed) if seed else None)  # fmt: skip
            except OptionError as error:
                print(error)
            except ValueError:
                print(f"{seed!r} is no seed: use a whole number, or nothing")
    except EOFError:
        return


def load(options: Options) -> tuple[ModelFamily, ModelBundle]:
    """The model on the GPU in half precision, where there is one, with the LoRA files merged into it."""
    import torch

    from library.families.base import LoadPlan
    from library.families.sdxl import StableDiffusionXL

    has_gpu = torch.cuda.is_available()
    dtype, device = (torch.float16, torch.device("cuda")) if has_gpu else (torch.float32, torch.device("cpu"))
    plan = LoadPlan(unet=dtype, text_encoders=dtype, vae=torch.float32, device=device)
    family = StableDiffusionXL()
    bundle = family.load(ModelOptions(options.ckpt_path), AttentionOptions(), plan)
    networks.attach(networks.import_modules(options.loras), options.loras, bundle, plan)
    return family, bundle


def draw(family: ModelFamily, bundle: ModelBundle, wish: Options) -> Image.Image:
    """From the prompts to the picture."""
    import torch
    from PIL import Image

    from library.generate.denoise import NotFiniteError, check_finite, decode

    seed = random.SystemRandom().randrange(2**32) if wish.seed is None else wish.seed
    logger.info("seed %d", seed)
    weight: Any = next(bundle.unet.parameters())
    with torch.no_grad():
        conditioning = told(family, bundle, wish)
        scheduler = make_scheduler(SAMPLER, v_prediction=bundle.source.v_prediction,
                                   zero_terminal_snr=bundle.source.zero_terminal_snr)  # fmt: skip
        scheduler.set_timesteps(wish.steps)
        shape = (1, 4, wish.height // 8, wish.width // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # on the CPU: the same anywhere
        latents = noise.to(weight.device) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(latents, timestep).to(weight.dtype).repeat(2, 1, 1, 1)
            timesteps = timestep.to(weight.device).repeat(2)
            negative, positive = family.predict(bundle.unet, inputs, timesteps, conditioning).float().chunk(2)
            (latents,) = scheduler.step(
                negative + SCALE * (positive - negative), timestep, latents, return_dict=False
            )[:1]  # fmt: skip
        try:
            check_finite(latents, "the model's")
            (pixels,) = decode(bundle, latents / family.latent_scale)
        except NotFiniteError as error:
            raise OptionError("--ckpt_path", str(error)) from None
    return Image.fromarray(pixels.numpy())


def told(family: ModelFamily, bundle: ModelBundle, wish: Options) -> Conditioning:
    """What the U-Net is told of the negative prompt and the prompt: their text, and the size of the picture."""
    from library.families.base import PictureSizes

    ids = []
    for tokenizer, encoder, prompt in zip(
        bundle.tokenizers, bundle.text_encoders, (wish.prompt, wish.prompt2 or wish.prompt), strict=True
    ):
        for name, text in (("prompt", prompt), ("negative prompt", wish.negative_prompt)):
            if num_cut := tokenizer.count_cut_off(text, 1):
                logger.warning("the last %d tokens of the %s are cut off", num_cut, name)
        tokens = family.tokenize([tokenizer], [wish.negative_prompt, prompt], windows=1)
        ids.append(tokens.ids[0].to(next(encoder.parameters()).device))
    text = family.encode_text(bundle.text_encoders, ids, TextOptions())
    return family.condition(text, PictureSizes.whole(wish.width, wish.height, 2, ids[0].device))


if __name__ == "__main__":
    leave(run())
