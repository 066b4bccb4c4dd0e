"""tools/verify_model.py: what files are, whether they are sound, whether a base model has a use for them."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.safetensors_io import save_file, sshs_hashes
from library.checkpoints.sd import model_entries
from networks.lora import create_network
from networks.weights.file_identity import identify
from tests.full_size import meta_state
from tests.runs import ROOT
from tests.tiny_control import control_net_file, tiny_lllite
from tests.tiny_networks import perturb, tiny_parts
from tools import convert_diffusers20_original_sd, convert_lora
from tools.verify_model import TOOL


def verify(*words):
    return TOOL.run([str(word) for word in words])


def lora(path, kind="sd1", **metadata):
    text_encoder, unet = tiny_parts(kind)
    network = create_network(1.0, 4, 2.0, None, text_encoder, unet)
    perturb(network)
    network.save_weights(path, torch.float16, {"ss_network_dim": "4", **metadata})
    return path


SDXL = {entry.name: entry.shape for entry in model_entries(meta_state("sdxl"), None)}


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (SDXL, "SDXL checkpoint (U-Net, text encoder, VAE)"),
        ({"lora_unet_x_attn2_to_k.hada_w1_b": (4, 1024), "lora_unet_x_attn2_to_k.hada_w1_a": (8, 4)},
         "LoHa with 1 module for SD 2.x"),
        ({"lora_te1_x.lokr_w1": (4, 4), "lora_te1_x.lokr_w2": (9, 9)}, "LoKr with 1 module for SDXL"),
        ({"oft_unet_x.oft_blocks": (4, 8, 8), "oft_unet_x.alpha": ()}, "OFT with 1 module"),
        ({"lora_unet_x.lora_down.weight": (4, 8), "lora_unet_x.lora_up.weight": (8, 4), "lora_unet_y.diff": (8,)},
         "LoRA (1), full difference (1)"),
        ({"unet.x.attn2.to_v.lora_A.weight": (4, 768), "unet.x.attn2.to_v.lora_B.weight": (8, 4)},
         "LoRA with 1 module for SD 1.x"),
        ({"emb_params": (3, 768)}, "textual inversion of 3 vectors for SD 1.x"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion of 2 vectors for SDXL"),
        ({"<cat>": (1024,)}, "textual inversion of 1 vector for SD 2.x"),
        ({"something": (2, 3, 4)}, "nothing known"),
    ],
)  # fmt: skip
def test_what_files_are(shapes, what):
    assert identify(shapes).what.startswith(what)


def test_a_lora_with_its_base(tmp_path, tiny_sd1_path, capsys):
    tags = '{"10_cat": {"cat": 20, "1girl": 3}, "5_dog": {"cat": 1}}'
    path = lora(tmp_path / "a.safetensors", ss_tag_frequency=tags, ss_network_module="networks.lora")
    assert verify(path, "--base", tiny_sd1_path) == 0
    said = capsys.readouterr().out
    for line in (
        "LoRA with 204 modules", "most frequent tags  cat 21, 1girl 3", "changes 12 of 12 layers of the text encoders",
        "changes 192 of 277 layers", "every key is used", "right", "IN02", "sound",
    ):  # fmt: skip
        assert line in said, said
    assert convert_lora.TOOL.run([str(path), str(tmp_path / "b.safetensors")]) == 0
    assert verify(tmp_path / "b.safetensors", "--base", tiny_sd1_path) == 0


@pytest.mark.parametrize(
    ("metadata", "words", "kind"),
    [
        ({}, [], "an unknown kind of model"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, [], "SD 1.x (by its header)"),
        ({"ss_base_model_version": "sd_v2_v"}, [], "SD 2.x (by its header)"),
        ({}, ["--base"], "SD 1.x (by --base)"),
    ],
)
def test_the_kind_of_model_that_something_else_tells(metadata, words, kind, tmp_path, tiny_sd1_path, capsys):
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = load_file(lora(tmp_path / "whole.safetensors"))
    path = tmp_path / "a.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}, path, metadata)
    assert verify(path, *words, *([tiny_sd1_path] if words else []), "--header_only") == 0
    assert f"LoRA with 1 module for {kind}\n" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"])
def test_hashes_may_be_written_with_0x(key, tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors")
    tensors = load_file(path)
    model_hash, legacy_hash = sshs_hashes(tensors, {})
    right = legacy_hash if "legacy" in key else model_hash
    for text, is_right in ((f"0x{right}", True), (right, True), (f"0x1{right[1:]}", right[0] == "1")):
        save_file(tensors, path, {key: text})
        assert verify(path) == (0 if is_right else 2)
        assert ("wrong" in capsys.readouterr().out) != is_right


def test_the_change_of_a_block_is_that_of_its_weights(tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors")
    tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
    square = 0.0
    for key, down in tensors.items():
        if "mid_block" in key and "lora_down" in key:
            up = tensors[key.replace("lora_down", "lora_up")].flatten(1)
            square += float((up @ down.flatten(1) * 0.5).norm()) ** 2
    assert verify(path) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["MID"]]
    assert float(row.split()[-2]) == pytest.approx(square**0.5, rel=1e-3)


def test_wrong_base_and_foreign_keys_are_listed(tmp_path, tiny_sd1_path, tiny_sd2_path, capsys):
    path = lora(tmp_path / "a.safetensors")
    assert verify(path, "--base", tiny_sd2_path, "--header_only") == 2
    assert "outputs, the base's layer has" in capsys.readouterr().out
    tensors = load_file(path)
    stray = "lora_unet_mid_block_attentions_7_proj_in"
    save_file(tensors | {f"{stray}.lora_down.weight": torch.ones(2, 8)}, tmp_path / "b.safetensors")
    assert verify(tmp_path / "b.safetensors", "--base", tiny_sd1_path, "--header_only") == 2
    captured = capsys.readouterr()
    assert f"{stray}.lora_down.weight: no such layer in the base" in captured.out
    assert f"{stray}.lora_up.weight" in captured.out
    assert "1 key would not be used by the base; 1 key missing for the base" in captured.err
    assert verify(tmp_path / "b.safetensors") == 2
    assert "is incomplete" in capsys.readouterr().err


def test_nan_infinity_and_wrong_hashes(tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors")
    data = bytearray(path.read_bytes())
    data[-2:] = (0x7E00).to_bytes(2, "little")  # NaN in half precision
    data[-4:-2] = (0x7C00).to_bytes(2, "little")  # infinity
    path.write_bytes(data)
    assert verify(path) == 2
    captured = capsys.readouterr()
    assert "1 NaN and 1 infinite numbers in 1 tensor" in captured.err
    assert "sshs_model_hash, sshs_legacy_hash of its header" in captured.err or "sshs_model_hash of its" in captured.err
    assert "1 NaN, 1 infinite" in captured.out
    assert verify(path, "--header_only") == 0


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_models_and_folders(kind, tmp_path, request, capsys):
    path = request.getfixturevalue(f"tiny_{kind}_path")
    assert convert_diffusers20_original_sd.TOOL.run([str(path), str(tmp_path / "folder"), "--use_safetensors"]) == 0
    capsys.readouterr()
    for words in ([path, "--base", path], [tmp_path / "folder", "--base", path], [path, "--base", tmp_path / "folder"]):
        assert verify(*words, "--header_only") == 0
        assert "every key is used" in capsys.readouterr().out
    tensors = load_file(path)
    removed = next(key for key in tensors if key.endswith("attn2.to_k.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != removed}, tmp_path / "lacks.safetensors")
    assert verify(tmp_path / "lacks.safetensors") == 2
    assert "it lacks 1 tensor of its own model" in capsys.readouterr().err
    assert verify(tmp_path / "folder") == 0
    assert "vae" in capsys.readouterr().out
    assert verify(tmp_path / "folder" / "vae", "--base", path) == 0
    assert "VAE, Diffusers' layout" in capsys.readouterr().out
    assert verify(tmp_path / "folder" / "unet", "--base", path) == 0
    shutil.rmtree(tmp_path / "folder" / "vae")
    assert verify(tmp_path / "folder") == 2


def test_other_files(tmp_path, tiny_sd1_path, tiny_sdxl_path, capsys):
    torch.save({"string_to_param": {"*": torch.randn(2, 64)}, "name": "cat"}, tmp_path / "words.pt")
    pair = {"linear1.weight": torch.randn(128, 64), "linear2.weight": torch.randn(64, 128)}
    torch.save({64: [pair, pair]}, tmp_path / "hyper.pt")
    tiny_lllite(tmp_path / "lllite.safetensors")
    control_net_file(tmp_path)
    cases = [
        ("words.pt", tiny_sd1_path, "textual inversion of 2 vectors"),
        ("hyper.pt", tiny_sd1_path, "hypernetwork of the widths 64"),
        ("lllite.safetensors", tiny_sdxl_path, "ControlNet-LLLite for SDXL"),
        ("control.safetensors", tiny_sd1_path, "ControlNet for"),
    ]
    for name, base, what in cases:
        assert verify(tmp_path / name, "--base", base) == 0, name
        said = capsys.readouterr().out
        assert what in said and "every key is used" in said, said
    assert verify(tmp_path / "lllite.safetensors", "--base", tiny_sd1_path) == 2


def test_what_is_no_model_is_one_sentence(tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-3])
    (tmp_path / "text.ckpt").write_text("hello")
    save_file({"x.y.z": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, said in (
        ("cut.safetensors", "truncated"), ("text.ckpt", "is no model file"), ("other.safetensors", "no file of the"),
        ("gone.safetensors", "does not exist"),
    ):  # fmt: skip
        assert verify(tmp_path / name) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_headers_are_read_without_torch(tmp_path, tiny_sd1_path):
    path = lora(tmp_path / "a.safetensors")
    code = (
        "import sys; from tools.verify_model import TOOL; r = TOOL.run(sys.argv[1:]); print(r, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, path, "--header_only", "--base", tiny_sd1_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False"


def test_objects_of_a_pickle_that_are_not_loaded_are_named(tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors")
    torch.save({"state_dict": load_file(path), "callback": tmp_path}, tmp_path / "a.pt")
    assert verify(tmp_path / "a.pt") == 0
    said = capsys.readouterr().out
    assert "not loaded" in said and "objects of pathlib." in said


def test_alphas_alone_are_no_network(tmp_path, tiny_sd1_path, capsys):
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{name}.alpha": torch.ones(())}, tmp_path / "a.safetensors")
    assert verify(tmp_path / "a.safetensors") == 2
    assert f"is incomplete: {name} has no lora_down.weight" in capsys.readouterr().err
    assert verify(tmp_path / "a.safetensors", "--base", tiny_sd1_path) == 2
    assert "2 keys missing for the base" in capsys.readouterr().err


def test_alphas_in_headers_that_are_no_numbers(tmp_path, capsys):
    tensors = {"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": NaN}'})
    assert verify(tmp_path / "a.safetensors") == 2
    assert "the alpha of unet.x is nan" in capsys.readouterr().err
