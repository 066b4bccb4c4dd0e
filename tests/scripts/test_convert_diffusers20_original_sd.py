"""tools/convert_diffusers20_original_sd.py: models and ControlNets there and back, bit for bit."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.checkpoints.safetensors_io import save_file
from library.checkpoints.weights import load_tensors, open_weights
from tests.runs import ROOT
from tests.tiny_control import original_names, tiny_control_net
from tools import verify_model
from tools.convert_diffusers20_original_sd import TOOL

HEAVY = ("diffusers", "transformers", "accelerate", "safetensors")
KINDS = ("sd1", "sd2", "sdxl")


def convert(*words):
    return TOOL.run([str(word) for word in words])


def same(one, other):
    return one.keys() == other.keys() and all(
        tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]) for key, tensor in one.items()
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, request):
    """Diffusers folders of the tiny models, converted from their files; don't write to them."""
    folder = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        path = request.getfixturevalue(f"tiny_{kind}_path")
        assert convert(path, folder / kind, "--use_safetensors") == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_equal(kind, folders, tmp_path, request):
    """All tensors of the file, those beside the model too."""
    path = request.getfixturevalue(f"tiny_{kind}_path")
    assert convert(folders / kind, tmp_path / "back.safetensors") == 0
    assert same(load_file(tmp_path / "back.safetensors"), load_file(path))
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == ("v" if kind == "sd2" else "epsilon")
    assert metadata["modelspec.title"] == "back"


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_the_folder_as_it_loads_the_trainers(kind, folders, request):
    from diffusers import DiffusionPipeline

    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.families.sdxl import StableDiffusionXL
    from library.models.options import AttentionOptions

    pipeline = DiffusionPipeline.from_pretrained(folders / kind)
    family = StableDiffusionXL() if kind == "sdxl" else StableDiffusion()
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    path = str(request.getfixturevalue(f"tiny_{kind}_path"))
    ours = family.load(ModelOptions(pretrained_model_name_or_path=path), AttentionOptions(), plan)
    assert same(dict(pipeline.unet.state_dict()), dict(ours.unet.state_dict()))
    assert same(dict(pipeline.vae.state_dict()), dict(ours.vae.state_dict()))
    for key, value in ours.unet.config.items():
        mine = pipeline.unet.config[key]
        assert key.startswith("_") or (list(mine) if isinstance(mine, tuple) else mine) == (
            list(value) if isinstance(value, tuple) else value
        ), key
    assert pipeline.vae.config.scaling_factor == ours.vae.config.scaling_factor
    ids = torch.randint(0, 49408, (1, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(pipeline.text_encoder(ids)[0], ours.text_encoders[0](ids))
        if kind == "sdxl":
            states, pooled = ours.text_encoders[1](ids)
            theirs = pipeline.text_encoder_2(ids)
            torch.testing.assert_close(theirs.last_hidden_state, states)
            assert pipeline.text_encoder_2.text_projection.weight.shape == (128, 128)
            torch.testing.assert_close(theirs.text_embeds.shape, pooled.shape)
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    assert pipeline.scheduler.config.prediction_type == prediction


def test_precisions_pickles_and_variants(folders, tmp_path, tiny_sd1_path):
    """File -> .bin folder in fp16 -> its files as a variant -> .ckpt with counters -> .safetensors."""
    assert convert(tiny_sd1_path, tmp_path / "folder", "--v1", "--fp16") == 0
    unet = tmp_path / "folder" / "unet"
    assert not list(tmp_path.rglob("*.safetensors")) or [p.name for p in tmp_path.rglob("*.safetensors")] == [
        "single_file_extras.safetensors"
    ]
    for path in list((tmp_path / "folder").rglob("*.bin")):
        path.rename(path.with_name(path.name.replace(".bin", ".fp16.bin")))
    assert (unet / "diffusion_pytorch_model.fp16.bin").is_file()
    assert convert(tmp_path / "folder", tmp_path / "a.ckpt", "--variant", "fp16", "--epoch", 3, "--global_step", 9) == 0
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 9)
    assert convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", "--metadata", "{'author': 'me', 'n': 1}") == 0
    original, made = load_file(tiny_sd1_path), load_file(tmp_path / "b.safetensors")
    assert original.keys() == made.keys()
    for key, tensor in original.items():
        is_model = key.startswith(("model.diffusion", "first_stage", "cond_stage")) and tensor.is_floating_point()
        assert torch.equal(made[key], tensor.half() if is_model else tensor)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["author"] == "me" and file.metadata()["n"] == "1"


def test_the_reference_gives_what_the_model_does_not_hold(folders, tmp_path, tiny_sd1_path):
    assert convert(folders / "sd1", tmp_path / "out", "--use_safetensors", "--reference_model", folders / "sd2") == 0
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon"  # of the model, not of the reference
    (tmp_path / "out" / "single_file_extras.safetensors").unlink()
    assert convert(tmp_path / "out", tmp_path / "bare.safetensors") == 0
    assert convert(tmp_path / "out", tmp_path / "full.safetensors", "--reference_model", tiny_sd1_path) == 0
    assert "alphas_cumprod" not in load_file(tmp_path / "bare.safetensors")
    assert same(load_file(tmp_path / "full.safetensors"), load_file(tiny_sd1_path))


def test_folders_with_convolutions_for_sd2s_projections_become_files_with_matrices(folders, tmp_path, tiny_sd2_path):
    import shutil

    shutil.copytree(folders / "sd2", tmp_path / "conv")
    weights = tmp_path / "conv" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors |= {
        key: tensor[..., None, None]
        for key, tensor in tensors.items()
        if key.endswith(("proj_in.weight", "proj_out.weight"))
    }
    save_file(tensors, weights)
    assert convert(tmp_path / "conv", tmp_path / "a.safetensors") == 0
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tiny_sd2_path))


