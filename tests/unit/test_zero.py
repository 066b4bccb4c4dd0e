"""DeepSpeed's settings, as accelerate takes them; runs with it are in tests/scripts/test_deepspeed.py and tests/gpu."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from library.data.options import LoaderOptions
from library.options import OptionError
from library.train import shares, zero_state
from library.train.memory_options import DistributedOptions
from library.train.options import OptimizerOptions
from library.train.resume import check_processes
from library.train.zero import check_engine, deepspeed_plugin, keep_whole

NETWORK = SimpleNamespace(trains_whole=frozenset())


def config(**options):
    return SimpleNamespace(
        distributed=DistributedOptions(deepspeed=True, **options),
        optimizer=OptimizerOptions(max_grad_norm=0.5),
        loader=LoaderOptions(train_batch_size=3),
    )


def test_the_settings_reach_deepspeed(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    plugin = deepspeed_plugin(
        config(
            zero_stage=2,
            offload_optimizer_device="nvme",
            offload_optimizer_nvme_path="/fast",
        )
    )
    settings = plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast"}
    assert settings["train_micro_batch_size_per_gpu"] == 3 and settings["gradient_accumulation_steps"] == 1
    assert settings["gradient_clipping"] == 0.5 and settings["zero_force_ds_cpu_optimizer"] is False
    assert "fp16" not in settings


def test_weights_in_16_bits_and_trained_parameters_whole(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    plugin = deepspeed_plugin(
        config(offload_optimizer_device="cpu", fp16_master_weights_and_gradients=True)
    )  # fmt: skip
    assert plugin.deepspeed_config["fp16"]["fp16_master_weights_and_grads"] is True
    keep_whole(plugin, [torch.nn.Parameter(torch.empty(1000, 500, device="meta"))], NETWORK)
    assert plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] > 500_000


def test_weights_on_the_disk(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    plugin = deepspeed_plugin(config(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/fast"))
    assert plugin.deepspeed_config["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/fast"}


def test_without_a_launcher_it_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError, match="--deepspeed.*accelerate launch"):
        deepspeed_plugin(config())


def test_nothing_without_the_option():
    assert deepspeed_plugin(SimpleNamespace(distributed=DistributedOptions())) is None


def test_weights_of_a_whole_model_are_split(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    plugin = deepspeed_plugin(config(zero_stage=3))
    keep_whole(plugin, [torch.nn.Parameter(torch.empty(8))], SimpleNamespace(trains_whole=frozenset({"unet"})))
    assert "stage3_param_persistence_threshold" not in plugin.deepspeed_config["zero_optimization"]


@pytest.mark.parametrize(
    ("kind", "is_asked", "words"),
    [
        (DistributedType.MULTI_CPU, True, ["--deepspeed", "ACCELERATE_USE_CPU"]),
        (DistributedType.DEEPSPEED, False, ["--use_deepspeed", "add --deepspeed"]),
    ],
)
def test_another_engine_than_the_flags_ask_for(kind, is_asked, words):
    options = SimpleNamespace(distributed=DistributedOptions(deepspeed=is_asked))
    with pytest.raises(OptionError) as error:
        check_engine(options, SimpleNamespace(distributed_type=kind))
    assert all(word in str(error.value) for word in words), error.value


class Alone:
    """What `together` and `write_shares` ask of accelerate where there is one process."""

    device, is_main_process, process_index = torch.device("cpu"), True, 0

    def __init__(self, failures_elsewhere: int = 0) -> None:
        self.failures_elsewhere = failures_elsewhere

    def reduce(self, tensor, how):
        assert how == "sum"
        return tensor + self.failures_elsewhere


def engine(rate=0.1):
    """An engine that splits nothing: its optimizer is torch's own."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=rate)
    return SimpleNamespace(optimizer=optimizer, parameter=parameter)


def stepped(engine):
    engine.parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    engine.optimizer.step()
    return engine


def test_shares_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_state, "_plain_classes", list)
    before = stepped(engine())
    hidden = shares.write_shares(zero_state.EngineState(before, 0), Alone(), tmp_path / "net-state")
    assert [path.name for path in hidden.iterdir()] == ["process-00000.pt"] and hidden.name == ".net-state.shares"
    after = engine()
    zero_state.EngineState(after, 0).read(hidden)
    after.parameter.data = before.parameter.data.clone()
    assert torch.equal(stepped(before).parameter, stepped(after).parameter)


def test_one_process_that_cannot_write_stops_all(tmp_path):
    state = zero_state.EngineState(engine(), 0)
    with pytest.raises(OptionError, match="another process"):
        shares.write_shares(state, Alone(failures_elsewhere=1), tmp_path / "net-state")
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="--save_state.*can't write"):
        shares.write_shares(state, Alone(), tmp_path / "file" / "net-state")


def test_a_state_of_another_number_of_processes(tmp_path):
    folder = tmp_path / "shares"
    check_processes(tmp_path, 3)  # a state without shares is anybody's
    folder.mkdir()
    for index in range(2):
        (folder / f"process-{index:05d}.pt").write_text("")
    check_processes(tmp_path, 2)
    with pytest.raises(OptionError, match="--resume.*2 processes.*this run has 3"):
        check_processes(tmp_path, 3)
