"""Pictures of full-size SD 1.5, drawn here and by diffusers with the same weights and noise: the same pictures.

With each sampler, with a LoRA that the real script trained, from a picture, in a mask, with a ControlNet, with textual
inversion.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image
from safetensors.torch import load_file

from library.families.base import ModelBundle
from library.families.sd import StableDiffusion
from library.generate.control import Control, ControlNets
from library.generate.control_options import ControlFile, Preprocessor
from library.generate.denoise import decode, denoise
from library.generate.drawing import Part
from library.generate.inpainting import Inpainting
from library.generate.request import GenerationRequest
from library.generate.start import requested_start
from library.models.added_words import add_words, read_word
from networks.lora import create_network_from_weights
from tests.diffusers_reference import (
    SCHEDULERS,
    arguments,
    check,
    diffusers_pipeline,
    fresh_scheduler,
    load,
    with_our_scheduler,
)
from tests.full_size import write_full_size
from tests.runs import train_network
from tests.tiny_control import guide_image
from tests.tiny_data import tiny_images

FAMILY = StableDiffusion()
REQUEST = GenerationRequest("a photo of a cat", "blurry", 64, 64, 3, 5.0, 7, sampler="euler")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_trained_here_drawn_there(scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("peft")
    model = write_full_size(scratch / "model.safetensors", "sd1", torch.float16)
    tiny_images(scratch / "images", 2, sizes=[(64, 64)])
    code = train_network(
        pretrained_model_name_or_path=model, train_data_dir=scratch / "images", output_dir=scratch, output_name="lora",
        network_module="networks.lora", network_dim=4, network_alpha=4, resolution=64, max_train_steps=3, seed=1,
        learning_rate=0.02, max_data_loader_n_workers=0, cache_latents=True,
    )  # fmt: skip
    assert code == 0
    tensors = load_file(scratch / "lora.safetensors")
    modules = {name.rsplit(".", 2 if name.endswith(".weight") else 1)[0] for name in tensors}
    assert len(modules) == 264 and len(tensors) == 3 * 264
    assert sum(name.startswith("lora_te_") for name in modules) == 72

    bundle = load(model)
    pipeline = diffusers_pipeline(bundle, scratch / "folder", "euler")
    plain = drawn(bundle)
    network, weights = create_network_from_weights(
        1.0, str(scratch / "lora.safetensors"), bundle.vae, bundle.text_encoders[0], bundle.unet, for_inference=True
    )
    network.apply_to(bundle.text_encoders[0], bundle.unet)
    assert not network.load_state_dict(weights, strict=False).unexpected_keys
    ours = drawn(bundle)
    pipeline.load_lora_weights(scratch / "lora.safetensors")
    assert not [record for record in caplog.records if "unexpected" in record.getMessage().lower()]
    theirs = drawn_there(pipeline)
    check(ours, theirs, "LoRA")
    assert np.abs(ours - plain).mean() > 10 * np.abs(ours - theirs).mean()

    from_pictures(bundle, pipeline.components, scratch)
    with_a_control_net(bundle, pipeline.components, scratch)
    with_textual_inversion(bundle, pipeline, scratch)


@pytest.mark.full_size
def test_each_sampler(scratch: Path) -> None:
    bundle = load(write_full_size(scratch / "model.safetensors", "sd1", torch.float16))
    pipeline = diffusers_pipeline(bundle, scratch / "folder", "euler")
    for sampler in SCHEDULERS:
        request = replace(REQUEST, sampler=sampler, steps=4)
        pipeline.scheduler = fresh_scheduler(sampler)
        generator = torch.Generator().manual_seed(request.seed)
        theirs = drawn_there(pipeline, latents=None, generator=generator, num_inference_steps=4)
        check(drawn(bundle, request), theirs, sampler)


def from_pictures(bundle: ModelBundle, components: dict[str, Any], folder: Path) -> None:
    """img2img and inpainting."""
    smooth = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((64, 64), Image.Resampling.BICUBIC).save(folder / "image.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    for pipeline_class, parts, masks in (
        (StableDiffusionImg2ImgPipeline, (), {}),
        (StableDiffusionInpaintPipeline, (Inpainting(),), {"mask_image": Image.open(folder / "mask.png")}),
    ):
        request = replace(REQUEST, image=str(folder / "image.png"), strength=0.7)
        request = replace(request, mask=str(folder / "mask.png")) if masks else request
        latents = requested_start(FAMILY, bundle, [request])
        pipeline = with_our_scheduler(pipeline_class(**components, requires_safety_checker=False), "euler")
        pipeline._encode_vae_image = lambda *_, _latents=latents, **__: _latents
        image = Image.open(folder / "image.png") if masks else latents
        theirs = pipeline(image=image, **masks, width=64, height=64, **arguments([request])).images
        check(drawn(bundle, request, parts), theirs, pipeline_class.__name__)


def with_a_control_net(bundle: ModelBundle, components: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(bundle.unet).eval()
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.1)
    path = guide_image(folder / "guide.png", 1, size=(64, 64))
    control = Control(net, ControlFile("", "", Preprocessor(), 0.8, 1.0), 0)
    ours = drawn(bundle, replace(REQUEST, guide_images=(str(path),)), (ControlNets([control], sums=False),))
    pipeline = StableDiffusionControlNetPipeline(**components, controlnet=net, requires_safety_checker=False)
    theirs = drawn_there(
        with_our_scheduler(pipeline, "euler"), image=Image.open(path), controlnet_conditioning_scale=0.8
    )
    check(ours, theirs, "ControlNet")
    assert np.abs(ours - drawn(bundle)).mean() > 10 * np.abs(ours - theirs).mean()


def with_textual_inversion(bundle: ModelBundle, pipeline: Any, folder: Path) -> None:
    vectors = torch.randn(2, 768, generator=torch.Generator().manual_seed(0)) * 0.03
    torch.save({"string_to_param": {"*": vectors}, "name": "zwork"}, folder / "zwork.pt")
    plain = drawn(bundle)
    pipeline.load_textual_inversion(folder / "zwork.pt", token="zwork")
    word = read_word(str(folder / "zwork.pt"), "--textual_inversion_embeddings")
    bundle.tokenizers = add_words(bundle.tokenizers, bundle.text_encoders, [word], "--textual_inversion_embeddings")
    ours = drawn(bundle, replace(REQUEST, prompt="a photo of zwork"))
    theirs = drawn_there(pipeline, prompt="a photo of zwork")
    check(ours, theirs, "textual inversion")
    assert not np.array_equal(ours, plain)  # not by much: random weights hardly listen to words


def drawn_there(pipeline: Any, **more: Any) -> np.ndarray:
    arguments = {
        "prompt": REQUEST.prompt,
        "negative_prompt": REQUEST.negative_prompt,
        "num_inference_steps": REQUEST.steps,
        "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(REQUEST.seed)),
    }
    arguments |= {"width": 64, "height": 64, "guidance_scale": REQUEST.scale, "output_type": "np"}
    return pipeline(**(arguments | more)).images


def drawn(bundle: ModelBundle, request: GenerationRequest = REQUEST, parts: Sequence[Part] = ()) -> np.ndarray:
    return decode(bundle, denoise(FAMILY, bundle, [request], parts=parts)).numpy() / 255
