"""From gradients to an update: clipped, applied if finite; all together, or one by one as they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from library.options import OptionError
from library.train.exchange import exchange_gradients
from library.train.guard import apply_if_finite, decided_on_device
from library.train.optimizers import BuiltOptimizer
from library.train.rounding import HALF, WideUpdates
from library.train.shares import ProcessState, write_shares

FUSED = "--fused_backward_pass"
PIECE = 2**26  # numbers that are wide at a time: 256 MiB, and as much for their gradients
Member = tuple[int, Any]  # the number of the optimizer's group, a parameter


class Updates:
    """Clips the gradients of `parameters` by their global norm and lets the optimizer apply them."""

    writes_alone = True  # whether the main process can write files by itself; else all of them do it together
    before_change: Callable[[], None] = staticmethod(lambda: None)  # called before each change of the parameters

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,  # accelerate's wrapper
        parameters: Sequence[torch.nn.Parameter],
        *,
        max_grad_norm: float,
        wide: WideUpdates,
        skips_parameters: bool = False,
    ) -> None:
        """`skips_parameters`: processes may have gradients of different ones."""
        self.accelerator, self.optimizer, self.parameters, self.wide = accelerator, optimizer, parameters, wide
        self.limit = max_grad_norm or float("inf")
        self.skips_parameters = skips_parameters
        # data parallelism loses sight of parameters that are made wide
        self.exchanges = accelerator.num_processes > 1 and any(parameter.dtype in HALF for parameter in parameters)

    def micro_batch(self, model: Any, *, is_last: bool) -> AbstractContextManager[None]:
        """The context of one batch of an update: processes exchange gradients only with the last one."""
        is_exchanged = is_last and not self.exchanges
        return contextlib.nullcontext() if is_exchanged else self.accelerator.no_sync(model)

    def exchange(self) -> None:
        """Once all gradients of an update are there: their mean over processes, where `micro_batch` left that out."""
        if self.exchanges:
            exchange_gradients(self.accelerator, self.parameters, may_differ=self.skips_parameters)

    def clip(self) -> torch.Tensor:
        """The global gradient norm, a scalar tensor; gradients are scaled down to the limit. Once per update."""
        self.exchange()
        self.before_change()
        self.wide.widen(self.parameters)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.limit)
        assert norm is not None
        return norm

    def apply(self, is_finite: torch.Tensor) -> None:
        """Update the parameters unless `is_finite` (a 0-dim bool tensor on the device) is False."""
        try:
            apply_if_finite(self.optimizer, is_finite)
        finally:
            self.wide.narrow()

    # What sharing a run's weights and its optimizer between processes changes about states and files.

    def parts(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """What a run needs to go on, by name: objects with a state_dict, that of "trained" being tensors alone.

        `whole` is what that is where nothing is shared.
        """
        return dict(whole)

    def write_shares(self, folder: Path, parts: Mapping[str, Any]) -> Path | None:
        """For a state that becomes `folder`: write what each process keeps for itself; where it is written, if it is.

        All processes call it, with what `parts` gave.
        """
        (state,) = [part for part in parts.values() if isinstance(part, ProcessState)] or (None,)
        return write_shares(state, self.accelerator, folder) if state is not None else None

    def numel_of(self, parameter: torch.nn.Parameter) -> int:
        """The numbers that a trained parameter has on all processes together."""
        return parameter.numel()

    def read_whole(self, read: Callable[[], None]) -> None:
        """Call `read`, which reads all weights, on the main process. All processes call it where weights are split."""
        if self.accelerator.is_main_process:
            read()

    def at_hand(self) -> AbstractContextManager[None]:
        """Inside the block each process can use the model without the others. All of them enter it together."""
        return contextlib.nullcontext()

    def together(self, write: Callable[..., None], *, whole: bool = False) -> Callable[..., None]:
        """`write`, a function of a path and more that all processes call, in a form in which none is left behind.

        `whole`: inside, each process holds all weights.
        """
        return write


class PieceUpdates(Updates):
    """Updates half-precision parameters piece by piece, so that only one piece's float32 copies are there at a time.

    For optimizers whose state belongs to single parameters, without a gradient scaler.
    """

    flag = "--full_bf16"

    def __init__(self, built: BuiltOptimizer, *args: Any, piece: int = PIECE, **kwargs: Any) -> None:
        """`piece`: numbers in a piece, about; a larger parameter is a piece of its own."""
        super().__init__(*args, **kwargs)
        self.bare = built.optimizer
        members = members_of(self.bare)
        total = sum(self.numel_of(parameter) for _, parameter in members)
        self._pieces = divided(members, max(1, -(-total // piece)), self.numel_of)

    def norm(self) -> torch.Tensor:
        """The norm of all gradients together."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms))

    def clip(self) -> torch.Tensor:
        self.exchange()
        norm = self.norm()
        self._factor = (self.limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def apply(self, is_finite: torch.Tensor) -> None:
        decides_on_device = getattr(self.bare, "_step_supports_amp_scaling", False)
        if not (decides_on_device or bool(is_finite)):
            return
        self.before_change()
        for piece in self._pieces:
            members = [(number, parameter) for number, parameter in piece if parameter.grad is not None]
            if not members:
                continue
            self.wide.widen([parameter for _, parameter in members])
            try:
                torch._foreach_mul_([p.grad for _, p in members], self._factor)  # pyright: ignore
                with decided_on_device(self.bare, is_finite) if decides_on_device else contextlib.nullcontext():
                    step_alone(self.bare, [member for member in members if member[1].numel()], self.flag)
            finally:
                self.wide.narrow()


def members_of(optimizer: torch.optim.Optimizer) -> list[Member]:
    """The parameters of an optimizer in its order."""
    return [(number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]


def step_alone(optimizer: Any, members: Sequence[Member], flag: str) -> None:
    """Let the optimizer update these parameters and no others."""
    whole = optimizer.param_groups  # a state that is loaded brings groups of its own
    numbers = sorted({number for number, _ in members})
    alone = [{**whole[n], "params": [p for number, p in members if number == n]} for n in numbers]
    optimizer.param_groups = alone
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = whole
    for number, group in zip(numbers, alone, strict=True):
        if any(value is not whole[number].get(name) for name, value in group.items() if name != "params"):
            problem = f"{type(optimizer).__name__} keeps something for all parameters together"
            raise OptionError(flag, problem, "use AdaFactor or AdamW")


@dataclass
class _Together:
    """Parameters that are updated at once, when the last of their gradients is there."""

    members: list[Member]
    arrived: int = 0


class FusedUpdates(Updates):
    """Updates parameters inside the backward pass, as soon as their gradients are complete, and frees the gradients.

    Each parameter alone, or all in `num_groups` groups of about one size. No two groups' gradients are there at the
    same time, so there is no norm of all of them to clip by: those of a group are clipped by their own. Ones that are
    not finite count as 0, so nothing waits for the device. Only for one batch per update, one process, and an optimizer
    whose state belongs to single parameters.
    """

    def __init__(
        self, built: BuiltOptimizer, *args: Any, flag: str = FUSED, num_groups: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.flag = flag
        if self.accelerator.num_processes > 1:
            raise OptionError(flag, f"works on one process, not {self.accelerator.num_processes}", "leave it out")
        if self.accelerator.scaler is not None:
            raise OptionError(flag, "does not go with a gradient scaler", "use --mixed_precision bf16")
        if built.needs_all_gradients:
            raise OptionError(flag, f"{type(built.optimizer).__name__} looks at all gradients together", "use AdamW")
        self.bare = built.optimizer
        self._norms: list[torch.Tensor] = []
        members = members_of(self.bare)
        parts = [[member] for member in members] if num_groups is None else divided(members, num_groups)
        self._together = [_Together(part) for part in parts]
        for together in self._together:
            for _, parameter in together.members:
                parameter.register_post_accumulate_grad_hook(self._hook(together))

    def clip(self) -> torch.Tensor:
        """The global norm of the gradients that have been applied, before they were clipped."""
        for together in self._together:
            if together.arrived:  # not all of its parameters had a part in this step
                self._update(together)
        norms, self._norms = self._norms, []
        return (
            torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.accelerator.device)
        )

    def apply(self, is_finite: torch.Tensor) -> None:
        """Nothing is left to do."""

    def _hook(self, together: _Together) -> Any:
        def arrived(parameter: torch.Tensor) -> None:
            together.arrived += 1
            if together.arrived == len(together.members):
                self._update(together)

        return arrived

    @torch.no_grad()
    def _update(self, together: _Together) -> None:
        self.before_change()
        together.arrived = 0
        members = [(number, parameter) for number, parameter in together.members if parameter.grad is not None]
        parameters = [parameter for _, parameter in members]
        self.wide.widen(parameters)
        norms = [torch.linalg.vector_norm(parameter.grad.float()) for parameter in parameters]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
        self._norms.append(norm)
        factor = (self.limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for parameter in parameters:
            parameter.grad = torch.where(norm.isfinite(), parameter.grad * factor, 0).to(parameter.grad.dtype)
        step_alone(self.bare, members, self.flag)
        self.wide.narrow()
        for parameter in parameters:
            parameter.grad = None


def divided(
    members: Sequence[Member], num_groups: int, numel_of: Callable[[Any], int] = torch.Tensor.numel
) -> list[list[Member]]:
    """The parameters in up to `num_groups` runs of about as many numbers each, in their order."""
    total = sum(numel_of(parameter) for _, parameter in members)
    parts: list[list[Member]] = [[] for _ in range(num_groups)]
    before = 0
    for member in members:
        parts[min(before * num_groups // max(total, 1), num_groups - 1)].append(member)
        before += numel_of(member[1])
    return [part for part in parts if part]
