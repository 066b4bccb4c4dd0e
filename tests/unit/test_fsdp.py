"""What FSDP needs of optimizers and files; runs with it are in tests/scripts/test_fsdp.py."""

from types import SimpleNamespace

import pytest
import torch

from library.options import OptionError
from library.train.checkpoints import load_state
from library.train.fsdp import SplitState, check_splittable, gathered_later
from library.train.options import OptimizerOptions


@pytest.mark.parametrize("name", ["AdamW", "SGDNesterov", "Lion"])
def test_optimizers_that_treat_each_number_by_itself(name):
    if name == "Lion":
        pytest.importorskip("lion_pytorch")
    check_splittable(SimpleNamespace(optimizer=OptimizerOptions(optimizer_type=name)), torch.device("cpu"))


@pytest.mark.parametrize("name", ["AdaFactor", "Prodigy", "AdamWScheduleFree"])
def test_optimizers_that_look_at_more(name):
    package = {"Prodigy": "prodigyopt", "AdamWScheduleFree": "schedulefree"}.get(name)
    if package:
        pytest.importorskip(package)
    config = SimpleNamespace(optimizer=OptimizerOptions(optimizer_type=name, optimizer_args=()))
    with pytest.raises(OptionError, match=f"--optimizer_type: {name} looks at more.*AdamW"):
        check_splittable(config, torch.device("cpu"))


def test_a_rate_near_zero_hides_nothing():
    options = OptimizerOptions(
        optimizer_type="AdaFactor", learning_rate=1e-12, optimizer_args=("relative_step=False", "scale_parameter=False")
    )
    with pytest.raises(OptionError, match="AdaFactor"):
        check_splittable(SimpleNamespace(optimizer=options), torch.device("cpu"))


def test_stand_ins_gather_when_values_are_asked_for_and_not_before():
    """A file's header needs shapes and dtypes of all tensors, and these must not all be there at once."""
    whole, asked = torch.arange(6.0).reshape(2, 3), []

    def gather():
        asked.append(1)
        return whole

    stand_in = gathered_later(whole[:1].expand(2, 3), gather)  # pyright: ignore[reportArgumentType]
    assert stand_in.shape == (2, 3) and stand_in.dtype == torch.float32 and len(stand_in) == 2 and not asked
    assert torch.equal(stand_in.detach().to("cpu", torch.float64), whole.double()) and len(asked) == 1
    assert torch.equal(stand_in.T, whole.T) and type(stand_in.T) is torch.Tensor


@pytest.mark.parametrize(
    ("has_shares", "others", "words"),
    [
        (False, {"split": SplitState({}, 0)}, "this run has its weights split"),
        (True, {}, "this run does not"),
    ],
)
def test_a_state_written_the_other_way_is_refused(tmp_path, has_shares, others, words):
    if has_shares:
        (tmp_path / "shares").mkdir()
    with pytest.raises(OptionError, match=f"--resume: .*{words}.*start it as before"):
        load_state(tmp_path, trained=None, others=others)
