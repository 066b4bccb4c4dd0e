"""Where everything lives: dtypes, device, the one module that the loop calls, the move of a batch."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.nn.parallel import DistributedDataParallel

from library.data.batch import Batch
from library.families.base import LoadPlan, ModelBundle, ModelFamily, PictureSizes
from library.families.options import TextOptions
from library.models import float8
from library.options import OptionError
from library.targets.base import TrainTarget
from library.text.states import TextStates
from library.train.compilation import compile_unet
from library.train.config import RunConfig
from library.train.fsdp_settings import take_over
from library.train.memory_options import DistributedOptions
from library.train.offload import ActivationOffload
from library.train.output_options import LoggingOptions
from library.train.zero import check_engine, deepspeed_plugin

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(config: RunConfig, *, autocast: bool, skips_parameters: bool = False) -> Accelerator:
    """This process's accelerator. Accumulation is the loop's own, so that an epoch's last update is a true mean.

    `autocast` and `skips_parameters` are what the target says of itself.
    """
    precision = config.training.mixed_precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise OptionError("--mixed_precision", "fp16 needs a GPU", "use bf16 or no on the CPU")
    if (
        precision == "bf16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise OptionError("--mixed_precision", "this GPU has no bf16", "use fp16")
    take_over()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=list(config.logging.trackers) or None,
        project_dir=logging_folder(config.logging),
        deepspeed_plugin=deepspeed_plugin(config),
        kwargs_handlers=[AutocastKwargs(enabled=autocast), *_distributed(config.distributed, skips_parameters)],
    )
    check_engine(config, accelerator)
    if accelerator.num_processes == 1:
        for name in config.distributed.given_for_several_processes:
            logger.warning("--%s has no effect: there is one process", name)
    elif config.distributed.ddp_static_graph and not config.distributed.deepspeed:
        check_static_graph(config)
    return accelerator


def check_static_graph(config: RunConfig) -> None:
    """Raise OptionError where some backward passes exchange no gradients, which a static graph does not allow."""
    batches, flag = config.training.gradient_accumulation_steps, "--ddp_static_graph"
    if batches > 1:
        problem = f"does not go with --gradient_accumulation_steps {batches}: gradients are exchanged once an update"
        raise OptionError(flag, problem, "leave it out")
    if master_dtype(config) != torch.float32:
        raise OptionError(flag, "does not go with --full_fp16 or --full_bf16", "leave it out")


def _distributed(options: DistributedOptions, skips_parameters: bool = False) -> list[Any]:
    """accelerate's settings of data parallelism."""
    if skips_parameters and options.ddp_static_graph:
        problem = "does not go with a network that leaves modules out by chance (module_dropout, dylora)"
        raise OptionError("--ddp_static_graph", problem, "leave it out")
    if skips_parameters and options.deepspeed:
        problem = "updates every weight in every step, and this run leaves some out (--stop_text_encoder_training, "
        raise OptionError("--deepspeed", problem + "module_dropout, dylora)", "start plain processes")
    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=options.ddp_gradient_as_bucket_view,
            static_graph=options.ddp_static_graph,
            find_unused_parameters=skips_parameters,
        )
    ]
    group: dict[str, Any] = {}
    if options.ddp_timeout is not None:
        group["timeout"] = timedelta(minutes=options.ddp_timeout)
    if options.deepspeed and not torch.cuda.is_available():
        group["backend"] = "gloo"  # accelerate chooses none for DeepSpeed on the CPU, and would count one process
    elif "LOCAL_RANK" in os.environ and torch.cuda.is_available() and not torch.distributed.is_nccl_available():
        group["backend"] = "gloo"  # Windows; accelerate would ask for NCCL
    return [*handlers, InitProcessGroupKwargs(**group)] if group else handlers


def logging_folder(logging: LoggingOptions) -> str | None:
    """The run's own folder: <logging_dir>/<log_prefix><time>."""
    if not logging.logging_dir:
        return None
    return str(Path(logging.logging_dir) / f"{logging.log_prefix or ''}{datetime.now():%Y%m%d%H%M%S}")


def load_plan(config: RunConfig, device: torch.device, trains_whole: Collection[str] = ()) -> LoadPlan:
    """The frozen model in the precision of activations, what `trains_whole` names of it in that of what is trained."""
    weight_dtype = WEIGHT_DTYPES[config.training.mixed_precision]
    vae_dtype = torch.float32 if config.model.no_half_vae else weight_dtype
    unet, text = (master_dtype(config) if part in trains_whole else weight_dtype for part in ("unet", "text_encoders"))
    return LoadPlan(unet=unet, text_encoders=text, vae=vae_dtype, device=device)


