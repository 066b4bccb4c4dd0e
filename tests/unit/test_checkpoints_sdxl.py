"""Loading and saving SDXL: single files and Diffusers folders, nothing lost on the way, both text encoders right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch.nn import functional

from library.checkpoints.probe import probe
from library.families.base import ModelBundle, PictureSizes
from library.families.options import TextOptions
from tests.full_size import meta_modules
from tests.sdxl_files import FAMILY, load, rewritten, save
from tests.tiny_models import tiny_sdxl_checkpoint

UNET = "model.diffusion_model."
CLIP = "conditioner.embedders.0.transformer."
OPENCLIP = "conditioner.embedders.1.model."
CAPTION = "a photo of a cat, (very) large"
EXTRAS = "single_file_extras.safetensors"


def assert_same_tensors(left: Path, right: Path) -> None:
    one, two = load_file(left), load_file(right)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def assert_same_weights(left: ModelBundle, right: ModelBundle) -> None:
    for one, two in zip(parts_of(left), parts_of(right), strict=True):
        mine, theirs = one.state_dict(), two.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def parts_of(bundle: ModelBundle) -> tuple[torch.nn.Module, ...]:
    return bundle.unet, *bundle.text_encoders, bundle.vae


# ------------------------------------------------------------------------------------------ round trips


def test_single_file_comes_back_bit_equal_with_all_its_other_keys(tiny_sdxl_path: Path, tmp_path: Path):
    names = load_file(tiny_sdxl_path)
    assert {f"{OPENCLIP}logit_scale", "denoiser.sigmas", f"{CLIP}text_model.embeddings.position_ids"} <= names.keys()
    bundle = load(tiny_sdxl_path)
    assert_same_tensors(tiny_sdxl_path, save(bundle, tmp_path / "out.safetensors"))
    content = torch.load(save(bundle, tmp_path / "out.ckpt"), weights_only=True)["state_dict"]
    assert content.keys() == names.keys() and all(torch.equal(content[name], names[name]) for name in names)
    assert_same_weights(load(tmp_path / "out.ckpt"), bundle)


def test_the_way_through_diffusers_loses_nothing(tmp_path: Path):
    source = tiny_sdxl_checkpoint(tmp_path / "source.safetensors", dtype=torch.float16)
    folder = save(load(source, torch.float16), tmp_path / "folder", torch.float16)
    source = source.rename(tmp_path / "moved.safetensors")  # the way back must not need it
    bundle = load(folder, torch.float16)
    assert (bundle.source.kind, bundle.source.is_single_file) == ("sdxl", False)
    assert_same_weights(bundle, load(source, torch.float16))
    assert_same_tensors(source, save(bundle, tmp_path / "back.safetensors", torch.float16))
    again = save(bundle, tmp_path / "again", torch.float16)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in files:
        same = (folder / name).read_bytes() == (again / name).read_bytes()
        assert same or name.name == EXTRAS, name
    assert_same_tensors(folder / EXTRAS, again / EXTRAS)


def test_what_comes_from_diffusers_alone_is_a_plain_file(tiny_sdxl_path: Path, tmp_path: Path):
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    (folder / EXTRAS).unlink()
    written = load_file(save(load(folder), tmp_path / "out.safetensors"))
    source = load_file(tiny_sdxl_path)
    extras = {f"{OPENCLIP}logit_scale", "denoiser.sigmas", f"{CLIP}text_model.embeddings.position_ids"}
    assert written.keys() == source.keys() - extras
    assert all(torch.equal(tensor, source[name]) for name, tensor in written.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_of_saved_files(dtype: torch.dtype, tiny_sdxl_path: Path, tmp_path: Path):
    source = load_file(tiny_sdxl_path)
    written = load_file(save(load(tiny_sdxl_path), tmp_path / "half.safetensors", dtype))
    own = (UNET, CLIP, OPENCLIP, "first_stage_model.")
    for name, tensor in written.items():
        is_extra = name.endswith(("position_ids", "logit_scale")) or not name.startswith(own)
        assert tensor.dtype == (source[name].dtype if is_extra else dtype), name


# ---------------------------------------------------------------------------------------------- markers


@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_markers_survive_in_either_format(v_prediction: bool, zero_terminal_snr: bool, tmp_path: Path):
    path = tiny_sdxl_checkpoint(tmp_path / "a.safetensors", v_prediction, zero_terminal_snr, dtype=torch.float16)
    expected = (v_prediction, zero_terminal_snr)
    bundle = load(path, torch.float16)
    assert (bundle.source.v_prediction, bundle.source.zero_terminal_snr) == expected
    folder = save(bundle, tmp_path / "folder")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == ("v_prediction" if v_prediction else "epsilon")
    assert config.get("rescale_betas_zero_snr", False) == zero_terminal_snr
    assert config["timestep_spacing"] == ("trailing" if zero_terminal_snr else "leading")
    (folder / EXTRAS).unlink()  # without it the scheduler alone says so
    source = probe(str(folder), family="sdxl")
    assert (source.v_prediction, source.zero_terminal_snr) == expected
    back = load_file(save(load(folder, torch.float16), tmp_path / "back.safetensors"))
    assert ("v_pred" in back, "ztsnr" in back) == expected


def test_a_model_said_to_predict_velocity_is_marked_so(tiny_sdxl_path: Path, tmp_path: Path):
    bundle = load(tiny_sdxl_path, v_parameterization=True)
    written = load_file(save(bundle, tmp_path / "out.safetensors"))
    assert written["v_pred"].numel() == 0 and "ztsnr" not in written
    assert probe(str(tmp_path / "out.safetensors"), family="sdxl").v_prediction


def test_metadata_says_it_too(tiny_sdxl_path: Path, tmp_path: Path):
    save_file(load_file(tiny_sdxl_path), tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    assert probe(str(tmp_path / "v.safetensors"), family="sdxl").v_prediction


def test_the_scheduler_of_a_folder_stays(tiny_sdxl_path: Path, tmp_path: Path):
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    path = folder / "scheduler" / "scheduler_config.json"
    own = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.001, "prediction_type": "v_prediction"}
    path.write_text(json.dumps(own))
    again = save(load(folder), tmp_path / "again")
    assert json.loads((again / "scheduler" / "scheduler_config.json").read_text()) == own
    assert json.loads((again / "model_index.json").read_text())["scheduler"] == ["diffusers", own["_class_name"]]


# ------------------------------------------------------------------------------------ other programs


def test_diffusers_reads_our_folder_and_computes_the_same(tiny_sdxl_path: Path, tmp_path: Path):
    bundle = load(tiny_sdxl_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(save(bundle, tmp_path / "folder"), local_files_only=True)
    ids = FAMILY.tokenize(bundle.tokenizers, [CAPTION], 1).ids
    for tokenizer, mine in zip((pipeline.tokenizer, pipeline.tokenizer_2), ids, strict=True):
        assert tokenizer(CAPTION, padding="max_length", max_length=77).input_ids == mine[0, 0].tolist()
    with torch.no_grad():
        states = FAMILY.encode_text(bundle.text_encoders, ids, TextOptions())
        context, _, pooled, _ = pipeline.encode_prompt(CAPTION, do_classifier_free_guidance=False)
        assert torch.allclose(states.context_BTD, context, atol=1e-5)
        assert torch.allclose(states.pooled_BP, pooled, atol=1e-5)
        noised, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
        conditioning = FAMILY.condition(states, PictureSizes.whole(512, 768, 1, torch.device("cpu")))
        sizes = pipeline._get_add_time_ids((768, 512), (0, 0), (768, 512), context.dtype, pooled.shape[-1])
        added = {"text_embeds": pooled, "time_ids": sizes}
        theirs = pipeline.unet(noised, timesteps, context, added_cond_kwargs=added).sample
        assert torch.allclose(theirs, FAMILY.predict(bundle.unet, noised, timesteps, conditioning), atol=1e-5)
    names = load_file(tmp_path / "folder" / "text_encoder_2" / "model.safetensors")
    assert all(name.startswith("text_model.") or name == "text_projection.weight" for name in names)


def test_diffusers_reads_our_single_file_as_we_do(tiny_sdxl_path: Path, tmp_path: Path):
    """Its own converter of single files, the projection's transposition included."""
    bundle = load(tiny_sdxl_path)
    folder = save(bundle, tmp_path / "folder")  # the configurations: it would take those of the full-size model
    written = save(bundle, tmp_path / "out.safetensors")
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(written), config=str(folder), local_files_only=True, torch_dtype=torch.float32
    )
    for name, mine in zip(
        ("unet", "vae", "text_encoder", "text_encoder_2"),
        (bundle.unet, bundle.vae, *bundle.text_encoders),
        strict=True,
    ):
        theirs = {key.removeprefix("text_model."): t for key, t in getattr(pipeline, name).state_dict().items()}
        for key, tensor in mine.state_dict().items():
            assert torch.equal(theirs[key.removeprefix("text_model.")], tensor), (name, key)


