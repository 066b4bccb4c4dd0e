"""From gradients to an update: clipped, applied if finite; all together, or one by one as they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from library.options import OptionError
from library.train.guard import apply_if_finite
from library.train.optimizers import BuiltOptimizer
from library.train.rounding import WideUpdates

FUSED = "--fused_backward_pass"


class Updates:
    """Clips the gradients of `parameters` by their global norm and lets the optimizer apply them."""

    has_state = True  # whether the optimizer's state is all that a run needs to go on

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,  # accelerate's wrapper
        parameters: Sequence[torch.nn.Parameter],
        *,
        max_grad_norm: float,
        wide: WideUpdates,
    ) -> None:
        self.accelerator, self.optimizer, self.parameters, self.wide = accelerator, optimizer, parameters, wide
        self.limit = max_grad_norm or float("inf")

    def micro_batch(self, model: Any, *, is_last: bool) -> AbstractContextManager[None]:
        """The context of one batch of an update: processes exchange gradients only with the last one."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(model)

    def clip(self) -> torch.Tensor:
        """The global gradient norm, a scalar tensor; gradients are scaled down to the limit. Once per update."""
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


@dataclass
class _Together:
    """Parameters that are updated at once, when the last of their gradients is there."""

    members: list[tuple[int, Any]]  # (number of the optimizer's group, parameter)
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
        members = [(number, p) for number, group in enumerate(self.bare.param_groups) for p in group["params"]]
        self._together = [_Together(part) for part in _divided(members, num_groups)]
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
        whole = self.bare.param_groups  # a state that is loaded brings groups of its own
        numbers = sorted({number for number, _ in members})
        alone = [{**whole[n], "params": [p for number, p in members if number == n]} for n in numbers]
        self.bare.param_groups = alone
        try:
            self.bare.step()
        finally:
            self.bare.param_groups = whole
        for number, group in zip(numbers, alone, strict=True):
            if any(value is not whole[number].get(name) for name, value in group.items() if name != "params"):
                name = type(self.bare).__name__
                problem = f"{name} keeps something for all parameters together"
                raise OptionError(self.flag, problem, "use AdaFactor or AdamW")
        self.wide.narrow()
        for parameter in parameters:
            parameter.grad = None


def _divided(members: Sequence[tuple[int, Any]], num_groups: int | None) -> list[list[tuple[int, Any]]]:
    """The parameters one by one, or in up to `num_groups` runs of about as many numbers each, in their order."""
    if num_groups is None:
        return [[member] for member in members]
    total = sum(parameter.numel() for _, parameter in members)
    parts: list[list[tuple[int, Any]]] = [[] for _ in range(num_groups)]
    before = 0
    for member in members:
        parts[min(before * num_groups // max(total, 1), num_groups - 1)].append(member)
        before += member[1].numel()
    return [part for part in parts if part]
