"""The SDXL family: text states, the pooled text, sizes, prediction, against transformers' and diffusers' own code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from library.families.base import LoadPlan, PictureSizes
from library.families.options import ModelOptions, TextOptions
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions
from library.models.text_encoder import clip_config
from library.options import OptionError
from library.text.tokens import END_ID
from tests.tiny_models import SECOND_TEXT_ENCODER, TEXT_ENCODERS, tiny_sdxl_checkpoint

FAMILY = StableDiffusionXL()
PLAN = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
CAPTION = "a (red) dog on a hill, 3 trees"


@pytest.fixture(scope="module")
def bundle(tiny_sdxl_path):
    return FAMILY.load(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), PLAN)


@pytest.fixture(scope="module")
def pipeline(bundle) -> Any:
    """diffusers' pipeline on the same weights."""
    first, second = bundle.text_encoders
    theirs = CLIPTextModel(clip_config(TEXT_ENCODERS["sdxl"]))
    their_second = CLIPTextModelWithProjection(replace_end(clip_config(SECOND_TEXT_ENCODER)))
    load(theirs, first)
    load(their_second, second)
    return StableDiffusionXLPipeline(
        vae=bundle.vae, text_encoder=theirs.eval(), text_encoder_2=their_second.eval(), unet=bundle.unet,
        tokenizer=bundle.tokenizers[0].for_transformers(), tokenizer_2=bundle.tokenizers[1].for_transformers(),
        scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip


def replace_end(config: Any) -> Any:
    """transformers finds the end token by its id where the configuration names the true one."""
    config.eos_token_id = END_ID
    return config


def load(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    names, weights = set(theirs.state_dict()), ours.state_dict()
    renamed = {key if key in names else key.removeprefix("text_model."): value for key, value in weights.items()}
    theirs.load_state_dict(renamed)


def encoded(bundle, captions, windows=1, **text):
    ids = FAMILY.tokenize(bundle.tokenizers, captions, windows).ids
    with torch.no_grad():
        return FAMILY.encode_text(bundle.text_encoders, ids, TextOptions(**text))


def sizes(*numbers: int) -> PictureSizes:
    pairs = torch.tensor([numbers]).view(1, 3, 2)
    return PictureSizes(pairs[:, 0], pairs[:, 1], pairs[:, 2])


# ---------------------------------------------------------------------------------------------- text


def test_text_is_what_diffusers_makes_of_it(bundle, pipeline):
    ours = encoded(bundle, [CAPTION])
    theirs, _, their_pooled, _ = pipeline.encode_prompt(CAPTION, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.context_BTD, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.pooled_BP, their_pooled, atol=1e-5, rtol=1e-4)
    assert [states.shape for states in ours.by_encoder] == [(1, 77, 64), (1, 77, 128)]


def test_paddings_of_both_tokenizers(bundle):
    first, second = FAMILY.tokenize(bundle.tokenizers, ["a"], 1).ids
    assert first[0, 0, 3:].unique().tolist() == [END_ID]
    assert second[0, 0, 2].item() == END_ID and second[0, 0, 3:].unique().tolist() == [0]


def test_long_captions_keep_the_first_windows_pooled_text(bundle):
    long = ", ".join(["a red dog"] * 40)
    two = encoded(bundle, [long, "short"], windows=2)
    assert two.context_BTD.shape == (2, 152, 192)
    one = encoded(bundle, [long])
    assert torch.equal(two.by_encoder[1][:1, :76], one.by_encoder[1][:, :76])
    assert two.pooled_BP.shape == (2, 128)
    torch.testing.assert_close(two.pooled_BP[1:], encoded(bundle, ["short"]).pooled_BP, atol=1e-5, rtol=1e-4)


def test_clip_skip_chooses_the_layer_of_both_encoders(bundle):
    usual, same, other = (encoded(bundle, ["a"], clip_skip=skip) for skip in (None, 2, 1))
    assert torch.equal(usual.context_BTD, same.context_BTD)
    assert all(not torch.equal(*pair) for pair in zip(usual.by_encoder, other.by_encoder, strict=True))
    assert torch.equal(usual.pooled_BP, other.pooled_BP)


def test_weighted_captions(bundle):
    tokens = FAMILY.tokenize(bundle.tokenizers, ["a (dog:1.5)", "a dog"], 1, weighted=True)
    with torch.no_grad():
        states = FAMILY.encode_text(bundle.text_encoders, tokens.ids, TextOptions(), tokens.weights)
    plain = encoded(bundle, ["a dog"])
    torch.testing.assert_close(states.context_BTD[1:], plain.context_BTD, atol=1e-5, rtol=1e-4)
    for weighted, unweighted in zip(states.by_encoder, plain.by_encoder, strict=True):
        assert not torch.allclose(weighted[:1], unweighted, atol=1e-3)
    torch.testing.assert_close(states.pooled_BP[:1], plain.pooled_BP, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- sizes and prediction


def test_size_embedding_of_1024(bundle):
    """The numbers of the trade's format: 128 cosines, then 128 sines."""
    values = bundle.unet.add_time_proj(torch.tensor([1024.0]))[0]
    assert values.shape == (256,)
    assert values[:3].tolist() == pytest.approx([0.987354, -0.537610, 0.683435], abs=1e-4)
    assert values[128:131].tolist() == pytest.approx([-0.158533, -0.843193, 0.730012], abs=1e-4)
    assert [values[127].item(), values[255].item()] == pytest.approx([0.993952, 0.109818], abs=1e-4)


def test_time_steps_have_the_standard_frequencies(bundle):
    values = bundle.unet.time_proj(torch.tensor([900.0]))[0]
    half = len(values) // 2
    frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    torch.testing.assert_close(values[:half].double(), (900 * frequencies).cos(), atol=1e-4, rtol=0)


def test_order_of_sizes(bundle):
    conditioning = FAMILY.condition(encoded(bundle, ["a"]), sizes(768, 1024, 12, 34, 512, 640))
    assert conditioning.sizes_B6.tolist() == [[768, 1024, 12, 34, 512, 640]]
    assert conditioning.sizes_B6.dtype is torch.float32


@torch.no_grad()
def test_prediction_is_that_of_the_diffusers_unet(bundle):
    text = encoded(bundle, [CAPTION])
    noised = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([500])
    ours = FAMILY.predict(bundle.unet, noised, timesteps, FAMILY.condition(text, sizes(64, 96, 0, 8, 64, 64)))
    added = {"text_embeds": text.pooled_BP, "time_ids": torch.tensor([[64.0, 96, 0, 8, 64, 64]])}
    theirs = bundle.unet(noised, timesteps, text.context_BTD, added_cond_kwargs=added).sample
    assert torch.equal(ours, theirs)
    others = FAMILY.predict(bundle.unet, noised, timesteps, FAMILY.condition(text, sizes(64, 96, 0, 0, 64, 64)))
    assert not torch.equal(ours, others)


@torch.no_grad()
def test_conditioning_of_another_precision(bundle):
    """As a cache gives it."""
    unet = bundle.unet
    text = encoded(bundle, [CAPTION])
    conditioning = FAMILY.condition(text, sizes(1000, 1001, 0, 0, 64, 64))
    noised = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    try:
        prediction = FAMILY.predict(unet.to(torch.bfloat16), noised, torch.tensor([500]), conditioning)
    finally:
        unet.to(torch.float32)
    assert prediction.dtype is torch.bfloat16 and prediction.isfinite().all()


# ---------------------------------------------------------------------------------------------- loading


def test_the_vae_never_computes_in_float16(tiny_sdxl_path):
    plan = replace(PLAN, unet=torch.float16, text_encoders=torch.float16, vae=torch.float16)
    for made in (FAMILY.load, lambda options, attention, plan: FAMILY.outline(options, plan)):
        loaded = made(ModelOptions(str(tiny_sdxl_path)), AttentionOptions(), plan)
        assert next(loaded.vae.parameters()).dtype is torch.float32
        assert next(loaded.unet.parameters()).dtype is torch.float16
    loaded = FAMILY.outline(ModelOptions(str(tiny_sdxl_path)), replace(PLAN, vae=torch.bfloat16))
    assert next(loaded.vae.parameters()).dtype is torch.bfloat16


def test_what_the_file_says_of_itself(tmp_path):
    path = tiny_sdxl_checkpoint(tmp_path / "v.safetensors", v_prediction=True, zero_terminal_snr=True)
    source = FAMILY.outline(ModelOptions(str(path)), PLAN).source
    assert (source.kind, source.v_prediction, source.zero_terminal_snr) == ("sdxl", True, True)


def test_describe(bundle):
    described = FAMILY.describe(bundle)
    assert (described["ss_v2"], described["ss_base_model_version"]) == (False, "sdxl_base_v1-0")


def test_other_families_are_sent_to_their_script(tiny_sd1_path):
    with pytest.raises(OptionError, match="SD 1.x model; use train_network.py"):
        FAMILY.outline(ModelOptions(str(tiny_sd1_path)), PLAN)


def test_save_and_load_again(bundle, tmp_path):
    for path, as_diffusers in ((tmp_path / "again.safetensors", False), (tmp_path / "folder", True)):
        FAMILY.save(bundle, path, dtype=None, metadata={}, as_diffusers=as_diffusers)
        again = FAMILY.load(ModelOptions(str(path)), AttentionOptions(), PLAN)
        for ours, theirs in zip(
            (bundle.unet, *bundle.text_encoders, bundle.vae), (again.unet, *again.text_encoders, again.vae), strict=True
        ):
            their_state = theirs.state_dict()
            assert all(torch.equal(tensor, their_state[name]) for name, tensor in ours.state_dict().items())