# ------------------------------------------------------------------------------------------ ControlNets


@pytest.mark.parametrize("kind", KINDS)
def test_control_nets_there_and_back(kind, tmp_path):
    from diffusers import ControlNetModel

    net = tiny_control_net(kind)
    with_prefix, without = original_names(net), original_names(net, prefix="")
    save_file(with_prefix, tmp_path / "a.safetensors", {"author": "me"})
    save_file(without, tmp_path / "trained.safetensors")
    flags = ["--v2"] if kind == "sd2" else []
    assert convert(tmp_path / "trained.safetensors", tmp_path / "folder", "--use_safetensors", *flags) == 0
    theirs = ControlNetModel.from_pretrained(tmp_path / "folder")
    assert same(dict(theirs.state_dict()), dict(net.state_dict()))
    assert convert(tmp_path / "folder", tmp_path / "b.safetensors") == 0
    assert same(load_file(tmp_path / "b.safetensors"), with_prefix)
    diffusers_file = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    assert convert(diffusers_file, tmp_path / "c.ckpt", "--fp16") == 0
    assert same(load_tensors(tmp_path / "c.ckpt"), {key: tensor.half() for key, tensor in with_prefix.items()})


# --------------------------------------------------------------------------------------- the command line


def test_as_a_command_without_the_model_libraries(tmp_path, tiny_sdxl_path):
    code = (
        "import sys; from tools.convert_diffusers20_original_sd import TOOL; "
        f"assert TOOL.run(sys.argv[1:]) == 0; print([n for n in {HEAVY} if n in sys.modules])"
    )
    command = [sys.executable, "-c", code, tiny_sdxl_path, tmp_path / "out", "--bf16", "--use_safetensors"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert "SDXL, Diffusers layout, BF16" in result.stderr
    with open_weights(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors") as weights:
        assert set(weights.dtypes.values()) == {"BF16"}


def test_mistakes_leave_nothing_behind(folders, tmp_path, tiny_sd1_path, capsys):
    source = tmp_path / "m.safetensors"
    tensors = load_file(tiny_sd1_path)
    save_file(tensors, source)
    save_file(
        {key: value for key, value in tensors.items() if "up.0.block.0" not in key}, tmp_path / "no_vae.safetensors"
    )
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-5])
    key = "model.diffusion_model.out.2.bias"
    torch.save(tensors | {key: tensors[key] * float("nan")}, tmp_path / "nan.ckpt")
    save_file({"difference": torch.zeros(()), **original_names(tiny_control_net())}, tmp_path / "diff.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = tmp_path / "out"
    cases = [
        ([source, source], "is the model to convert, which would be replaced"),
        ([folders / "sd1", folders / "sd1"], "is the model to convert"),
        ([source, out, "--v2"], "--v2: the model"),
        ([source, out, "--v1", "--v2"], "--v1: stands beside --v2"),
        ([source, out, "--fp16", "--bf16"], "several precisions"),
        ([source, out, "--unet_use_linear_projection"], "are convolutions"),
        ([source, out, "--variant", "fp16"], "--variant: "),
        ([folders / "sd1", tmp_path / "a.safetensors", "--variant", "fp16"], "holds no diffusion_pytorch_model.fp16"),
        ([source, tmp_path / "a.ckpt", "--metadata", "{'a': 1}"], "--metadata: only .safetensors"),
        ([source, tmp_path / "a.safetensors", "--metadata", "nonsense"], "is no Python dictionary"),
        ([source, out, "--reference_model", source], "no Diffusers folder with a scheduler"),
        ([source, tmp_path / "mine"], "is no Diffusers folder"),
        ([tmp_path / "cut.safetensors", out], "is truncated"),
        ([tmp_path / "no_vae.safetensors", out], "lacks 8 tensors of the VAE"),
        ([tmp_path / "diff.safetensors", out], "holds the differences"),
        ([tmp_path / "gone.safetensors", out], "does not exist"),
        ([tmp_path / "mine", out], "is no Diffusers model"),
    ]
    for words, said in cases:
        assert convert(*words) == 2, words
        error = capsys.readouterr().err
        assert said in error, error
        assert len([line for line in error.splitlines() if "converting" not in line]) == 1, error
    for output in (out, tmp_path / "a.safetensors"):
        assert convert(tmp_path / "nan.ckpt", output) == 2
        assert "holds NaN or infinity" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model_index.json", "{", "model_index.json is no valid JSON"),
        ("model_index.json", "[]", "model_index.json holds no JSON object"),
        ("unet/config.json", "[]", "unet/config.json holds no JSON object"),
        ("unet/config.json", "[" * 100_000, "unet/config.json is no valid JSON"),
        ("scheduler/scheduler_config.json", "[1]", "scheduler_config.json holds no JSON object"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "{}", "index.json has no weight_map"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": 1}}', "has no weight_map"),
    ],
)
def test_a_damaged_folder_is_one_sentence(folders, tmp_path, capsys, name, content, said):
    shutil.copytree(folders / "sd1", tmp_path / "folder", copy_function=os.link)
    if "index" in name and name.startswith("unet"):
        (tmp_path / "folder" / name.removesuffix(".index.json")).unlink()
    (tmp_path / "folder" / name).unlink(missing_ok=True)
    (tmp_path / "folder" / name).write_text(content)
    capsys.readouterr()
    runs = [verify_model.TOOL.run([str(tmp_path / "folder"), "--header_only"])]
    if name != "model_index.json":  # which the other tool does not need
        runs.append(convert(tmp_path / "folder", tmp_path / "out.safetensors"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert runs == [2] * len(runs) == [2] * len(lines) and all(said in line for line in lines), lines


def test_numbers_that_a_precision_cannot_hold_and_nan_name_file_and_way_out(tmp_path, tiny_sd1_path, capsys):
    tensors = load_tensors(tiny_sd1_path)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    for value, said in ((1e6, "conv_in.weight|input_blocks.0.0.weight"), (float("nan"), "holds NaN or infinity")):
        tensors[name].view(-1)[0] = value
        torch.save(tensors, tmp_path / "odd.ckpt")
        for output in ("new.safetensors", "new.ckpt", "new"):
            assert convert(tmp_path / "odd.ckpt", tmp_path / output, "--fp16") == 2
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert str(tmp_path / "odd.ckpt") in last and re.search(said, last)
            way_out = "is too large for float16; use --save_precision_as bf16 or float"
            assert last.endswith(way_out if value == 1e6 else "get the model again, or another one")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.ckpt"]


def test_places_that_cannot_be_written(tmp_path, tiny_sd1_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("loop", "loop.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / name)
    loop = "leads through a link that leads to itself"
    places = {"file/new": "can't be written", "loop": loop, "loop.safetensors": loop, "loop/x.safetensors": loop}
    for output, said in places.items():
        assert convert(tiny_sd1_path, tmp_path / output) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in last and str(tmp_path / output) in last
