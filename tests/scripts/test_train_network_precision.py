"""train_network.py with half-precision and 8-bit weights, and with memory savers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from library.models import float8
from library.train import loop
from tests.runs import equal_files, logged, metadata_of, train_network


def losses(tmp_path, name, **options):
    folder = tmp_path / name
    assert train_network(**{**options, "logging_dir": folder / "log", "output_dir": folder}) == 0
    return logged(folder / "log", "loss/current")


def test_adapters_in_bfloat16_learn_as_those_in_float32(options, tmp_path):
    """With a rate whose steps bfloat16 would lose when rounded to the nearest number."""
    options |= {"mixed_precision": "bf16", "max_train_steps": 8, "learning_rate": 2e-4}
    full = losses(tmp_path, "full", **options)
    half = losses(tmp_path, "half", **options, full_bf16=True)
    assert half == pytest.approx(full, rel=2e-2)
    one, other = (load_file(tmp_path / name / "net.safetensors") for name in ("full", "half"))
    assert {other[name].dtype for name in other if "lora_" in name and "alpha" not in name} == {torch.bfloat16}
    ups = [name for name in one if "unet" in name and "lora_up" in name]
    length = sum(float(one[name].square().sum()) for name in ups)
    along = sum(float((one[name] * other[name].float()).sum()) for name in ups)
    assert along > 0.7 * length, "the same way, but for noise in the signs of tiny gradients"


@pytest.mark.parametrize("flag", ["fp8_base", "fp8_base_unet"])
def test_a_base_in_8_bits_trains_nearly_as_one_in_16(options, tmp_path, flag, monkeypatch):
    options |= {"mixed_precision": "bf16"}
    kept = []

    def watch(run, batches, step, update=loop.update):
        kept.append([sum(type(m) is float8.Linear for m in part.modules()) for part in
                     (run.bundle.unet, *run.bundle.text_encoders)])  # fmt: skip
        return update(run, batches, step)

    half = losses(tmp_path, "half", **options)
    monkeypatch.setattr(loop, "update", watch)
    eighth = losses(tmp_path, "eighth", **options, **{flag: True})
    assert eighth == pytest.approx(half, rel=2e-2) and eighth != half
    unet, text = kept[0]
    assert unet > 50 and (text > 0) == (flag == "fp8_base")
    metadata = metadata_of(tmp_path / "eighth" / "net.safetensors")
    assert metadata[f"ss_{flag}"] == "True" and metadata["ss_full_fp16"] == "False"


def test_networks_of_others_find_the_weights_of_a_base_in_8_bits(options, tmp_path):
    """LyCORIS computes with the weights of the layers themselves."""
    options |= {"mixed_precision": "bf16", "network_module": "lycoris.kohya", "network_args": ["algo=loha"]}
    half = losses(tmp_path, "half", **options)
    assert losses(tmp_path, "eighth", **options, fp8_base=True) == pytest.approx(half, rel=2e-2)


def test_fused_backward_pass_gives_the_same_weights(options, tmp_path):
    options |= {"max_grad_norm": 0, "gradient_checkpointing": True}
    apart = losses(tmp_path, "apart", **options)
    assert losses(tmp_path, "fused", **options, fused_backward_pass=True) == apart
    assert equal_files(tmp_path / "apart" / "net.safetensors", tmp_path / "fused" / "net.safetensors")
    norms = [logged(tmp_path / name / "log", "grad_norm") for name in ("apart", "fused")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_fused_run_without_finite_losses_stops_with_good_weights(options, tmp_path):
    options |= {"learning_rate": 1e20, "max_train_steps": 30, "fused_backward_pass": True}
    assert train_network(**options, max_nonfinite_steps=4) == 1
    (good,) = (tmp_path / "out").glob("net-step*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(good).values())


def test_savers_without_effect_on_this_machine_say_so(options, capfd, plain_run, tmp_path):
    options |= {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, "highvram": True}
    assert train_network(**options, ddp_static_graph=True, zero_stage=3) == 0
    messages = capfd.readouterr().err
    assert "--cpu_offload_checkpointing has no effect: everything is in the CPU's memory" in messages
    assert "--ddp_static_graph has no effect: there is one process" in messages
    assert "--zero_stage has no effect without --deepspeed" in messages
    assert equal_files(plain_run, tmp_path / "out" / "net.safetensors")
