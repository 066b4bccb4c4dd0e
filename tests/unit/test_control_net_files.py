"""ControlNets from all kinds of files into one and the same module, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.architecture import control_net_architecture
from library.checkpoints.control_net import check_control_net
from library.checkpoints.keymaps import control_original_names, unet_slots
from library.checkpoints.safetensors_io import save_file
from library.models.build import build_control_net, build_unet
from library.models.control_net import load_control_net
from library.options import OptionError
from tests.tiny_control import control_net_file, original_names, tiny_control_net, tiny_lllite
from tests.tiny_models import UNETS

FLAG = "--control_net_models"


def load(path: Path, kind: str, unet: Any = None) -> Any:
    unet = build_unet(UNETS[kind]) if unet is None else unet
    return load_control_net(path, unet, kind, dtype=torch.float32, device=torch.device("cpu"), flag=FLAG)


def assert_same(one: Any, other: Any) -> None:
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("layout", ["original", "pickle", "no prefix", "diffusers file", "mixed", "folder"])
def test_every_layout_is_read(kind: str, layout: str, tmp_path: Path) -> None:
    net = tiny_control_net(kind)
    path = tmp_path / ("control.pth" if layout == "pickle" else "control.safetensors")
    whole_model = {f"model.diffusion_model.{name}": torch.ones(2) for name in ("out.2.weight", "out.2.bias")}
    if layout == "original":
        save_file({**original_names(net), **whole_model}, path)
    elif layout == "pickle":
        torch.save({"state_dict": original_names(net)}, path)
    elif layout == "no prefix":
        save_file(original_names(net, ""), path)
    elif layout == "diffusers file":
        save_file(net.state_dict(), path)
    elif layout == "mixed":  # of later versions of the trade's scripts: Diffusers' names around an original U-Net
        own = {name: value for name, value in net.state_dict().items() if name.startswith("controlnet_")}
        inner = [name for name in net.state_dict() if name not in own]
        slots = unet_slots(build_unet(UNETS[kind]).state_dict(), "")
        save_file({**own, **{slots[name].key: net.state_dict()[name] for name in inner}}, path)
    else:
        net.save_pretrained(path)
    check_control_net(path, kind, FLAG)
    loaded = load(path, kind)
    assert_same(loaded, net)
    assert not loaded.training
    heads = ("attention_head_dim", "use_linear_projection", "transformer_layers_per_block", "down_block_types")
    assert all(tuple_or_value(loaded.config[name]) == tuple_or_value(net.config[name]) for name in heads)


def tuple_or_value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_a_difference_is_added_to_the_model(tmp_path: Path) -> None:
    net, unet = tiny_control_net(), build_unet(UNETS["sd1"])
    shared = unet.state_dict().keys() & net.state_dict().keys()
    assert len(shared) > 290
    wanted = {name: value.clone() for name, value in net.state_dict().items()}
    for name in shared:
        net.state_dict()[name].sub_(unet.state_dict()[name])
    save_file({**original_names(net), "difference": torch.ones(())}, tmp_path / "difference.safetensors")
    loaded = load(tmp_path / "difference.safetensors", "sd1", unet).state_dict()
    assert all(torch.allclose(loaded[name], value, atol=1e-6) for name, value in wanted.items())


@pytest.mark.parametrize(("kind", "outputs"), [("sd1", 12), ("sdxl", 9)])
def test_full_size_names(kind: str, outputs: int) -> None:
    """Numbers of original files: 340 tensors (with 12 zero convolutions) for SD 1.x; SDXL has 9."""
    from library.checkpoints.architecture import ControlNetArchitecture, UNetArchitecture

    unet = {
        "sd1": UNetArchitecture(4, 4, (320, 640, 1280, 1280), (8,) * 4, (1, 1, 1, 0), 2, 768, linear_projection=False),
        "sdxl": UNetArchitecture(4, 4, (320, 640, 1280), (5, 10, 20), (0, 2, 10), 2, 2048, True, vector_width=2816),
    }[kind]
    with torch.device("meta"):
        net = build_control_net(ControlNetArchitecture(unet, 3, (16, 32, 96, 256)))
    names = original_names(net)
    zero_convolutions = {name: tuple(names[name].shape[:2]) for name in names if ".zero_convs." in name}
    assert len(zero_convolutions) == 2 * outputs
    widths = [zero_convolutions[f"control_model.zero_convs.{index}.0.weight"][0] for index in range(outputs)]
    assert widths == ([320] * 4 + [640] * 3 + [1280] * 5)[:outputs]
    hints = [names[f"control_model.input_hint_block.{2 * index}.weight"].shape[:2] for index in range(8)]
    assert [tuple(shape) for shape in hints] == [
        (16, 3), (16, 16), (32, 16), (32, 32), (96, 32), (96, 96), (256, 96), (320, 256),
    ]  # fmt: skip
    if kind == "sd1":
        assert len(names) == 340
    found = control_net_architecture(
        {name: tuple(names[key].shape) for name, key in control_original_names(names).items()}, kind
    )
    assert found.unet == unet
    assert found.hint_channels == (16, 32, 96, 256)


def refusal(path: Path, kind: str = "sd1") -> str:
    with pytest.raises(OptionError) as caught:
        load(path, kind)
    assert str(caught.value).startswith(FLAG)
    return str(caught.value)


def test_what_is_no_fitting_control_net_is_refused(tmp_path: Path, tiny_sd1_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    assert f"{path} does not exist" in refusal(path)
    assert "is no ControlNet: the tensor input_hint_block.0.weight is missing" in refusal(tiny_sd1_path)
    tiny_lllite(path)
    assert "give it as --control_net_lllite_models" in refusal(path)
    control_net_file(tmp_path, "sd2")
    assert "does not fit the model (block_out_channels is (64, 64, 128, 128), not (32, 64, 64, 64))" in refusal(
        tmp_path / "control.safetensors"
    )
    tensors = original_names(tiny_control_net())
    save_file({key: value for key, value in tensors.items() if "zero_convs.3" not in key}, path)
    assert "lacks 2 tensors of a ControlNet (zero_convs.3.0.bias ...)" in refusal(path)
    save_file({**tensors, "control_model.task_embedding.weight": torch.ones(2)}, path)
    assert "1 tensors that no plain ControlNet has (task_embedding.weight ...)" in refusal(path)
    tensors["control_model.input_hint_block.0.weight"] = torch.ones(16, 4, 3, 3)
    save_file(tensors, path)
    assert "takes pictures of 4 channels, not RGB" in refusal(path)


def test_the_family_is_told_by_the_width_of_the_text_states(tmp_path: Path) -> None:
    tensors = original_names(tiny_control_net())
    wide = {key: torch.zeros(64, 768) if key.endswith("attn2.to_k.weight") else value for key, value in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(OptionError, match=r"was made for SD 1\.x, the model is SDXL; use a ControlNet that was made"):
        check_control_net(tmp_path / "wide.safetensors", "sdxl", FLAG)
