"""Names from sizes are those of the modules that are built of these sizes."""

import pytest
import torch

from library.checkpoints.architecture import ControlNetArchitecture
from library.checkpoints.parameter_names import control_net_names, text_names, unet_names, vae_names
from library.models.build import build_control_net, build_text_encoder, build_unet, build_vae
from tests import full_size, tiny_models


@pytest.mark.parametrize("sizes", [full_size, tiny_models])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_names_are_the_modules(sizes, kind):
    unet, text = sizes.UNETS[kind], sizes.TEXT_ENCODERS[kind]
    control = ControlNetArchitecture(unet, 3, (16, 32, 96, 256))
    with torch.device("meta"):
        assert unet_names(unet) == set(build_unet(unet).state_dict())
        assert text_names(text.layers) == set(build_text_encoder(text).state_dict())
        assert control_net_names(control) == set(build_control_net(control).state_dict())
        if kind == "sdxl":
            second = sizes.SECOND_TEXT_ENCODER
            assert text_names(second.layers, is_projected=True) == set(build_text_encoder(second).state_dict())
        else:
            assert vae_names(sizes.VAE) == set(build_vae(sizes.VAE).state_dict())
