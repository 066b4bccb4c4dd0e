"""ControlNets for generation: from files on the command line to what takes part in drawing.

Stands here because it joins two rooms that do not know each other: generation and the networks package.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.control_net import check_control_net
from library.checkpoints.weights import open_weights
from library.generate.control_options import LLLITE, MODELS, ControlFile, ControlOptions
from library.options import OptionError

if TYPE_CHECKING:
    from library.families.base import LoadPlan, ModelBundle
    from library.generate.drawing import Part
    from library.models.options import AttentionOptions

logger = logging.getLogger(__name__)


def check(options: ControlOptions, kind: str) -> None:
    """Raise OptionError for files that are no such networks or not for a model of `kind`, as far as headers tell."""
    for file in options.files:
        if file.flag == MODELS:
            check_control_net(file.path, kind, MODELS)
            continue
        path = Path(file.path).expanduser()
        if not path.is_file():
            raise OptionError(LLLITE, f"{path} does not exist", "name a ControlNet-LLLite file")
        with open_weights(path, LLLITE) as weights:
            if not all(name.startswith("lllite_") for name in weights.shapes):
                raise OptionError(LLLITE, f"{path} is no ControlNet-LLLite", f"give a ControlNet as {MODELS}")


def parts(
    options: ControlOptions, lllite_module: str, bundle: ModelBundle, attention: AttentionOptions, plan: LoadPlan
) -> list[Part]:
    """The networks, loaded and hooked to the model; OptionError where one does not fit it.

    `lllite_module` names the Python module for ControlNet-LLLite files. They are hooked outside of all networks that
    are there before, which so see the changed input, too.
    """
    if not options.files:
        return []
    from library.generate.control import Control, ControlNets
    from library.generate.control_lllite import LLLite, LLLiteControl
    from library.models import attention as attention_kernels
    from library.models.control_net import load_control_net

    controls, lllites = [], []
    for index, file in enumerate(options.files):
        if file.flag == MODELS:
            kind, unet = bundle.source.kind, bundle.unet
            net = load_control_net(file.path, unet, kind, dtype=plan.unet, device=plan.device, flag=MODELS)
            attention_kernels.apply_to(net, attention.kind)
            controls.append(Control(net, file, index))
        else:
            lllites.append(LLLite(_lllite(file, lllite_module, bundle, plan), file, index))
        logger.info("%s: weight %g, for %g%% of the steps", file.path, file.weight, 100 * min(file.ratio, 1))
    made: list[Part] = [ControlNets(controls, sums=options.control_net_mode == "sum")] if controls else []
    return made + ([LLLiteControl(lllites)] if lllites else [])


def _lllite(file: ControlFile, module: str, bundle: ModelBundle, plan: LoadPlan):
    from library.targets.adapter import blamed_on, read_tensors

    create = importlib.import_module(module).create_network_from_weights
    tensors = read_tensors(file.path, LLLITE)
    with blamed_on(LLLITE):
        network, _ = create(file.weight, file.path, None, None, bundle.unet, weights_sd=tensors)
    network.to(dtype=plan.unet, device=plan.device).eval().requires_grad_(False)
    network.apply_to(None, bundle.unet, False, True)
    return network
