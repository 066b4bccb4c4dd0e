"""LoRA files of the trade for plain diffusers pipelines, without this project's models.

    from networks.lora_diffusers import create_network_from_weights

    network = create_network_from_weights(pipeline.text_encoder, pipeline.unet, "cat.safetensors")
    network.apply_to(multiplier=0.8)        # for SDXL: [pipeline.text_encoder, pipeline.text_encoder_2]
    network.set_multiplier(0.5)
    network.unapply_to()
    network.merge_to(multiplier=1.0)        # into the weights, and out of them again:
    network.restore_from(multiplier=1.0)

As a command it draws a picture without the LoRA, one with it, and one with it merged. See docs/models_and_loras.md.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.tools import Tool
from library.options import OptionError, opt

logger = logging.getLogger(__name__)

PUBLIC = ("LoRANetwork", "create_network_from_weights", "merge_lora_weights", "text_encoders_of")


def __getattr__(name: str) -> Any:
    """What others import from here needs torch, the command's help does not."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from networks import pipeline_lora

    return getattr(pipeline_lora, name)


@dataclass(frozen=True)
class DrawOptions:
    """What is drawn."""

    model_id: str = opt("", help="model: a Diffusers folder, a single file or a hub id")
    lora_weights: str = opt("", help="LoRA file")
    sdxl: bool = opt(False, help="the model is SDXL")
    prompt: str = opt("A photo of cat", help="what to draw")
    negative_prompt: str = opt("", help="what not to draw")
    seed: int | None = opt(help="seed of the noise (default: 0)")
    output_dir: str = opt(".", help="folder of the pictures lora_none.png, lora_applied.png and lora_merged.png")
    steps: int = opt(30, help="steps of sampling")


def draw(options: DrawOptions) -> None:
    """Draw three pictures; raises OptionError for a model or a LoRA that can't be used."""
    folder = Path(options.output_dir).expanduser()
    if not folder.is_dir():
        raise OptionError("--output_dir", f"{folder} is no folder", "make it, or choose another")
    _check_kind(options)
    import torch

    from library.checkpoints.weights import load_tensors
    from networks.pipeline_lora import create_network_from_weights, text_encoders_of

    weights = load_tensors(Path(options.lora_weights).expanduser(), "--lora_weights")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = _pipeline(options, torch.float16 if device == "cuda" else torch.float32).to(device)

    def picture(name: str) -> None:
        generator = torch.Generator("cpu").manual_seed(options.seed or 0)
        drawn = pipeline(
            options.prompt, negative_prompt=options.negative_prompt, generator=generator,
            num_inference_steps=options.steps,
        )  # fmt: skip
        drawn.images[0].save(folder / f"lora_{name}.png")
        logger.info("%s", folder / f"lora_{name}.png")

    picture("none")
    network = create_network_from_weights(text_encoders_of(pipeline), pipeline.unet, weights)
    network.apply_to()
    picture("applied")
    network.unapply_to()
    network.merge_to()
    picture("merged")


def _check_kind(options: DrawOptions) -> None:
    from library.checkpoints.probe import probe_any

    kind = probe_any(options.model_id, flag="--model_id").kind
    if (kind == "sdxl") != options.sdxl:
        problem, way_out = ("is no SDXL model", "leave it out") if options.sdxl else ("is an SDXL model", "use --sdxl")
        raise OptionError("--sdxl" if options.sdxl else "--model_id", f"{options.model_id} {problem}", way_out)


def _pipeline(options: DrawOptions, dtype: Any) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if options.sdxl else StableDiffusionPipeline
    settings = {"torch_dtype": dtype} | ({} if options.sdxl else {"safety_checker": None})
    path = Path(options.model_id).expanduser()
    return kind.from_single_file(str(path), **settings) if path.is_file() else kind.from_pretrained(
        options.model_id, **settings
    )  # fmt: skip


TOOL = Tool(__doc__, DrawOptions, draw, required=("model_id", "lora_weights"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
