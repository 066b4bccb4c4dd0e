"""tools.original_control_net: for programs that draw by themselves, the same as the generators do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.models.build import build_unet
from library.options import OptionError
from tests.tiny_control import control_net_file, guide_image, original_names, tiny_control_net
from tests.tiny_models import UNETS
from tools.original_control_net import (
    ControlNetInfo,
    call_unet_and_control_net,
    get_guided_hints,
    load_control_net,
    load_preprocess,
    preprocess_ctrl_net_hint_image,
)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build_unet(UNETS["sd1"]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def nets(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    return [load_control_net(False, unet, str(control_net_file(folder, seed=seed, name=str(seed)))) for seed in (0, 1)]


def hint(folder: Path, seed: int) -> torch.Tensor:
    picture = Image.open(guide_image(folder / f"{seed}.png", seed, (64, 64)))
    return preprocess_ctrl_net_hint_image(picture)


INPUTS = (torch.ones(4, 4, 8, 8) / 2, torch.tensor(500), torch.ones(4, 77, 64) / 3)


@torch.no_grad()
def test_control_nets_take_turns(unet, nets, tmp_path):
    infos = [ControlNetInfo(*nets[0], weight=0.7), ControlNetInfo(*nets[1], ratio=0.5)]
    pictures = [hint(tmp_path, seed) for seed in range(4)]  # of the first picture for both, then of the second
    guided = get_guided_hints(infos, 2, 2, pictures)
    assert torch.equal(guided[1], torch.cat([pictures[1], pictures[3]] * 2))
    plain = unet(*INPUTS).sample
    for step, progress, net in ((0, 0.0, 0), (1, 0.25, 1), (2, 0.75, 0)):
        down, mid = nets[net][1](
            *INPUTS, guided[net], conditioning_scale=infos[net].weight, return_dict=False
        )  # as diffusers has it
        right = unet(*INPUTS, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        made = call_unet_and_control_net(step, 2, unet, infos, guided, progress, *INPUTS)
        assert torch.allclose(made.sample, right, atol=1e-5) and torch.equal(made["sample"], made.sample)
        assert (right - plain).abs().max() > 1e-3
    made = call_unet_and_control_net(3, 2, unet, infos, guided, 0.75, *INPUTS)  # the second one's share is over
    assert torch.equal(made.sample, plain)


def test_one_picture_for_all(nets, tmp_path):
    (guided,) = get_guided_hints([ControlNetInfo(*nets[0])], 3, 2, [hint(tmp_path, 0)])
    assert guided.shape == (6, 3, 64, 64) and torch.equal(guided[0], guided[5])


def test_preprocessors(tmp_path):
    assert load_preprocess("none") is None
    picture = Image.open(guide_image(tmp_path / "guide.png"))
    edges, fewer = (load_preprocess(name)(picture) for name in ("canny_20_60", "canny_400_900"))
    assert edges.shape == (96, 80, 3) and set(np.unique(edges)) == {0, 255} and edges.sum() > fewer.sum()
    assert np.array_equal(load_preprocess("canny")(np.array(picture)), load_preprocess("canny_63_191")(picture))
    shown = preprocess_ctrl_net_hint_image(edges)
    assert shown.shape == (1, 3, 96, 80) and shown.max() == 1
    with pytest.raises(OptionError, match="'depth' is no preprocessor"):
        load_preprocess("depth")


def test_differences_are_added_to_the_model(unet, tmp_path):
    tensors = original_names(tiny_control_net()) | {"difference": torch.zeros(1)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "transfer.safetensors")
    _, net = load_control_net(False, unet, str(tmp_path / "transfer.safetensors"))
    right = unet.state_dict()["conv_in.weight"] + tiny_control_net().state_dict()["conv_in.weight"]
    assert torch.allclose(net.state_dict()["conv_in.weight"], right)


def test_other_kinds_are_refused(unet, tmp_path):
    with pytest.raises(OptionError, match="model: .*does not exist"):
        load_control_net(False, unet, str(tmp_path / "none.safetensors"))
    with pytest.raises(OptionError, match="does not fit the model"):
        load_control_net(True, unet, str(control_net_file(tmp_path, "sd2")))
