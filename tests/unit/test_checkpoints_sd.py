"""Loading and saving SD 1.x / 2.x: single files, pickles, Diffusers folders, external VAEs; nothing lost on the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from library.checkpoints.safetensors_io import NonFiniteError
from library.checkpoints.weights import open_weights
from library.families.base import Conditioning, LoadPlan, ModelBundle
from library.families.options import ModelOptions, TextOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from tests.tiny_models import tiny_sd_checkpoint, tiny_state

FAMILY = StableDiffusion()
CLIP = "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."


def load(path: Path | str, dtype: torch.dtype = torch.float32, **options) -> ModelBundle:
    plan = LoadPlan(dtype, dtype, dtype, torch.device("cpu"))
    return FAMILY.load(ModelOptions(str(path), **options), AttentionOptions(), plan)


def save(bundle: ModelBundle, path: Path, dtype: torch.dtype | None = None, metadata: dict | None = None) -> Path:
    FAMILY.save(bundle, path, dtype=dtype, metadata=metadata or {}, as_diffusers=not path.suffix)
    return path


def assert_same_tensors(left: Path, right: Path) -> None:
    one, two = load_file(left), load_file(right)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def tensors_of(bundle: ModelBundle) -> list[torch.Tensor]:
    parts = (bundle.unet, bundle.text_encoders[0], bundle.vae)
    return [tensor for part in parts for tensor in part.state_dict().values()]


def assert_same_weights(left: ModelBundle, right: ModelBundle) -> None:
    for one, two in zip(tensors_of(left), tensors_of(right), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.fixture(params=["sd1", "sd2"])
def tiny_path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_path")


# ------------------------------------------------------------------------------------------ round trips


def test_single_file_comes_back_bit_equal_with_all_its_other_keys(tiny_path: Path, tmp_path: Path):
    written = save(load(tiny_path), tmp_path / "out.safetensors", metadata={"modelspec.title": "x"})
    assert_same_tensors(tiny_path, written)
    assert open_weights(written).metadata == {"modelspec.title": "x"}


def test_the_way_through_diffusers_loses_nothing(tiny_path: Path, tmp_path: Path):
    folder = save(load(tiny_path), tmp_path / "folder")
    bundle = load(folder)
    assert_same_weights(bundle, load(tiny_path))
    assert bundle.source.kind == load(tiny_path).source.kind
    assert_same_tensors(tiny_path, save(bundle, tmp_path / "back.safetensors"))
    again = save(bundle, tmp_path / "again")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    for name in files:
        same = (folder / name).read_bytes() == (again / name).read_bytes()
        assert same or name == "single_file_extras.safetensors", name
    extras = "single_file_extras.safetensors"
    assert_same_tensors(folder / extras, again / extras)


def test_saving_over_the_source_itself(tmp_path: Path):
    path = tiny_sd_checkpoint(tmp_path / "model.safetensors", "sd2")
    before = load_file(path)
    save(load(path), path)
    after = load_file(path)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_saving_over_a_folder(tiny_sd1_path: Path, tmp_path: Path):
    folder = save(load(tiny_sd1_path), tmp_path / "folder")
    (folder / "unet" / "config.json").touch()
    save(load(folder), folder)
    assert (folder / "unet" / "config.json").exists() and [path.name for path in tmp_path.iterdir()] == ["folder"]
    (folder / "notes.txt").write_text("mine")
    save(load(folder), folder)
    assert (folder / "notes.txt").read_text() == "mine", "what is not ours stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder-2"]


def test_precision_of_saved_files(tiny_sd1_path: Path, tmp_path: Path):
    bundle = load(tiny_sd1_path)
    written = load_file(save(bundle, tmp_path / "half.safetensors", torch.float16))
    source = load_file(tiny_sd1_path)
    for name, tensor in written.items():
        own = name.startswith(("model.diffusion_model.", CLIP, "first_stage_model.")) and "position_ids" not in name
        assert tensor.dtype == (torch.float16 if own else source[name].dtype), name
    half = load(save(bundle, tmp_path / "half", torch.float16), torch.float16)
    assert_same_weights(half, load(tiny_sd1_path, torch.float16))


def test_ckpt_is_written_and_read_and_counters_add_up(tiny_path: Path, tmp_path: Path):
    first = save(load(tiny_path), tmp_path / "a.ckpt", metadata={"ss_epoch": "2", "ss_steps": "30"})
    second = save(load(first), tmp_path / "b.ckpt", metadata={"ss_epoch": "1", "ss_steps": "5"})
    content = torch.load(second, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 35)
    source = load_file(tiny_path)
    assert content["state_dict"].keys() == source.keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in content["state_dict"].items())


def test_source_that_is_gone_is_no_reason_to_lose_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tiny_sd_checkpoint(tmp_path / "model.safetensors", "sd1")
    bundle = load(path)
    path.unlink()
    with caplog.at_level(logging.WARNING):
        written = save(bundle, tmp_path / "out.safetensors")
    assert "is gone" in caplog.text
    assert_same_weights(load(written), bundle)


def test_weights_that_are_not_finite_are_not_saved(tiny_sd1_path: Path, tmp_path: Path):
    bundle = load(tiny_sd1_path)
    bundle.unet.conv_out.bias.data[0] = float("nan")
    for name in ("x.safetensors", "x.ckpt", "x"):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            save(bundle, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------- variants of files


def rewritten(source: Path, path: Path, rename=lambda name: name, change=lambda name, tensor: tensor) -> Path:
    """A copy of a file with names and tensors changed; a name that becomes "" is left out."""
    content = {rename(name): change(name, tensor).contiguous() for name, tensor in load_file(source).items()}
    content.pop("", None)
    save_file(content, path)
    return path


def test_text_keys_without_their_upper_level(tiny_sd1_path: Path, tmp_path: Path):
    bare = rewritten(tiny_sd1_path, tmp_path / "bare.safetensors", lambda name: name.replace("text_model.", ""))
    bundle = load(bare)
    assert_same_weights(bundle, load(tiny_sd1_path))
    written = load_file(save(bundle, tmp_path / "out.safetensors"))
    assert f"{CLIP}text_model.final_layer_norm.weight" in written
    assert f"{CLIP}final_layer_norm.weight" not in written


def test_position_ids_that_became_floats_are_integers_again(tiny_sd1_path: Path, tmp_path: Path):
    halved = rewritten(tiny_sd1_path, tmp_path / "half.safetensors", change=lambda name, tensor: tensor.half())
    written = load_file(save(load(halved), tmp_path / "out.safetensors"))
    ids = written[f"{CLIP}text_model.embeddings.position_ids"]
    assert ids.dtype == torch.int64 and torch.equal(ids, torch.arange(77)[None])


def test_pruned_half_precision_file(tiny_path: Path, tmp_path: Path):
    """Nothing but the three parts, in fp16, loads straight to any precision."""
    parts = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.")
    pruned = rewritten(
        tiny_path,
        tmp_path / "pruned.safetensors",
        lambda name: name if name.startswith(parts) and "position_ids" not in name else "",
        lambda name, tensor: tensor.half(),
    )
    bundle = load(pruned, torch.float32)
    assert {tensor.dtype for tensor in tensors_of(bundle)} == {torch.float32}
    assert_same_weights(load(pruned, torch.float16), load(tiny_path, torch.float16))


def test_sd2_projections_of_either_rank(tiny_sd2_path: Path, tmp_path: Path):
    """Some files hold proj_in and proj_out as 1x1 convolutions; we write what SD 2.x files have."""

    def as_convolutions(name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_projection = name.endswith((".1.proj_in.weight", ".1.proj_out.weight"))
        return tensor[..., None, None] if is_projection else tensor

    converted = rewritten(tiny_sd2_path, tmp_path / "conv.safetensors", change=as_convolutions)
    assert_same_weights(load(converted), load(tiny_sd2_path))
    assert_same_tensors(tiny_sd2_path, save(load(converted), tmp_path / "out.safetensors"))


def test_sd2_from_diffusers_alone_gets_what_readers_expect(tiny_sd2_path: Path, tmp_path: Path):
    folder = save(load(tiny_sd2_path), tmp_path / "folder")
    (folder / "single_file_extras.safetensors").unlink()
    written = load_file(save(load(folder), tmp_path / "out.safetensors"))
    last, unused = (f"{OPENCLIP}transformer.resblocks.{i}." for i in (1, 2))
    names = [name for name in written if name.startswith(last)]
    assert len(names) == 12
    assert all(torch.equal(written[name], written[name.replace(last, unused)]) for name in names)
    assert torch.equal(written[f"{OPENCLIP}text_projection"], torch.eye(64))
    assert written[f"{OPENCLIP}logit_scale"] == 1
    assert_same_weights(load(tmp_path / "out.safetensors"), load(tiny_sd2_path))


def test_old_and_new_spellings_of_diffusers_folders(tiny_sd1_path: Path, tmp_path: Path):
    """transformers 5 writes text keys without a level; diffusers before 0.17 named VAE attention otherwise, in .bin."""
    folder = save(load(tiny_sd1_path), tmp_path / "folder")
    text = folder / "text_encoder" / "model.safetensors"
    rewritten(text, text, lambda name: name.removeprefix("text_model."))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    content = load_file(vae)
    for new_name, old_name in old.items():
        content = {
            name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}."): t for name, t in content.items()
        }
    vae.unlink()
    torch.save(content, folder / "vae" / "diffusion_pytorch_model.bin")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert_same_weights(load(folder), load(tiny_sd1_path))


def test_sharded_component(tiny_sd1_path: Path, tmp_path: Path):
    folder = save(load(tiny_sd1_path), tmp_path / "folder")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = load_file(whole)
    whole.unlink()
    names = sorted(content)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, members in shards.items():
        save_file({name: content[name] for name in members}, folder / "unet" / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "unet" / f"{whole.name}.index.json").write_text(json.dumps(index))
    assert_same_weights(load(folder), load(tiny_sd1_path))


# --------------------------------------------------------------------------------------- what a load gives


def test_modules_are_frozen_whole_and_alone_in_memory(tiny_path: Path):
    bundle = load(tiny_path, torch.bfloat16)
    for part in (bundle.unet, *bundle.text_encoders, bundle.vae):
        assert not part.training
        for tensor in (*part.parameters(), *part.buffers()):
            assert not tensor.requires_grad and not tensor.is_meta
    assert {tensor.dtype for tensor in tensors_of(bundle)} == {torch.bfloat16}


def test_weights_do_not_share_memory_with_the_file(tiny_sd1_path: Path):
    bundle = load(tiny_sd1_path)
    for tensor in tensors_of(bundle):
        tensor.zero_()
    assert load_file(tiny_sd1_path)["model.diffusion_model.out.2.weight"].abs().sum() > 0


def test_family_rules(tiny_sd1_path: Path, tiny_sd2_path: Path):
    sd1, sd2 = load(tiny_sd1_path), load(tiny_sd2_path)
    heads = [block.attentions[0].transformer_blocks[0].attn1.heads for block in sd1.unet.down_blocks[:3]]
    assert heads == [8, 8, 8]
    attentions = [block.attentions[0].transformer_blocks[0].attn1 for block in sd2.unet.down_blocks[:3]]
    assert [attention.to_q.out_features // attention.heads for attention in attentions] == [64, 64, 64]
    assert isinstance(sd1.unet.down_blocks[0].attentions[0].proj_in, torch.nn.Conv2d)
    assert isinstance(sd2.unet.down_blocks[0].attentions[0].proj_in, torch.nn.Linear)
    assert sd2.unet.config.upcast_attention and not sd1.unet.config.upcast_attention
    assert (sd1.tokenizers[0].pad_id, sd2.tokenizers[0].pad_id) == (49407, 0)
    assert FAMILY.describe(sd1)["ss_base_model_version"] == "sd_v1"
    assert FAMILY.describe(sd2)["ss_base_model_version"] == "sd_v2_v"
    assert (FAMILY.describe(sd1)["ss_v2"], FAMILY.describe(sd2)["ss_v2"]) == (False, True)


def test_diffusers_reads_our_folder_and_computes_the_same(tiny_path: Path, tmp_path: Path):
    bundle = load(tiny_path)
    pipeline = StableDiffusionPipeline.from_pretrained(save(bundle, tmp_path / "folder"))
    ids = FAMILY.tokenize(bundle.tokenizers, ["a photo of a cat, (very) large"], 1).ids
    theirs = pipeline.tokenizer("a photo of a cat, (very) large", padding="max_length", max_length=77)
    assert theirs.input_ids == ids[0][0, 0].tolist()
    context = FAMILY.encode_text(bundle.text_encoders, ids, TextOptions()).context_BTD
    noised, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        assert torch.allclose(pipeline.text_encoder(ids[0][:, 0])[0], context, atol=1e-5)
        theirs = pipeline.unet(noised, timesteps, context).sample
    conditioning = Conditioning(context)
    assert torch.allclose(theirs, FAMILY.predict(bundle.unet, noised, timesteps, conditioning), atol=1e-5)
    expected = "v_prediction" if bundle.source.v_prediction else "epsilon"
    assert pipeline.scheduler.config.prediction_type == expected
    keys = load_file(tmp_path / "folder" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in keys)


# ----------------------------------------------------------------------------------------- external VAE


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One VAE, unlike the tiny models', in every format."""
    folder = tmp_path_factory.mktemp("vae")
    checkpoint = tiny_sd_checkpoint(folder / "model.safetensors", "sd1", seed=7)
    diffusers = save(load(checkpoint), folder / "model")
    state = dict(tiny_state("sd1", seed=7).vae)
    torch.save(state, folder / "vae.bin")
    save_file(state, folder / "vae_diffusers.safetensors")
    prefix = "first_stage_model."
    bare = rewritten(
        checkpoint, folder / "vae_bare.safetensors", lambda name: name.removeprefix(prefix) if prefix in name else ""
    )
    torch.save({"state_dict": load_file(bare)}, folder / "vae_bare.pt")
    return {
        "checkpoint": checkpoint,
        "diffusers model": diffusers,
        "diffusers vae": diffusers / "vae",
        "bin": folder / "vae.bin",
        "diffusers file": folder / "vae_diffusers.safetensors",
        "bare": bare,
        "bare pickle": folder / "vae_bare.pt",
    }


@pytest.mark.parametrize(
    "form", ["checkpoint", "diffusers model", "diffusers vae", "bin", "diffusers file", "bare", "bare pickle"]
)
def test_external_vae(form: str, other_vae: dict[str, Path], tiny_sd1_path: Path):
    bundle = load(tiny_sd1_path, vae=str(other_vae[form]))
    expected = tiny_state("sd1", seed=7).vae
    state = bundle.vae.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    own = load(tiny_sd1_path)
    assert torch.equal(own.unet.conv_in.weight, bundle.unet.conv_in.weight)
    assert not torch.equal(own.vae.decoder.conv_in.weight, bundle.vae.decoder.conv_in.weight)


def test_vae_given_for_a_file_without_one(tiny_sd1_path: Path, tmp_path: Path, other_vae: dict[str, Path]):
    def without_vae(name: str) -> str:
        return "" if name.startswith("first_stage_model.") else name

    path = rewritten(tiny_sd1_path, tmp_path / "no_vae.safetensors", without_vae)
    bundle = load(path, vae=str(other_vae["bare"]))
    assert torch.equal(bundle.vae.quant_conv.bias, tiny_state("sd1", seed=7).vae["quant_conv.bias"])
