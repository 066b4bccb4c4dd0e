"""Weights, gradients and optimizer state split over processes: FSDP (Zhao et al. 2023), by torch's `fully_shard`.

Of each trained tensor a process keeps some rows. A unit of the model, a block of the U-Net or a layer of an encoder,
is gathered before it is computed and freed afterwards; its gradients are summed where the rows are. The optimizer, the
average of the weights and states know nothing of that: they work on plain parameters, this process's rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from library.checkpoints.deferred import Deferred
from library.families.base import ModelBundle
from library.options import OptionError
from library.targets.base import ParamGroup, TrainTarget
from library.train.checkpoints import RawTensors
from library.train.config import RunConfig
from library.train.forecast import quietly
from library.train.fsdp_settings import LAUNCH, SplitSettings
from library.train.optimizers import BuiltOptimizer, build_optimizer
from library.train.placement import WEIGHT_DTYPES, reduced
from library.train.rounding import Rows
from library.train.shares import ProcessState, together
from library.train.updates import PIECE, PieceUpdates

logger = logging.getLogger(__name__)

DONE, FAILED = -1, -2  # what the main process says in place of the number of a tensor


@dataclass(frozen=True)
class Share:
    """A trained parameter that is split."""

    split: Any  # as the model has it, a DTensor; gradients come to it
    own: torch.nn.Parameter  # this process's rows in the same memory, perhaps none, as the optimizer has them
    rows: Rows


@dataclass(frozen=True)
class SplitModel:
    """What is split: parts of the model, and all that is trained."""

    parts: Sequence[Any]  # U-Net and text encoders that learn, each an FSDPModule that holds others
    frees_after_forward: bool
    shares: Sequence[Share]
    groups: tuple[ParamGroup, ...]  # the shares' own parameters

    @property
    def units(self) -> Iterator[Any]:
        """The modules that are gathered and freed by themselves, outer ones first."""
        return (module for part in self.parts for module in part.modules() if isinstance(module, FSDPModule))

    def whole_groups(self) -> tuple[ParamGroup, ...]:
        """The groups with the parameters as the model has them, whose sizes are those of all processes together."""
        split_of = {id(share.own): share.split for share in self.shares}
        return tuple(
            replace(group, parameters=tuple(split_of[id(p)] for p in group.parameters)) for group in self.groups
        )

    def updates(self, *args: Any, in_pieces: bool, **settings: Any) -> SplitUpdates:
        """See :class:`SplitUpdates`; `in_pieces`: not all parameters at once, where they take more memory meanwhile."""
        piece = PIECE if in_pieces else max(1, sum(share.rows.whole for share in self.shares))
        return SplitUpdates(*args, model=self, piece=piece, **settings)


def split_model(
    config: RunConfig,
    settings: SplitSettings,
    bundle: ModelBundle,
    target: TrainTarget,
    groups: Sequence[ParamGroup],
    device: torch.device,
) -> SplitModel:
    """Split the parts of the model that learn over all processes. No parameter of before may be used afterwards.

    Each of `groups` holds parameters of these parts. Raises OptionError for units that the model
    does not have, and for optimizers that can't be shared out.
    """
    check_splittable(config, device)
    learning = {id(parameter) for parameter in target.trained_module().parameters()}
    models = [bundle.unet, *bundle.text_encoders]
    parts: list[Any] = [part for part in models if any(id(parameter) in learning for parameter in part.parameters())]
    places = {id(parameter): (part, name) for part in parts for name, parameter in part.named_parameters()}
    where = [[places[id(parameter)] for parameter in group.parameters] for group in groups]
    _check_units(settings, parts)
    policy = _precision(config)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in parts:
        units = [module for module in part.modules() if type(module).__name__ in settings.units and module is not part]
        for unit in (*reversed(units), part):  # inner ones first
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=settings.frees_after_forward)
    split = {part: dict(part.named_parameters()) for part in parts}
    shares = [[_share(split[part][name]) for part, name in members] for members in where]
    own = (tuple(share.own for share in members) for members in shares)
    new_groups = tuple(replace(group, parameters=parameters) for group, parameters in zip(groups, own, strict=True))
    model = SplitModel(
        parts, settings.frees_after_forward, [share for members in shares for share in members], new_groups
    )
    for part in parts:
        part.register_forward_hook(_free_unless_learning)
    logger.info("FSDP: weights, gradients and optimizer are split over %d processes, by fully_shard (version 2)",
                dist.get_world_size())  # fmt: skip
    return model


def _check_units(settings: SplitSettings, parts: Sequence[torch.nn.Module]) -> None:
    if settings.has_own_units:
        there = {type(module).__name__ for part in parts for module in part.modules()}
        for name in sorted(settings.units - there):
            way_out = "leave it out, and blocks and layers are gathered one by one"
            raise OptionError("--fsdp_transformer_layer_cls_to_wrap", f"what is trained has no {name}", way_out)


def _precision(config: RunConfig) -> MixedPrecisionPolicy:
    """Weights are gathered in the precision they are computed with; gradients are summed in float32."""
    dtype = WEIGHT_DTYPES[config.training.mixed_precision]
    if dtype == torch.float32:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _share(split: Any) -> Share:
    local = split.to_local().detach()
    chunk = -(-len(split) // dist.get_world_size())  # rows of each process, as torch.chunk gives them
    row = min(chunk * dist.get_rank(), len(split))
    assert len(local) == max(0, min(chunk, len(split) - row)), "rows are not where they are expected"
    own = torch.nn.Parameter(local, requires_grad=split.requires_grad)
    return Share(split, own, Rows(whole=split.numel(), start=row * prod(split.shape[1:])))


def _free_unless_learning(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """Without a backward pass to free what was gathered, it would be there, and out of date, at the next step."""
    if not torch.is_grad_enabled() and not getattr(module, "is_at_hand", False):
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


# ---------------------------------------------------------------------------------------------- the optimizer


def check_splittable(config: RunConfig, device: torch.device) -> None:
    """Raise OptionError for an optimizer that does not treat each number by itself, which some rows suffice for.

    Found by trying: a matrix and its two halves must move alike.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 1, 256)[:, None]  # rows are not alike
    start, *gradients = ((sizes * torch.randn(256, 128, generator=generator)).to(device) for _ in range(4))
    options = replace(config.optimizer, learning_rate=0.1)  # far above rounding
    with quietly():
        results = []
        for num_parts in (1, 2):
            parameters = tuple(torch.nn.Parameter(part.clone()) for part in start.chunk(num_parts))
            built = build_optimizer(options, [ParamGroup("", parameters, None)])
            is_splittable = not built.needs_all_gradients
            for gradient in gradients if is_splittable else ():
                for parameter, part in zip(parameters, gradient.chunk(num_parts), strict=True):
                    parameter.grad = part.clone()
                built.optimizer.step()
            results.append(torch.cat([parameter.detach() for parameter in parameters]))
    if not is_splittable or not torch.allclose(*results, rtol=1e-4, atol=1e-4):
        name = config.optimizer.optimizer_type
        problem = f"{name} looks at more than a number and its gradient, and with FSDP each process has some rows"
        raise OptionError("--optimizer_type", problem, "use AdamW, Lion or SGDNesterov")


