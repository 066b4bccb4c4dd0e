"""How much memory a step takes, before anything is loaded.

Weights, trained parameters, gradients and the optimizer's state follow from numbers of parameters. For the rest, one
step is computed on torch's "meta" device, which knows shapes and no values: the tensors that are alive at a time are
counted, and the largest sum is what activations take. Attention is counted as fused kernels do it: queries, keys,
values, output and one number per row are kept, scores are not.

What is not counted is allowed for: the workspaces of kernels, gaps between tensors, and on a GPU its context.

Shape letters: B samples, C channels, H W pixels or latent pixels.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from library.data.batch import Batch
from library.data.buckets import Size
from library.families.base import ModelBundle, ModelFamily
from library.models.attention import SlicedAttention
from library.targets.base import ParamGroup, TrainTarget
from library.train.config import RunConfig
from library.train.placement import StepModule

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 4
WORKSPACES = 300 * 2**20  # bytes: of matrix products and convolutions, about; allocators round up as well
GPU_CONTEXT = 500 * 2**20  # bytes that a process takes on a GPU before its first tensor, about
GAPS = 0.05  # of activations


@dataclass(frozen=True)
class MemoryPart:
    """One part of the memory, and where its size comes from."""

    name: str
    size: int  # bytes
    why: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The parts that are on the device together at the largest moment of a step."""

    parts: tuple[MemoryPart, ...]
    caching: int | None = None  # bytes while latents are cached, before the first step
    is_complete: bool = True  # False: activations could not be counted

    @property
    def total(self) -> int:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class StepShape:
    """The largest batch of a run."""

    batch_size: int
    bucket_wh: Size
    token_windows: int


# ---------------------------------------------------------------------------------------------- parts


def known_parts(
    config: RunConfig,
    bundle: ModelBundle,
    groups: Sequence[ParamGroup],
    state_bytes_per_parameter: float | None,
    module: torch.nn.Module | None = None,
) -> list[MemoryPart]:
    """What follows from numbers of parameters; `module` is the target's, which may have frozen ones of its own."""
    vae_stays = not config.cache.enabled or config.memory.highvram
    encoders = [parameter for encoder in bundle.text_encoders for parameter in encoder.parameters()]
    trained = [parameter for group in groups for parameter in group.parameters]
    count = sum(parameter.numel() for parameter in trained)
    own = {id(parameter) for parameter in (*bundle.unet.parameters(), *encoders)}
    added = [parameter for parameter in trained if id(parameter) not in own]
    known = own | {id(parameter) for parameter in added}
    frozen = [] if module is None else [parameter for parameter in module.parameters() if id(parameter) not in known]
    parts = [
        _weights("U-Net", bundle.unet.parameters()),
        *([_weights("text encoder", encoders)] if text_encoders_stay(config) else []),
        *([_weights("VAE", bundle.vae.parameters())] if vae_stays else []),
        *([_added(added)] if added or not trained else []),
        *([_weights("the network's frozen", frozen)] if frozen else []),
        _gradients(config, trained),
    ]
    per_parameter = 8 if state_bytes_per_parameter is None else state_bytes_per_parameter
    how = "a guess: this optimizer can't be tried here" if state_bytes_per_parameter is None else "as tried out"
    why = f"{per_parameter:.3g} bytes per trained parameter, {how}"
    parts.append(MemoryPart("optimizer", round(per_parameter * count), why))
    if config.average.ema_decay is not None:
        parts.append(MemoryPart("moving average", 4 * count, "float32, --ema_decay"))
    return parts


def text_encoders_stay(config: RunConfig) -> bool:
    """Whether text encoders are on the device while training, and not only before it."""
    return not config.text_cache.enabled or config.memory.highvram


def _added(parameters: Sequence[torch.Tensor]) -> MemoryPart:
    """What is trained beside the model's own weights."""
    count = sum(parameter.numel() for parameter in parameters)
    return MemoryPart("trained parameters", _size(parameters), f"{count:,} parameters{_precision(parameters)}")


