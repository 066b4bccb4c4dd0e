"""The contract of network modules, with modules written as other people write them."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from library.options import OptionError
from library.targets.adapter import Adapted, Models, NetworkFactory, blamed_on, import_network_module, read_tensors
from tests.tiny_networks import outputs, tiny_parts

# a small network of another author: one vector per U-Net, added to its output; the oldest form of the contract
OLD_MODULE = """
    import torch

    class Bias(torch.nn.Module):
        def __init__(self, multiplier, calls):
            super().__init__()
            self.lora_unet_bias = torch.nn.Module()
            self.lora_unet_bias.value = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
            self.multiplier, self.calls = multiplier, calls

        def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
            self.calls.append(("apply_to", apply_text_encoder, apply_unet))
            base = unet.conv_out.forward
            unet.conv_out.forward = lambda x: base(x) + self.multiplier * self.lora_unet_bias.value.view(1, 4, 1, 1)

        def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
            return self.parameters()

        def prepare_grad_etc(self, text_encoder, unet):
            self.requires_grad_(True)

        def on_epoch_start(self, text_encoder, unet):
            self.calls.append(("on_epoch_start",))

        def save_weights(self, file, dtype, metadata):
            torch.save(self.state_dict(), file)

        def load_weights(self, file):
            self.load_state_dict(torch.load(file), False)

    def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **kwargs):
        return None if kwargs.get("none") else Bias(multiplier, [("create", network_dim, network_alpha, kwargs)])
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that makes a network module importable and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(source: str, name: str = "someones_network") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        made.append(name)
        sys.modules.pop(name, None)
        return name

    yield make
    for name in made:
        sys.modules.pop(name, None)


def models() -> Models:
    text_encoder, unet = tiny_parts()
    return Models((text_encoder,), unet, torch.nn.Identity())


def test_our_modules_are_importable_by_name():
    assert import_network_module("networks.lora").__name__ == "networks.lora"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("networks.lorra", "there is no Python module 'networks.lorra'; did you mean networks.lora"),
        ("lycoris.kohya", "there is no Python module 'lycoris.kohya'; install the package lycoris-lora"),
        ("nothing.like.it", "no Python module 'nothing.like.it'; use networks.lora"),
    ],
)
def test_missing_modules(name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "lycoris.kohya", raising=False)
    with pytest.raises(OptionError, match=message):
        import_network_module(name)


def test_a_module_that_needs_a_missing_package(module):
    with pytest.raises(OptionError, match="someones_network needs the package no_such_package; install"):
        import_network_module(module("import no_such_package"))


def test_missing_functions_and_methods_are_named(module):
    factory = NetworkFactory(module(OLD_MODULE))
    with pytest.raises(OptionError, match="someones_network has no function create_network_from_weights"):
        factory.require("create_network", "create_network_from_weights")
    network = factory.create(4, 1, None, models())
    network.require(*Adapted.REQUIRED, "load_weights")
    with pytest.raises(OptionError, match="the network of someones_network has no method merge_to"):
        network.require("merge_to")
    assert not network.can_limit_norms


def test_a_module_that_makes_nothing(module):
    factory = NetworkFactory(module(OLD_MODULE))
    with pytest.raises(OptionError, match="someones_network made no network"):
        factory.create(4, 1, None, models(), none="1")
    factory = NetworkFactory(module("create_network = lambda *args, **kwargs: 'text'", "odd_network"))
    with pytest.raises(OptionError, match="made a str, which is no torch module"):
        factory.create(4, 1, None, models())


def test_arguments_arrive_as_texts_with_dropout(module):
    factory = NetworkFactory(module(OLD_MODULE))
    network = factory.create(8, 2.0, 0.1, models(), algo="loha", conv_dim="4")
    kwargs = {"algo": "loha", "conv_dim": "4", "neuron_dropout": 0.1, "dropout": 0.1}
    assert network.network.calls == [("create", 8, 2.0, kwargs)]
    network = factory.create(8, 2.0, 0.1, models(), dropout="0.5")
    assert network.network.calls[0][3] == {"neuron_dropout": 0.1, "dropout": "0.5"}


def test_arguments_with_a_flag_of_their_own(module):
    with pytest.raises(
        OptionError, match="--network_args network_dim: is set by the program; use a flag such as --netw"
    ):
        NetworkFactory(module(OLD_MODULE)).check_arguments({"network_dim": "4"})


def test_modules_older_than_neuron_dropout(module):
    source = OLD_MODULE.replace("unet, **kwargs)", "unet, dropout=None)").replace(
        'kwargs.get("none")', "False").replace("network_alpha, kwargs", "network_alpha, dropout")  # fmt: skip
    network = NetworkFactory(module(source)).create(4, 1, 0.2, models())
    assert network.network.calls == [("create", 4, 1, 0.2)]