class SplitUpdates(PieceUpdates):
    """Updates this process's rows by the gradients of all processes.

    These are exchanged with each batch of an update, so that no process holds whole ones in between.
    """

    writes_alone = False
    flag = LAUNCH

    def __init__(self, built: BuiltOptimizer, *args: Any, model: SplitModel, **kwargs: Any) -> None:
        self.model = model
        self._rows = {id(share.own): share.rows for share in model.shares}
        super().__init__(built, *args, **kwargs)
        self.wide.draw_for(self._rows)

    def micro_batch(self, model: Any, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def exchange(self) -> None:
        """Gradients are exchanged already: hand them to the optimizer's parameters."""
        for share in self.model.shares:
            gradient, share.split.grad = share.split.grad, None
            share.own.grad = None if gradient is None else gradient.to_local()

    def norm(self) -> torch.Tensor:
        """The norm of all gradients of all processes."""
        return reduced(self.accelerator, super().norm().square(), "sum").sqrt()

    # ------------------------------------------------------------------ states and files

    def numel_of(self, parameter: torch.nn.Parameter) -> int:
        return self._rows[id(parameter)].whole

    def parts(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """What is split is in one part, this process's."""
        mine = {name: part for name, part in whole.items() if name in ("optimizer", "average")}
        mine["trained"] = LocalTensors(whole["trained"].module)
        others = {name: part for name, part in whole.items() if name not in mine}
        return {"split": SplitState(mine, self.accelerator.process_index), **others}

    def together(self, write: Callable[..., None], *, whole: bool = False) -> Callable[..., None]:
        return together(write, self.accelerator)

    def read_whole(self, read: Callable[[], None]) -> None:
        """Let the main process call `read`, in which state dicts hold whole tensors, gathered when they are used.

        The others hand over their rows of whatever it asks for. Raises OptionError there if the main process fails.
        """
        for share in self.model.shares:
            moved = share.own.data_ptr() != share.split.to_local().data_ptr()
            assert not moved, "the model's parameters have been moved away from the optimizer's"
        names = [(part, name) for part in self.model.parts for name, _ in part.named_parameters()]
        tensors = [dict(part.named_parameters())[name] for part, name in names]
        if not self.accelerator.is_main_process:
            self._hand_over(tensors)
            return
        numbers = {place: number for number, place in enumerate(names)}
        said = FAILED
        try:
            with contextlib.ExitStack() as stack:
                for part in self.model.parts:
                    stack.enter_context(self._gathering_state_dict(part, numbers, tensors))
                read()
            said = DONE
        finally:
            self._announce(said)

    def _hand_over(self, tensors: Sequence[Any]) -> None:
        while (number := self._announce(DONE)) >= 0:
            tensors[number].full_tensor()
        if number == FAILED:
            raise OptionError("", "the first process could not write its file", "see its message")

    def _announce(self, number: int) -> int:
        """The main process's number, on all processes."""
        told = torch.tensor([number], device=self.accelerator.device)
        dist.broadcast(told, src=0)
        return int(told)

    @contextlib.contextmanager
    def _gathering_state_dict(
        self, part: Any, numbers: Mapping[tuple[Any, str], int], tensors: Sequence[Any]
    ) -> Iterator[None]:
        """Inside the block the part's state dict has stand-ins for whole tensors."""

        def gather(number: int) -> torch.Tensor:
            self._announce(number)
            return tensors[number].full_tensor().detach()

        def stand_in(module: torch.nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
            for name, tensor in state.items():
                if isinstance(tensor, DTensor):
                    number = numbers[part, name.removeprefix(prefix)]
                    state[name] = gathered_later(tensor, lambda number=number: gather(number))

        hook = part.register_state_dict_post_hook(stand_in)
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside the block each process holds all weights in the precision they are computed with."""
        for part in self.model.parts:
            part.is_at_hand = True
        try:
            for part in self.model.parts:
                part.set_reshard_after_forward(False)
            for unit in self.model.units:
                unit.unshard()
            yield
        finally:
            for part in self.model.parts:
                part.is_at_hand = False
            for unit in self.model.units:
                unit.reshard()
                unit.set_reshard_after_forward(self.model.frees_after_forward, recurse=False)


class LocalTensors(RawTensors):
    """This process's rows of a module's parameters, and its buffers, by name."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: local(tensor) for name, tensor in super().state_dict().items()}


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class SplitState(ProcessState):
    """What is split of a run, as this process has it: rows of the weights, of the optimizer, of the average."""

    def __init__(self, parts: Mapping[str, Any], process_index: int) -> None:
        self.parts, self.process_index = parts, process_index

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def gathered_later(split: DTensor, gather: Callable[[], torch.Tensor]) -> Deferred:
    """Stands for a whole tensor, which is gathered by the first thing that asks for more than shape and precision."""
    return Deferred(tuple(split.shape), split.dtype, gather, split.device)
