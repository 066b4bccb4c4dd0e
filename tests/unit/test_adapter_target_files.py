"""NetworkTarget and files: what it starts from, what it refuses, what it writes."""

from __future__ import annotations

import errno
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.safetensors_io import NonFiniteError, read_header, save_file
from library.checkpoints.weights import load_tensors
from library.families.base import ModelBundle
from library.options import OptionError
from tests.network_targets import load, ready, target, trained_file
from tests.tiny_networks import outputs


@pytest.fixture
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    return load(tiny_sd1_path)


# ---------------------------------------------------------------------------------------------- refusals


def test_truncated_weights_are_refused_before_a_model_is_loaded(tmp_path, bundle):
    made, _ = ready(bundle)
    made.save(tmp_path / "whole.safetensors", dtype=None, metadata={})
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OptionError, match="--network_weights: .*half.safetensors is truncated"):
        target(network_weights=str(tmp_path / "half.safetensors")).options.check_before_start()


def test_weights_of_another_network_are_refused(tmp_path, bundle):
    tensors = {f"lora_unet_elsewhere.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(
        OptionError, match="--network_weights: no tensor of .*other.safetensors belongs to this network"
    ):
        ready(bundle, network_weights=str(tmp_path / "other.safetensors"))


def without_ups(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if "lora_up" not in key}


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value * float("nan") for key, value in tensors.items()}


@pytest.mark.parametrize("flag", ["network_weights", "dim_from_weights", "base_weights"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_ups, "is incomplete: lora_te_text_model_encoder_layers_0_self_attn_k_proj has no lora_up.weight"),
        (with_nan, "holds NaN or infinity"),
        (None, "is damaged or truncated"),
        ("family", "was made for another model family: lora_"),
    ],
)
def test_files_that_can_not_serve_are_named_with_their_flag(
    tmp_path, tiny_sd1_path, tiny_sd2_path, flag, damage, message
):
    made, _ = ready(load(tiny_sd1_path))
    file = tmp_path / "bad.pt"
    tensors = dict(made.trained_module().state_dict())
    torch.save(damage(tensors) if callable(damage) else tensors, file)
    if damage is None:
        file.write_bytes(file.read_bytes()[:-5000])
    model = load(tiny_sd2_path if damage == "family" else tiny_sd1_path)
    options: dict[str, Any] = {"base_weights": (str(file),)} if flag == "base_weights" else {
        "network_weights": str(file), "dim_from_weights": flag == "dim_from_weights"
    }  # fmt: skip
    shown = "--base_weights" if flag == "base_weights" else "--network_weights"
    with pytest.raises(OptionError, match=f"^{shown}: .*bad.pt {message}"):
        ready(model, **options)


def test_what_dim_from_weights_decides_is_said(tmp_path, tiny_sd1_path, caplog):
    trained_file(tmp_path / "a.safetensors", load(tiny_sd1_path))
    options = {"network_weights": str(tmp_path / "a.safetensors"), "dim_from_weights": True}
    ready(load(tiny_sd1_path), **options, network_dim=8, network_args=("conv_dim=4",))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "--network_dim has no effect beside --dim_from_weights",
        f"--network_args conv_dim: no effect, {tmp_path / 'a.safetensors'} decides about ranks and alphas",
    ]


# ---------------------------------------------------------------------------------------------- files


def test_going_on_from_weights(tmp_path, tiny_sd1_path, caplog):
    file = tmp_path / "first.safetensors"
    first_bundle = load(tiny_sd1_path)
    first = trained_file(file, first_bundle, network_dim=3, network_args=("conv_dim=2",))
    with caplog.at_level(logging.INFO):
        second, _ = ready(load(tiny_sd1_path), network_dim=3, network_weights=str(file))
    assert "612 of the network's 612 tensors loaded, 255 of the file's not used" in caplog.text
    bundle = load(tiny_sd1_path)
    third, _ = ready(bundle, network_weights=str(file), dim_from_weights=True, network_dropout=0.25)
    assert len(second.trained_module().unet_adapters) == 192
    tensors = first.trained_module().state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in third.trained_module().state_dict().items())
    assert third.trained_module().adapters[0].settings.dropout == 0.25
    with torch.no_grad():
        third.trained_module().eval()
        for a, b in zip(outputs(bundle.text_encoders[0], bundle.unet),
                        outputs(first_bundle.text_encoders[0], first_bundle.unet), strict=True):  # fmt: skip
            assert torch.equal(a, b)


