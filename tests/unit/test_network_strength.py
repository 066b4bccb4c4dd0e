"""network_multiplier of a dataset: how strong the network is on its batches, and that nothing else sees it."""

from types import SimpleNamespace

import pytest
import torch

from library.families.base import Conditioning
from library.options import OptionError
from library.targets.adapter import Adapted
from tests.network_targets import FAMILY, load, ready
from tests.tiny_networks import perturb


@pytest.fixture
def bundle(tiny_sd1_path):
    return load(tiny_sd1_path)


@pytest.fixture
def made(bundle):
    made, _ = ready(bundle, network_train_unet_only=True)
    perturb(made.trained_module())
    return made


def predict(made, bundle, multiplier):
    torch.manual_seed(0)
    batch = SimpleNamespace(network_multiplier=multiplier, timesteps_B=torch.tensor([500]))
    width = bundle.text_encoders[0].config.hidden_size
    made.before_forward(batch)
    noised, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, width)
    return made.predict(FAMILY, bundle, noised, Conditioning(context), batch)


def multipliers(made):
    return {module.multiplier for module in made.trained_module().modules() if hasattr(module, "multiplier")}


def test_a_batch_is_trained_at_its_strength_and_then_it_is_one_again(made, bundle):
    plain = predict(made, bundle, 1.0).detach()
    half = predict(made, bundle, 0.5)
    assert multipliers(made) == {0.5}  # still, for what is computed again in the backward pass
    half.sum().backward()
    made.after_optimizer_step()
    assert multipliers(made) == {1.0}
    assert not torch.equal(half, plain) and torch.equal(predict(made, bundle, 1.0), plain)


def test_without_gradients_it_is_one_again_at_once(made, bundle):
    with torch.no_grad():
        predict(made, bundle, 2.0)
    assert multipliers(made) == {1.0}


def test_a_network_that_can_not_change_its_strength_is_named():
    network = Adapted("some.module", torch.nn.Linear(1, 1))
    with pytest.raises(OptionError, match="the network of some.module has no method set_multiplier"):
        network.set_multiplier(0.5)