def master_dtype(config: RunConfig) -> torch.dtype:
    """The precision of what is trained: float32, or that of activations where the run asks for it."""
    is_half = config.precision.full_fp16 or config.precision.full_bf16
    return WEIGHT_DTYPES[config.training.mixed_precision] if is_half else torch.float32


def enable_gradient_checkpointing(bundle: ModelBundle) -> None:
    """Recompute activations in the backward pass, in every part that can have gradients."""
    unet: Any = bundle.unet
    unet.enable_gradient_checkpointing()
    for text_encoder in bundle.text_encoders:
        encoder: Any = text_encoder
        encoder.gradient_checkpointing_enable()


def set_precision(config: RunConfig, bundle: ModelBundle, target: TrainTarget) -> None:
    """After the target is set up: what is trained in half precision, what is frozen in 8 bits, as asked."""
    precision, dtype = config.precision, master_dtype(config)
    trained = {id(parameter) for parameter in target.trained_module().parameters()}
    for parameter in target.trained_module().parameters():
        if parameter.dtype != dtype and dtype != torch.float32:
            parameter.data = parameter.data.to(dtype)
    if "text_encoders" in target.trains_whole:  # some of them, the others were loaded alike
        for encoder in bundle.text_encoders:
            if not any(id(parameter) in trained for parameter in encoder.parameters()):
                encoder.to(WEIGHT_DTYPES[config.training.mixed_precision])
    frozen = [bundle.unet] if precision.stores_unet_in_8_bits and "unet" not in target.trains_whole else []
    stores_text = precision.stores_text_in_8_bits and "text_encoders" not in target.trains_whole
    frozen += bundle.text_encoders if stores_text else ()
    saved = sum(float8.store(module) for module in frozen)
    if frozen:
        logger.info("weights in 8 bits: %.0f MiB less", saved / 2**20)


def step_module(config: RunConfig, family: ModelFamily, bundle: ModelBundle, target: TrainTarget) -> StepModule:
    """The module that the loop calls, compiled and offloading as asked."""
    device = next(bundle.unet.parameters()).device
    if config.memory.torch_compile:
        compile_unet(bundle.unet, config.memory.dynamo_backend, device)
    module = StepModule(family, bundle, target, config.text)
    # processes read the same file, and no communication library sends 8-bit weights
    in_8_bits = [name for name, buffer in module.named_buffers() if buffer.dtype is float8.FORMAT]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, in_8_bits)
    if config.memory.cpu_offload_checkpointing and config.training.gradient_checkpointing:
        if device.type == "cpu":
            logger.warning("--cpu_offload_checkpointing has no effect: everything is in the CPU's memory already")
        else:
            module.forward_context = ActivationOffload(module)
    return module


class StepModule(torch.nn.Module):
    """Text encoding and prediction as one forward, so that data parallelism sees every trained parameter in it."""

    def __init__(self, family: ModelFamily, bundle: ModelBundle, target: TrainTarget, text: TextOptions) -> None:
        super().__init__()
        self.family, self.bundle, self.target, self.text = family, bundle, target, text
        self.forward_context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self.parts = torch.nn.ModuleList([target.trained_module(), bundle.unet, *bundle.text_encoders])

    def forward(self, noised_BCHW: torch.Tensor, batch: Batch, trains_text: bool) -> torch.Tensor:
        self.target.before_forward(batch)
        with self.forward_context():
            with torch.set_grad_enabled(trains_text):
                conditioning = self.family.condition(self._text_states(batch), picture_sizes(batch))
            return self.target.predict(self.family, self.bundle, noised_BCHW, conditioning, batch)

    def _text_states(self, batch: Batch) -> TextStates:
        """Those that come with the batch from a cache, or those of its captions."""
        if batch.text_states is not None:
            return TextStates(batch.text_states, batch.pooled_BP)
        return self.family.encode_text(self.bundle.text_encoders, batch.token_ids, self.text, batch.token_weights)


def picture_sizes(batch: Batch) -> PictureSizes:
    return PictureSizes(batch.original_hw_B2, batch.crop_yx_B2, batch.target_hw_B2)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Inside the block the module is in evaluation mode; afterwards each of its parts is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, is_training in modes:
            if part.training != is_training:
                part.train(is_training)


def reduced(accelerator: Accelerator, tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The "mean" or "sum" of a tensor over all processes, on each of them."""
    result = accelerator.reduce(tensor, how)
    assert isinstance(result, torch.Tensor)
    return result


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; copies from pinned memory don't make the host wait."""
    moved = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
            moved[field.name] = tuple(item.to(device, non_blocking=True) for item in value)
    return replace(batch, **moved)