def test_base_weights_are_merged_with_their_multipliers(tmp_path, tiny_sd1_path):
    file = tmp_path / "base.safetensors"
    applied = load(tiny_sd1_path)
    trained = trained_file(file, applied, network_alpha=4)
    trained.trained_module().set_multiplier(1.5)
    merged = load(tiny_sd1_path)
    ready(merged, base_weights=(str(file), str(file)), base_weights_multiplier=(0.5,))
    with torch.no_grad():
        for a, b in zip(outputs(applied.text_encoders[0], applied.unet),
                        outputs(merged.text_encoders[0], merged.unet), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    half = load(tiny_sd1_path, torch.bfloat16)
    ready(half, base_weights=(str(file),))
    assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.text_encoders[0].parameters()} == {torch.float32}


def test_saving_is_atomic_and_refuses_nan(tmp_path, bundle):
    made, _ = ready(bundle)
    file = tmp_path / "lora.safetensors"
    made.save(file, dtype=torch.float16, metadata={"ss_network_dim": "4"})
    header = read_header(file)
    assert header.metadata["ss_network_dim"] == "4" and len(header.metadata["sshs_model_hash"]) == 64
    before = file.read_bytes()
    parameter = next(made.trained_module().parameters())
    with torch.no_grad():
        parameter[0, 0] = 1e6  # fits float32, not float16
    name = "lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight"
    message = f"fp16 can't hold the weights: {name} goes up to 1e.06, fp16 to 65504; use --save_precision bf16 or float"
    with pytest.raises(NonFiniteError, match=message):
        made.save(file, dtype=torch.float16, metadata={})
    with torch.no_grad():
        parameter[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=f"^{name} holds NaN or infinity; .*lora.safetensors was not written"):
        made.save(file, dtype=torch.float16, metadata={})
    with torch.no_grad():
        parameter[0, 0] = 1.0
    assert file.read_bytes() == before
    made.save(tmp_path / "lora.pt", dtype=None, metadata={})
    assert set(load_tensors(tmp_path / "lora.pt")) == set(header.tensors)
    assert {item.name for item in tmp_path.iterdir()} == {"lora.safetensors", "lora.pt"}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_what_stops_a_file_is_one_sentence(tmp_path, bundle, suffix, monkeypatch):
    made, _ = ready(bundle)
    (tmp_path / "file").touch()
    with pytest.raises(
        OptionError, match=f"^can't write .*file/a.{suffix} .*; free some space or choose another folder"
    ):
        made.save(tmp_path / "file" / f"a.{suffix}", dtype=None, metadata={})

    long_name = "a" * 300 + f".{suffix}"
    with pytest.raises(OptionError, match=rf"^can't write .*/a{{300}}.{suffix} \(File name too long\)"):
        made.save(tmp_path / long_name, dtype=None, metadata={})

    longest = tmp_path / ("ä" * 120 + f".{suffix}")
    made.save(longest, dtype=None, metadata={})
    longest.unlink()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match=rf"^can't write .*a.{suffix} \(No space left on device\); free some space"):
        made.save(tmp_path / f"a.{suffix}", dtype=None, metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_disk_that_fills_up_while_writing(tmp_path, bundle, suffix):
    resource = pytest.importorskip("resource")  # not on Windows
    made, _ = ready(bundle)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OptionError, match=rf"^can't write .*a.{suffix} \(File too large\); free some space"):
            made.save(tmp_path / f"a.{suffix}", dtype=None, metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
