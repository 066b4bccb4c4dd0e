"""The optimizer table: names, packages, arguments, rates; each optimizer for real."""

import copy
import logging

import pytest
import torch

from library.options import OptionError
from library.targets.base import ParamGroup
from library.train.optimizer_table import NAMES, TABLE, check_package, is_schedule_free, parse_arguments, picks_own_rate
from library.train.optimizers import build_optimizer
from library.train.options import OptimizerOptions


def groups(unet_lr=None, size=4):
    parameters = [torch.nn.Parameter(torch.ones(size, size)) for _ in range(2)]
    return [ParamGroup("text encoder", (parameters[0],), None), ParamGroup("unet", (parameters[1],), unet_lr)]


def build(name="", *args, unet_lr=None, lr=1e-3, size=4):
    options = OptimizerOptions(optimizer_type=name, optimizer_args=args or None, learning_rate=lr)
    return build_optimizer(options, groups(unet_lr, size))


def test_default_is_adamw_and_groups_keep_their_rates():
    built = build(unet_lr=0.5)
    assert type(built.optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in built.optimizer.param_groups] == [1e-3, 0.5]
    assert built.description == "torch.optim.adamw.AdamW"


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW", "torch.optim.AdamW"])
def test_names_of_the_trade_in_any_case_and_class_paths(name):
    assert type(build(name).optimizer) is torch.optim.AdamW


def test_other_optimizers_by_class_name():
    assert type(build("RMSprop").optimizer) is torch.optim.RMSprop
    assert type(build("torch.optim.SGD").optimizer) is torch.optim.SGD
    assert build("torch.optim.SGD").optimizer.defaults["nesterov"] is False, "a class path adds nothing"
    assert type(build("LAMB8bit").optimizer).__name__ == "LAMB8bit", "a name in 8bit that is in no row"


CLASSES = {
    "AdamW": "AdamW", "AdamW8bit": "AdamW8bit", "PagedAdamW": "PagedAdamW", "PagedAdamW8bit": "PagedAdamW8bit",
    "PagedAdamW32bit": "PagedAdamW32bit", "Lion": "Lion", "Lion8bit": "Lion8bit", "PagedLion8bit": "PagedLion8bit",
    "SGDNesterov": "SGD", "SGDNesterov8bit": "SGD8bit", "AdEMAMix8bit": "AdEMAMix8bit",
    "PagedAdEMAMix8bit": "PagedAdEMAMix8bit", "DAdaptation": "DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "DAdaptAdamPreprint", "DAdaptAdaGrad": "DAdaptAdaGrad", "DAdaptAdam": "DAdaptAdam",
    "DAdaptAdan": "DAdaptAdan", "DAdaptAdanIP": "DAdaptAdanIP", "DAdaptLion": "DAdaptLion", "DAdaptSGD": "DAdaptSGD",
    "Prodigy": "Prodigy", "AdaFactor": "Adafactor", "RAdamScheduleFree": "RAdamScheduleFree",
    "AdamWScheduleFree": "AdamWScheduleFree", "SGDScheduleFree": "SGDScheduleFree",
}  # fmt: skip


def test_the_table_has_every_name_of_the_trade():
    assert set(CLASSES) == set(NAMES) and {name.lower() for name in NAMES} == set(TABLE)


@pytest.mark.parametrize("name", CLASSES)
def test_each_lowers_a_loss(name):
    rate = 1.0 if is_schedule_free(name) or "DAdapt" in name or name == "Prodigy" else 0.05
    built = build(name, lr=rate / 10 if is_schedule_free(name) else rate, size=8)
    assert type(built.optimizer).__name__ == CLASSES[name]
    parameter = built.optimizer.param_groups[1]["params"][0]
    losses = []
    for _ in range(20):
        loss = (parameter**2).sum()
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
        losses.append(loss.item())
    assert parameter.isfinite().all() and min(losses) < 64 == losses[0]


def test_a_missing_package_is_named_before_torch_is_needed(monkeypatch):
    monkeypatch.setattr("library.train.optimizer_table.is_installed", lambda package: package == "torch")
    check_package("")
    check_package("RMSprop")
    for name, package in (("Lion", "lion-pytorch"), ("prodigy", "prodigyopt"), ("DAdaptAdam", "dadaptation"),
                          ("AdamWScheduleFree", "schedulefree"), ("some.Thing", "some")):  # fmt: skip
        with pytest.raises(OptionError, match=f"--optimizer_type.*package {package}.*pip install {package}"):
            check_package(name)


# ---------------------------------------------------------------------------------------------- rules of some


def test_sgd_nesterov_adds_momentum_unless_given():
    assert build("SGDNesterov").optimizer.defaults["momentum"] == 0.9
    built = build("sgdnesterov", "momentum=0.5")
    assert built.optimizer.defaults["momentum"] == 0.5 and built.optimizer.defaults["nesterov"]
    assert built.description == "torch.optim.sgd.SGD(nesterov=True,momentum=0.5)"


