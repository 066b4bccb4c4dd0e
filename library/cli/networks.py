"""Networks (LoRA and its relatives) for generation: from files on the command line into a loaded model.

Stands here because it joins two rooms that do not know each other: generation and the contract of network modules.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.generate.options import NetworkFile, NetworkOptions
from library.options import OptionError

if TYPE_CHECKING:
    from library.families.base import LoadPlan, ModelBundle
    from library.targets.adapter import Models, NetworkFactory

logger = logging.getLogger(__name__)


def import_modules(options: NetworkOptions) -> list[NetworkFactory]:
    """The network modules, in order; OptionError when one is missing or can't do what generation needs."""
    if not options.files:
        return []
    from library.targets.adapter import NetworkFactory

    factories = [NetworkFactory(file.module) for file in options.files]
    for factory in factories:
        factory.require("create_network_from_weights")
    return factories


def attach(factories: Sequence[NetworkFactory], options: NetworkOptions, bundle: ModelBundle, plan: LoadPlan) -> None:
    """Merge each network into the model, or hook it to it; OptionError when a file does not fit the model."""
    if not options.files:
        return
    from library.targets.adapter import Models

    models = Models(bundle.text_encoders, bundle.unet, bundle.vae)
    for factory, file in zip(factories, options.files, strict=True):
        _attach_one(factory, file, models, plan, wants_merge=options.network_merge)


def _attach_one(
    factory: NetworkFactory, file: NetworkFile, models: Models, plan: LoadPlan, *, wants_merge: bool
) -> None:
    network, tensors = factory.create_from_weights(
        file.multiplier, file.path, models, for_inference=True, **file.arguments
    )
    can_merge = wants_merge and _is_mergeable(network.network)
    if wants_merge and not can_merge:
        logger.warning("--network_merge: %s can't be merged and is applied instead", file.path)
    if can_merge:
        network.merge(models, tensors, plan.unet, plan.device)
    else:
        network.apply(models, text=True, unet=True)
        num_found = network.load(file.path, tensors or {})
        if tensors and not num_found:
            way_out = "use a network that was trained on this kind of model"
            raise OptionError("--network_weights", f"no weight of {file.path} fits this model", way_out)
        network.network.to(dtype=plan.unet, device=plan.device).eval().requires_grad_(False)
    how = "merged" if can_merge else "applied"
    logger.info("%s: %s with multiplier %g", file.path, how, file.multiplier)


def _is_mergeable(network: object) -> bool:
    asked = getattr(network, "is_mergeable", None)
    return bool(asked()) if callable(asked) else False
