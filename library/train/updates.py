"""From gradients to an update: clipped, applied if finite; all together, or one by one as they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
    before_change: Callable[[], None] = staticmethod(lambda: None)  # called before each change of the parameters

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


class FusedUpdates(Updates):
    """Updates each parameter inside the backward pass, as soon as its gradient is complete, and frees the gradient.

    No two gradients are there at the same time, so there is no norm of all of them to clip by: each is clipped by its
    own. One that is not finite counts as 0, so nothing waits for the device. Only for one batch per update, one
    process, and an optimizer whose state belongs to single parameters.
    """

    def __init__(self, built: BuiltOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1:
            raise OptionError(FUSED, f"works on one process, not {self.accelerator.num_processes}", "leave it out")
        if self.accelerator.scaler is not None:
            raise OptionError(FUSED, "does not go with a gradient scaler", "use --mixed_precision bf16")
        if built.needs_all_gradients:
            raise OptionError(FUSED, f"{type(built.optimizer).__name__} looks at all gradients together", "use AdamW")
        self.bare = built.optimizer
        self._norms: list[torch.Tensor] = []
        for number, group in enumerate(self.bare.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def clip(self) -> torch.Tensor:
        """The global norm of the gradients that have been applied, before they were clipped."""
        norms, self._norms = self._norms, []
        return (
            torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.accelerator.device)
        )

    def apply(self, is_finite: torch.Tensor) -> None:
        """Nothing is left to do."""

    def _hook(self, number: int) -> Any:
        def update(parameter: torch.Tensor) -> None:
            self._update(parameter, self.bare.param_groups[number])  # a state that is loaded brings groups of its own

        return update

    @torch.no_grad()
    def _update(self, parameter: Any, group: dict[str, Any]) -> None:
        self.before_change()
        self.wide.widen([parameter])
        norm = torch.linalg.vector_norm(parameter.grad.float())
        self._norms.append(norm)
        factor = (self.limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        parameter.grad = torch.where(norm.isfinite(), parameter.grad * factor, 0).to(parameter.grad.dtype)
        alone = {**group, "params": [parameter]}
        whole, self.bare.param_groups = self.bare.param_groups, [alone]
        try:
            self.bare.step()
        finally:
            self.bare.param_groups = whole
        if any(value is not group.get(name) for name, value in alone.items() if name != "params"):
            name = type(self.bare).__name__
            raise OptionError(FUSED, f"{name} keeps something for all parameters together", "use AdaFactor or AdamW")
        self.wide.narrow()
        parameter.grad = None