def _gradients(config: RunConfig, trained: Sequence[torch.Tensor]) -> MemoryPart:
    if flag := config.memory.fused_flag:
        largest = max((parameter.numel() * parameter.element_size() for parameter in trained), default=0)
        num_groups = config.memory.num_fused_groups
        if num_groups is None:
            return MemoryPart("gradients", largest, f"one tensor at a time, {flag}")
        return MemoryPart("gradients", largest + _size(trained) // num_groups, f"a group at a time, {flag}")
    return MemoryPart("gradients", _size(trained), "one number for each trained parameter")


def _weights(name: str, parameters: Iterable[torch.Tensor]) -> MemoryPart:
    parameters = list(parameters)
    count = sum(parameter.numel() for parameter in parameters)
    return MemoryPart(f"{name} weights", _size(parameters), f"{count:,} parameters{_precision(parameters)}")


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _precision(tensors: Sequence[torch.Tensor]) -> str:
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return f", {' and '.join(dtypes)}" if dtypes else ""


def estimate(
    config: RunConfig,
    family: ModelFamily,
    bundle: ModelBundle,
    target: TrainTarget,
    parts: Sequence[MemoryPart],
    shape: StepShape,
    *,
    on_gpu: bool,
) -> MemoryEstimate:
    """The whole estimate for a model on the meta device to which `target` is attached."""
    parts = list(parts)
    caching = None
    try:
        encoding = None
        if not config.cache.enabled:
            encoding = encoding_bytes(bundle, shape.batch_size, shape.bucket_wh)
        else:
            weights = sum(part.size for part in parts if part.name.endswith("weights"))
            caching = weights + _size(bundle.vae.parameters())
            if not text_encoders_stay(config):
                caching += _size(parameter for encoder in bundle.text_encoders for parameter in encoder.parameters())
            caching += encoding_bytes(bundle, config.cache.vae_batch_size, shape.bucket_wh)
        step = step_bytes(config, family, bundle, target, shape)
    except Exception as error:  # networks and kernels that need values, not only shapes
        logger.debug("activations can't be counted: %s", error)
        return MemoryEstimate(tuple(parts), is_complete=False)
    how = f"batch {shape.batch_size} of {shape.bucket_wh[0]}x{shape.bucket_wh[1]}"
    if config.training.gradient_checkpointing:
        how += ", recomputed in the backward pass"
        how += "; less by what is kept in the CPU's memory" if config.memory.cpu_offload_checkpointing else ""
    if encoding is not None and encoding > step:
        parts.append(MemoryPart("encoding of images", encoding, f"{how}, by the VAE: larger than the step itself"))
        step = encoding
    else:
        parts.append(MemoryPart("activations", step, how))
    allowance = int(GAPS * step) + (WORKSPACES if on_gpu else 0)
    parts.append(MemoryPart("allowance", allowance, "workspaces of kernels, gaps; a rule of thumb"))
    if on_gpu:
        parts.append(MemoryPart("GPU context", GPU_CONTEXT, "taken by every process; a rule of thumb"))
        caching = None if caching is None else caching + WORKSPACES + GPU_CONTEXT
    return MemoryEstimate(tuple(parts), caching)


# ---------------------------------------------------------------------------------------------- counting


class _FusedAttention(torch.autograd.Function):
    """The shapes that a fused attention kernel takes, gives and keeps; no values."""

    @staticmethod
    def forward(ctx: Any, query, key, value):  # type: ignore[override]
        out = torch.empty_like(query)
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _CountedAttention(SlicedAttention):
    """Attention as shapes only."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, upcast: bool) -> torch.Tensor:
        return _FusedAttention.apply(query, key, value)  # type: ignore[return-value]


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still alive; `known` ones don't count."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        result = func(*given, **(named or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor):
                self._note(made.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def step_bytes(
    config: RunConfig, family: ModelFamily, bundle: ModelBundle, target: TrainTarget, shape: StepShape
) -> int:
    """The most bytes of activations at a time in one step, forward and backward, on the meta device."""
    unet: Any = bundle.unet
    unet.set_attn_processor(_CountedAttention())
    step = StepModule(family, bundle, target, config.text)
    dtype = next(unet.parameters()).dtype
    batch = _meta_batch(shape, len(bundle.text_encoders))
    noised_BCHW = batch.noise_BCHW.to(dtype)
    for parameter in step.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # counted as gradients
    known = [*step.parameters(), *step.buffers(), *(p.grad for p in step.parameters() if p.grad is not None)]
    with AliveBytes(known) as alive:
        prediction_BCHW = step(noised_BCHW, batch, target.trains_text(0))
        loss = (prediction_BCHW.float() - batch.noise_BCHW).square().mean()
        loss.backward()
    return alive.most


def _meta_batch(shape: StepShape, num_encoders: int) -> Batch:
    B, (width, height) = shape.batch_size, shape.bucket_wh
    with torch.device("meta"):
        noise_BCHW = torch.empty(B, LATENT_CHANNELS, height // 8, width // 8)
        ids = torch.empty(B, shape.token_windows, 77, dtype=torch.int64)
        sizes_B2 = torch.empty(B, 2, dtype=torch.int64)
        return Batch(
            noise_BCHW=noise_BCHW,
            timesteps_B=torch.empty(B, dtype=torch.int64),
            token_ids=(ids,) * num_encoders,
            captions=("",) * B,
            loss_weight_B=torch.empty(B),
            denominator=float(B),
            original_hw_B2=sizes_B2,
            crop_yx_B2=sizes_B2,
            target_hw_B2=sizes_B2,
            image_names=("",) * B,
            latents_BCHW=noise_BCHW,
        )


def encoding_bytes(bundle: ModelBundle, batch_size: int, bucket_wh: Size) -> int:
    """The most bytes at a time while the VAE encodes a batch of images, on the meta device."""
    encoder: Any = bundle.vae
    encoder.set_attn_processor(_CountedAttention())
    width, height = bucket_wh
    dtype = next(encoder.parameters()).dtype
    images_BCHW = torch.empty(batch_size, 3, height, width, device="meta", dtype=dtype)
    with torch.no_grad(), AliveBytes([*encoder.parameters(), *encoder.buffers()]) as alive:
        encoder.encode(images_BCHW)
    return alive.most