FORMS = {
    "iterator of parameters": "self.parameters()",
    "list of parameters": "list(self.parameters())",
    "groups": "[{'params': self.parameters(), 'lr': 0.5}]",
    "groups and names": "([{'params': list(self.parameters()), 'lr': 0.5}], ['unet'])",
    "groups and no names": "([{'params': list(self.parameters()), 'lr': 0.5}], None)",
    "an empty group": "[{'params': []}, {'params': list(self.parameters()), 'lr': 0.5}]",
}


@pytest.mark.parametrize("rates", ["text_encoder_lr, unet_lr", "text_encoder_lr, unet_lr, default_lr=None", "*rates"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_optimizer_parameters(module, form, rates):
    source = OLD_MODULE.replace("text_encoder_lr, unet_lr", rates).replace(
        "return self.parameters()", f"return {FORMS[form]}"
    )
    network = NetworkFactory(module(source)).create(4, 1, None, models())
    ((name, group),) = network.param_groups(None, 1e-4, 1e-3)
    assert name == ("unet" if form == "groups and names" else None)
    assert [id(p) for p in group["params"]] == [id(p) for p in network.network.parameters()]
    assert group.get("lr") == (0.5 if "group" in form else None)


def test_errors_inside_the_module_stay_visible(module):
    """A TypeError of the module's own is not taken for an old signature."""
    source = OLD_MODULE.replace("return self.parameters()", "raise TypeError('inside')")
    network = NetworkFactory(module(source)).create(4, 1, None, models())
    with pytest.raises(TypeError, match="inside"):
        network.param_groups(None, None, 1e-3)


def test_optional_methods(module):
    source = OLD_MODULE.replace(
        "def prepare_grad_etc",
        """def prepare_network(self, args):
            self.calls.append(("prepare", args.network_dim))

        def on_step_start(self, text_encoder, unet):
            self.calls.append(("step",))

        def apply_max_norm_regularization(self, limit, device):
            return 1, 2.0, limit

        def prepare_grad_etc""",
    )
    network = NetworkFactory(module(source)).create(4, 1, None, models())
    network.prepare({"network_dim": 4})
    network.on_step_start(models())
    assert network.network.calls[1:] == [("prepare", 4), ("step",)]
    assert network.limit_norms(3.0, torch.device("cpu")) == (1, 2.0, 3.0)

    silent = NetworkFactory(module(OLD_MODULE, "silent_network")).create(4, 1, None, models())
    silent.prepare({})
    silent.on_step_start(models())


FROM_WEIGHTS = """
    def create_network_from_weights(multiplier, file, vae, text_encoder, unet, {parameters}**kwargs):
        return Bias(multiplier, [kwargs | {seen}])
"""


@pytest.mark.parametrize("takes_tensors", [True, False])
def test_tensors_are_handed_over_where_they_are_taken(module, takes_tensors):
    parameters, seen = ("weights_sd=None, ", '{"weights_sd": weights_sd}') if takes_tensors else ("", "{}")
    source = OLD_MODULE + FROM_WEIGHTS.format(parameters=parameters, seen=seen)
    tensors = {"lora_unet_bias.value": torch.ones(4)}
    network, made = NetworkFactory(module(source)).create_from_weights(1.0, "f", models(), weights_sd=tensors, a="1")
    assert made is None
    (seen,) = network.network.calls
    assert seen == {"a": "1", "for_inference": False} | ({"weights_sd": tensors} if takes_tensors else {})


def test_files_with_nan_are_refused(tmp_path):
    torch.save({"a.b": torch.tensor([1.0, float("nan")])}, tmp_path / "n.pt")
    with pytest.raises(OptionError, match=r"^--base_weights: .*n.pt holds NaN or infinity \(a.b\); take an earlier"):
        read_tensors(str(tmp_path / "n.pt"), "--base_weights")


def test_messages_of_modules_get_the_flag():
    with pytest.raises(OptionError, match="^--base_weights: f.pt is damaged$"), blamed_on("--base_weights"):
        raise OptionError("", "f.pt is damaged")
    with pytest.raises(OptionError, match="^--network_args a: unknown name$"), blamed_on("--base_weights"):
        raise OptionError("--network_args a", "unknown name")


def test_several_text_encoders_go_as_a_list():
    one, two = torch.nn.Identity(), torch.nn.Identity()
    assert Models((one,), one, one).text_encoder is one
    assert Models((one, two), one, one).text_encoder == [one, two]


def test_a_foreign_network_changes_the_model(module):
    parts = models()
    network = NetworkFactory(module(OLD_MODULE)).create(4, 1, None, parts)
    plain = outputs(parts.text_encoder, parts.unet)[1]
    network.apply(parts, text=False, unet=True)
    network.prepare_gradients(parts)
    with torch.no_grad():
        next(network.network.parameters()).fill_(2)
    torch.testing.assert_close(outputs(parts.text_encoder, parts.unet)[1], plain + 2)
    assert network.network.calls[1] == ("apply_to", False, True)
