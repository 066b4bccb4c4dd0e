"""The layers of a checkpoint, from its header alone, are those that networks find in the model."""

import pytest
import torch

from library.checkpoints.sd import model_entries
from library.checkpoints.weights import open_weights
from networks.lora_creation import model_layers
from networks.weights.checkpoint_layers import checkpoint_layers
from tests.full_size import meta_state
from tests.tiny_networks import full_size_parts


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_names_shapes_and_values_are_those_of_the_model(kind, request):
    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.families.sdxl import StableDiffusionXL
    from library.models.options import AttentionOptions

    path = request.getfixturevalue(f"tiny_{kind}_path")
    family = StableDiffusionXL() if kind == "sdxl" else StableDiffusion()
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    model = family.load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)
    encoders = list(model.text_encoders)
    found = model_layers(encoders if len(encoders) > 1 else encoders[0], model.unet, has_convs=True).all
    with open_weights(path) as weights:
        layers = checkpoint_layers(weights.shapes, kind)
        assert set(layers) == {name for name, _ in found}
        for name, layer in found:
            weight = layers[name].weight(weights)
            assert tuple(weight.shape) == layers[name].shape
            torch.testing.assert_close(weight.float().reshape(layer.weight.shape), layer.weight.detach().float())


@pytest.mark.parametrize(("kind", "text", "unet", "convs"), [("sd1", 72, 278, 50), ("sd2", 138, 278, 50),
                                                              ("sdxl", 264, 788, 38)])  # fmt: skip
def test_counts_of_full_size_models(kind, text, unet, convs):
    shapes = {entry.name: entry.shape for entry in model_entries(meta_state(kind), None)}
    layers = checkpoint_layers(shapes, kind)
    names = [name for name, _ in model_layers(*full_size_parts(kind), has_convs=True).all]
    assert sorted(layers) == sorted(names)
    assert sum(name.startswith("lora_te") for name in layers) == text
    assert sum(name.startswith("lora_unet") for name in layers) == unet
    assert sum(layer.is_conv for layer in layers.values()) == convs
