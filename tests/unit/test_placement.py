"""Where everything lives: what a GPU would be given, decided without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.data.options import CacheOptions
from library.families.options import ModelOptions, TextOptions
from library.options import OptionError, build
from library.train import placement, session
from library.train.memory_options import DistributedOptions, MemoryOptions, PrecisionOptions
from library.train.offload import ActivationOffload
from library.train.options import TrainingOptions

CPU = torch.device("cpu")


def config(**values):
    """The groups that placement looks at, with these options."""
    values = {"pretrained_model_name_or_path": "model.safetensors", **values}
    groups = {
        "model": ModelOptions, "text": TextOptions, "cache": CacheOptions, "training": TrainingOptions,
        "precision": PrecisionOptions, "memory": MemoryOptions, "distributed": DistributedOptions,
    }  # fmt: skip
    return SimpleNamespace(
        **{
            name: build(group, {option: values[option] for option in values if option in group.__dataclass_fields__})
            for name, group in groups.items()
        }
    )


class Target:
    """Trains one layer."""

    trains_whole = frozenset()

    def __init__(self):
        self.layer = torch.nn.Linear(4, 4)

    def trained_module(self):
        return self.layer

    def before_forward(self, batch):
        pass

    def predict(self, family, bundle, noised, conditioning, batch):
        return self.layer(noised) + conditioning


def bundle(device="cpu"):
    unet, text = (torch.nn.Sequential(torch.nn.Linear(32, 32, device=device)).requires_grad_(False) for _ in range(2))
    return SimpleNamespace(unet=unet, text_encoders=(text,))


@pytest.mark.parametrize(
    ("options", "unet", "vae"),
    [
        ({}, torch.float32, torch.float32),
        ({"mixed_precision": "fp16"}, torch.float16, torch.float16),
        ({"mixed_precision": "bf16"}, torch.bfloat16, torch.bfloat16),
        ({"mixed_precision": "fp16", "no_half_vae": True}, torch.float16, torch.float32),
    ],
)
def test_the_frozen_model_has_the_precision_of_activations(options, unet, vae):
    plan = placement.load_plan(config(**options), CPU)
    assert (plan.unet, plan.text_encoders, plan.vae, plan.device) == (unet, unet, vae, CPU)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"mixed_precision": "fp16"}, torch.float32),
        ({"mixed_precision": "fp16", "full_fp16": True}, torch.float16),
        ({"mixed_precision": "bf16", "full_bf16": True}, torch.bfloat16),
    ],
)
def test_what_is_trained_is_cast_as_asked(options, dtype):
    target, models = Target(), bundle()
    placement.set_precision(config(**options), models, target)
    assert {parameter.dtype for parameter in target.layer.parameters()} == {dtype}
    assert models.unet[0].weight.dtype is torch.float32, "the frozen model is loaded in its precision"


OFFLOAD = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True}


@pytest.mark.parametrize(
    ("options", "device", "is_offloaded"),
    [
        (OFFLOAD, "meta", True),
        ({**OFFLOAD, "gradient_checkpointing": False}, "meta", False),
        ({"gradient_checkpointing": True}, "meta", False),
        (OFFLOAD, "cpu", False),
    ],
)
def test_checkpoints_go_to_the_cpu_from_elsewhere(options, device, is_offloaded):
    """With --cpu_offload_checkpointing; the meta device stands for a GPU here."""
    module = placement.step_module(config(**options), None, bundle(device), Target())  # type: ignore[arg-type]
    assert isinstance(module.forward_context, ActivationOffload) is is_offloaded


def test_a_step_is_taken_in_its_context():
    family = SimpleNamespace(encode_text=lambda *_: torch.zeros(4), condition=lambda states, sizes: states)
    module = placement.step_module(config(), family, bundle(), Target())  # type: ignore[arg-type]
    entered = []

    class Context(ActivationOffload):
        def _to_cpu(self, tensor):
            entered.append(tensor.shape)
            return super()._to_cpu(tensor)

    module.forward_context = Context(module)
    large = torch.ones(1 << 14, 4)  # 256 KiB
    none = dict.fromkeys(["token_weights", "text_states", "original_hw_B2", "crop_yx_B2", "target_hw_B2"])
    batch = SimpleNamespace(token_ids=(), **none)
    module(large, batch, True).sum().backward()
    assert entered == [large.shape]


@pytest.mark.parametrize(
    ("options", "needs_vae", "leaves"),
    [
        ({"cache_latents": True}, False, True),
        ({"cache_latents": True, "highvram": True}, False, False),
        ({"cache_latents": True}, True, False),
        ({}, True, False),
    ],
)
def test_a_vae_without_work_leaves_the_device(options, needs_vae, leaves):
    """Unless --highvram leaves it there."""
    vae, moved = torch.nn.Linear(1, 1), []
    vae.to = moved.append  # type: ignore[method-assign, assignment]
    data = SimpleNamespace(brings_latents=False, needs_vae=needs_vae, cache_latents=lambda *_, **__: None)
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=CPU, wait_for_everyone=lambda: None)
    session.cache_latents(config(**options), data, SimpleNamespace(vae=vae), accelerator)  # type: ignore[arg-type]
    assert moved == ["cpu"] * leaves


def test_what_data_parallelism_is_told():
    """--ddp_timeout, --ddp_gradient_as_bucket_view and --ddp_static_graph as accelerate takes them."""
    plain, timeout = placement._distributed(config(ddp_timeout=5, ddp_static_graph=True).distributed)
    assert plain.static_graph and not plain.gradient_as_bucket_view and timeout.timeout.total_seconds() == 300
    (view,) = placement._distributed(config(ddp_gradient_as_bucket_view=True).distributed)
    assert view.gradient_as_bucket_view and not view.static_graph and not view.find_unused_parameters
    (skipping,) = placement._distributed(config().distributed, skips_parameters=True)
    assert skipping.find_unused_parameters
    with pytest.raises(OptionError, match="--ddp_static_graph.*module_dropout"):
        placement._distributed(config(ddp_static_graph=True).distributed, skips_parameters=True)


@pytest.mark.parametrize(
    ("has_gpu", "has_nccl", "options", "backend"),
    [
        (True, True, {}, None),
        (True, False, {}, "gloo"),  # Windows
        (False, False, {}, None),
        (False, False, {"deepspeed": True}, "gloo"),
        (True, True, {"deepspeed": True}, None),
    ],
)
def test_what_processes_talk_by(has_gpu, has_nccl, options, backend, monkeypatch):
    """None leaves the choice to accelerate."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    _, *group = placement._distributed(config(**options).distributed)
    assert [handler.to_kwargs()["backend"] for handler in group] == ([backend] if backend else [])


def test_deepspeed_leaves_no_weight_out():
    with pytest.raises(OptionError, match="--deepspeed.*--stop_text_encoder_training"):
        placement._distributed(config(deepspeed=True).distributed, skips_parameters=True)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16", "full_bf16": True}]
)
def test_a_static_graph_exchanges_gradients_in_every_backward_pass(options):
    placement.check_static_graph(config(mixed_precision="bf16"))
    with pytest.raises(OptionError, match="--ddp_static_graph"):
        placement.check_static_graph(config(**options))