def openclip_reference(file: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(states before the last layer, pooled state) by OpenCLIP's published definition, on the names of the file."""
    state = {name.removeprefix(OPENCLIP): tensor for name, tensor in file.items() if name.startswith(OPENCLIP)}
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    T, D = x.shape[1:]
    mask = torch.full((T, T), float("-inf")).triu(1)
    outputs = []
    for i in range(3):
        block = {n.removeprefix(f"transformer.resblocks.{i}."): t for n, t in state.items() if f".resblocks.{i}." in n}
        attention = torch.nn.MultiheadAttention(D, D // 64, batch_first=True)
        attention.load_state_dict({n.removeprefix("attn."): t for n, t in block.items() if n.startswith("attn.")})
        normed = functional.layer_norm(x, (D,), block["ln_1.weight"], block["ln_1.bias"])
        x = x + attention(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        normed = functional.layer_norm(x, (D,), block["ln_2.weight"], block["ln_2.bias"])
        inner = functional.gelu(functional.linear(normed, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
        x = x + functional.linear(inner, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
        outputs.append(x)
    last = functional.layer_norm(x, (D,), state["ln_final.weight"], state["ln_final.bias"])
    end = (ids == 49407).int().argmax(-1)
    return outputs[-2], last[torch.arange(len(ids)), end] @ state["text_projection"]


def test_second_encoder_against_openclip(tiny_sdxl_path: Path):
    bundle = load(tiny_sdxl_path)
    ids = FAMILY.tokenize(bundle.tokenizers, [CAPTION, "", "dog " * 80], 1).ids[1][:, 0]
    with torch.no_grad():
        expected, expected_pooled = openclip_reference(load_file(tiny_sdxl_path), ids)
        states, pooled = bundle.text_encoders[1](ids, layer_from_end=2, normalized=False)
    assert torch.allclose(states, expected, atol=1e-5) and torch.allclose(pooled, expected_pooled, atol=1e-5)


def test_full_size_configurations_are_the_public_ones():
    modules = meta_modules("sdxl")
    unet, vae = modules["unet"].config, modules["vae"].config
    published = {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2816, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
    }  # fmt: skip
    assert {name: unet[name] for name in published} == published
    assert (vae["sample_size"], vae["scaling_factor"], vae["force_upcast"]) == (1024, 0.13025, True)
    first, second = (modules[name].config for name in ("text_encoder", "text_encoder_2"))
    assert (first.hidden_size, first.num_hidden_layers, first.projection_dim, first.hidden_act) == (
        768, 12, 768, "quick_gelu",
    )  # fmt: skip
    assert (second.hidden_size, second.intermediate_size, second.num_hidden_layers, second.num_attention_heads) == (
        1280, 5120, 32, 20,
    )  # fmt: skip
    assert (second.projection_dim, second.hidden_act, second.max_position_embeddings) == (1280, "gelu", 77)


def test_configurations_of_a_written_folder(tiny_sdxl_path: Path, tmp_path: Path):
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae")}
    assert (configs["unet"]["sample_size"], configs["vae"]["sample_size"]) == (128, 1024)
    assert configs["vae"]["scaling_factor"] == 0.13025
    pads = [
        json.loads((folder / name / "tokenizer_config.json").read_text())["pad_token"]
        for name in ("tokenizer", "tokenizer_2")
    ]
    assert pads == ["<|endoftext|>", "!"]


# ----------------------------------------------------------------------------------- variants of files


def test_projection_under_its_hugging_face_name_is_a_linear(tiny_sdxl_path: Path, tmp_path: Path):
    name = f"{OPENCLIP}text_projection"
    renamed = rewritten(
        tiny_sdxl_path,
        tmp_path / "linear.safetensors",
        lambda key: f"{key}.weight" if key == name else key,
        lambda key, tensor: tensor.T if key == name else tensor,
    )
    bundle = load(renamed)
    assert_same_weights(bundle, load(tiny_sdxl_path))
    assert_same_tensors(tiny_sdxl_path, save(bundle, tmp_path / "out.safetensors"))


def test_first_encoder_without_its_upper_level(tiny_sdxl_path: Path, tmp_path: Path):
    bare = rewritten(tiny_sdxl_path, tmp_path / "bare.safetensors", lambda name: name.replace("text_model.", ""))
    bundle = load(bare)
    assert_same_weights(bundle, load(tiny_sdxl_path))
    assert f"{CLIP}text_model.final_layer_norm.weight" in load_file(save(bundle, tmp_path / "out.safetensors"))


def test_position_ids_that_became_floats_are_integers_again(tiny_sdxl_path: Path, tmp_path: Path):
    stray = f"{OPENCLIP}transformer.text_model.embeddings.position_ids"
    content = {**load_file(tiny_sdxl_path), stray: torch.arange(77)[None]}
    save_file({name: tensor.half() for name, tensor in content.items()}, tmp_path / "half.safetensors")
    written = load_file(save(load(tmp_path / "half.safetensors"), tmp_path / "out.safetensors"))
    for name in (stray, f"{CLIP}text_model.embeddings.position_ids"):
        assert written[name].dtype == torch.int64 and torch.equal(written[name], torch.arange(77)[None])


def test_the_words_of_config_files_of_other_programs(tiny_sdxl_path: Path, tmp_path: Path):
    """Old folders name no architecture in the second encoder's configuration; fp16 ones name their files so."""
    folder = save(load(tiny_sdxl_path), tmp_path / "folder")
    config = folder / "text_encoder_2" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in content.items() if key != "architectures"}))
    for name in ("unet/diffusion_pytorch_model", "text_encoder_2/model"):
        (folder / f"{name}.safetensors").rename(folder / f"{name}.fp16.safetensors")
    assert_same_weights(load(folder), load(tiny_sdxl_path))


def test_modules_are_frozen_whole_and_sized_by_the_file(tiny_sdxl_path: Path):
    bundle = load(tiny_sdxl_path, torch.bfloat16)
    for part in parts_of(bundle):
        assert not part.training
        for tensor in (*part.parameters(), *part.buffers()):
            assert not tensor.requires_grad and not tensor.is_meta
    assert [encoder.num_layers for encoder in bundle.text_encoders] == [2, 3]
    assert (bundle.unet.config.cross_attention_dim, bundle.unet.add_embedding.linear_1.in_features) == (192, 1664)
    assert not bundle.unet.config.upcast_attention
