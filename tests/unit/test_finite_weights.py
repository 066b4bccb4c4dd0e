"""A model that holds NaN names file and tensor, wherever its parts come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.options import OptionError
from library.train.finite_weights import check_finite
from tests.unit.test_saving import family_of, load


def test_of_a_diffusers_folder_the_part_is_named(tiny_sdxl_path, tmp_path):
    family, folder = family_of("sdxl"), tmp_path / "folder"
    family.save(load(tiny_sdxl_path, "sdxl"), folder, dtype=None, metadata={}, as_diffusers=True)
    bundle = load(folder, "sdxl")
    check_finite(bundle, None)
    name, parameter = next(bundle.text_encoders[1].named_parameters())
    parameter.data.view(-1)[-1] = torch.nan
    with pytest.raises(OptionError, match=rf"--pretrained.*folder.text_encoder_2 holds NaN or infinity \({name}\)"):
        check_finite(bundle, None)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_of_a_single_file_the_key_is_named(kind, request):
    path = request.getfixturevalue(f"tiny_{kind}_path")
    bundle = load(path, kind)
    for module in (bundle.unet, *bundle.text_encoders, bundle.vae):
        parameter = list(module.parameters())[-1]
        kept = parameter.data.clone()
        parameter.data.view(-1)[0] = torch.inf
        with pytest.raises(OptionError, match=r"has values in \S+\.\S+ that float32 can't hold"):
            check_finite(bundle, None)  # the file itself is sound, so its tensor was found there
        parameter.data.copy_(kept)
    check_finite(bundle, None)


def test_a_vae_of_its_own_is_named(tiny_sd1_path, tmp_path):
    bundle = load(tiny_sd1_path, "sd1")
    bundle = replace(bundle, source=replace(bundle.source, path=str(tmp_path / "gone")))
    bundle.vae.encoder.conv_in.bias.data[0] = torch.nan
    with pytest.raises(OptionError, match=f"^--vae: {tiny_sd1_path}"):
        check_finite(bundle, str(tiny_sd1_path))