def test_adafactor_chooses_its_own_rate_unless_told_not_to():
    own = build("AdaFactor", unet_lr=0.5)
    assert own.chooses_own_rate and all(group["lr"] is None for group in own.optimizer.param_groups)
    given = build("adafactor", "relative_step=False", "scale_parameter=False")
    assert not given.chooses_own_rate and given.optimizer.param_groups[0]["lr"] == 1e-3
    warm = build("adafactor", "relative_step=False", "warmup_init=True")
    assert warm.chooses_own_rate
    assert "relative_step=True" in warm.description
    assert picks_own_rate("ADAFACTOR", None) and not picks_own_rate("transformers.optimization.Adafactor", None)


@pytest.mark.parametrize(
    ("arguments", "rate", "words"),
    [
        (("relative_step=False", "warmup_init=True"), 2e-6, ["relative_step=False has no effect: warmup_init=True"]),
        (None, 1e-4, ["--learning_rate has no effect: AdaFactor"]),
        (("warmup_init=True",), 2e-6, []),
        (("relative_step=False",), 1e-4, []),
    ],
)
def test_what_counts_for_nothing_beside_adafactor_is_said(arguments, rate, words):
    notes = OptimizerOptions("AdaFactor", arguments, learning_rate=rate).notes()
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


def test_the_rate_that_adafactor_chooses_is_known_after_its_first_step():
    built = build("AdaFactor")
    assert built.rates() == [None, None]
    for group in built.optimizer.param_groups:
        group["params"][0].grad = torch.ones(4, 4)
    built.optimizer.step()
    # Shazeer and Stern 2018, section 9: max(eps, RMS(weight)) * min(0.01, 1 / sqrt(step))
    assert built.rates() == pytest.approx([0.01, 0.01], rel=1e-2)


@pytest.mark.parametrize("name", ["DAdaptAdam", "DAdaptSGD", "Prodigy", "DAdaptAdan"])
def test_adapting_optimizers_tell_the_factor_they_found(name):
    built = build(name, lr=1.0)
    before = built.factors()
    for _ in range(8):
        for group in built.optimizer.param_groups:
            group["params"][0].grad = 2 * group["params"][0].detach()
        built.optimizer.step()
    assert len(built.factors()) == 2 and built.factors()[0] > before[0] > 0
    assert built.adapts_rate and built.needs_all_gradients and not build().factors()


def test_adapting_optimizers_want_a_rate_of_about_1(caplog):
    with caplog.at_level(logging.WARNING):
        build("Prodigy", lr=1.0)
        build("DAdaptAdam", lr=0.5)
        build("AdamW", lr=1e-4)
        assert not caplog.records
        build("Prodigy", lr=1e-4)
        build("DAdaptAdam", lr=4.0)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "--learning_rate: 0.0001 is small for Prodigy",
        "--learning_rate: 4 is large for DAdaptAdam",
    ]


def test_adapting_optimizers_with_several_rates(caplog):
    with pytest.raises(OptionError, match="DAdaptAdam can't train with different rates.*--unet_lr"):
        build("DAdaptAdam", lr=1.0, unet_lr=0.5)
    with caplog.at_level(logging.WARNING):
        build("DAdaptAdaGrad", lr=1.0, unet_lr=0.5)
    assert "the first rate for all groups: 1, 0.5" in caplog.text


def test_a_state_comes_back_bit_for_bit():
    """Also of the optimizers that keep plain numbers in their groups."""
    for name in ("DAdaptAdan", "Prodigy", "RAdamScheduleFree"):
        one, other = build(name, lr=1.0), build(name, lr=1.0)

        def step(built):
            for group in built.optimizer.param_groups:
                group["params"][0].grad = 2 * group["params"][0].detach() + 0.1
            built.optimizer.step()

        for _ in range(3):
            step(one)
        for mine, theirs in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
            theirs["params"][0].data.copy_(mine["params"][0].data)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        for _ in range(3):
            step(one)
            step(other)
        for mine, theirs in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
            assert torch.equal(mine["params"][0], theirs["params"][0]), name


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("AdmaW", (), ["--optimizer_type", "'AdmaW'", "AdamW?"]),
        ("AdmaW8bit", (), ["--optimizer_type", "AdmaW8bit", "AdamW8bit?"]),
        ("DAdaptAdm", (), ["--optimizer_type", "'DAdaptAdm'", "DAdaptAdam?"]),
        ("no_such_package.Fancy", (), ["--optimizer_type", "no_such_package", "pip install"]),
        ("torch.optim.Nope", (), ["--optimizer_type", "Nope"]),
        ("AdamW", ("betas",), ["--optimizer_args", "'betas'", "name=value"]),
        ("AdamW", ("betas=big",), ["--optimizer_args", "'big'", "betas"]),
        ("AdamW", ("speed=3",), ["--optimizer_args", "AdamW", "speed"]),
        ("AdamW", ("lr=3",), ["--optimizer_args", "lr"]),
        ("Prodigy", ("speed=3",), ["--optimizer_args", "Prodigy", "speed"]),
    ],
)
def test_mistakes(name, args, words):
    with pytest.raises(OptionError) as error:
        build(name, *args)
    assert all(word in str(error.value) for word in words), error.value


def test_arguments_are_python_values_and_may_contain_equals():
    parsed = parse_arguments(["betas=0.9,0.99", "amsgrad=True", "name='a=b'", "eps=1e-6"], "--optimizer_args")
    assert parsed == {"betas": (0.9, 0.99), "amsgrad": True, "name": "a=b", "eps": 1e-6}
