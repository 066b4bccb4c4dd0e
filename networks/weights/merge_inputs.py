"""What is merged: files of networks with their strengths, of one family of models, and what they can't be merged for.

Importing this brings no torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from library.checkpoints.network_kind import KIND_NAMES, kind_by_header
from library.options import OptionError
from networks.weights.block_weights import BlockWeights, weight_of
from networks.weights.network_file import NetworkFile, kind_of_modules

logger = logging.getLogger(__name__)

MODELS = "--models"
SHOWN = 3  # names in a message
OF_SD2 = re.compile(r"stable-diffusion-v2-(?:(768-v)|512)")


@dataclass(frozen=True)
class Source:
    """A network and its share in the result."""

    file: NetworkFile
    ratio: float
    blocks: BlockWeights = field(default_factory=dict)

    def ratio_of(self, name: str) -> float:
        """The strength of one module."""
        return self.ratio * weight_of(self.blocks, name)


def kind_of(file: NetworkFile) -> str:
    """ "sd1", "sd2", "sdxl", or "" where neither the tensors nor the notes in the file tell."""
    if kind := kind_of_modules(file):
        return kind
    return kind_by_header(file.metadata)


def common_kind(files: Sequence[NetworkFile], model: tuple[str, str] | None = None) -> str:
    """The kind of all networks, and of the model (path, kind) they are for; "" where nothing tells.

    Raises OptionError that says which is which for networks of different kinds of models.
    """
    known = [(str(file.path), kind) for file in files if (kind := kind_of(file))]
    if model is not None:
        known.insert(0, model)
    for path, kind in known:
        if kind != known[0][1]:
            first, what = known[0][0], "the model " if model is not None else ""
            problem = f"{what}{first} is {KIND_NAMES[known[0][1]]}, and {path} is for {KIND_NAMES[kind]}"
            if model is None:
                problem = f"{first} is for {KIND_NAMES[known[0][1]]}, and {path} is for {KIND_NAMES[kind]}"
            raise OptionError(MODELS, problem, "merge what was made for the same kind of model")
    return known[0][1] if known else ""


def report_unmatched(unmatched: Mapping[str, Sequence[str]], why: str, *, ignore: bool) -> None:
    """Names by file that can't be merged: OptionError that lists them, or a warning if they are to be ignored."""
    found = {path: names for path, names in unmatched.items() if names}
    if not found:
        return
    lists = "; ".join(f"{path}: {_listed(names)}" for path, names in found.items())
    problem = f"{why}: {lists}"
    if not ignore:
        raise OptionError(MODELS, problem, "check the files, or leave these out: --ignore_unmatched")
    logger.warning("%s; left out", problem)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def titles(metadata_by_stem: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """What a merged file says it was made from: the title of each input, or its name."""
    return ", ".join(metadata.get("modelspec.title") or stem for stem, metadata in metadata_by_stem)


def predicts_velocity(kind: str, files: Iterable[Mapping[str, str]]) -> bool:
    """What the first of the headers says that says something; else what most models of the kind do."""
    for metadata in files:
        if stated := metadata.get("modelspec.prediction_type"):
            return stated in ("v", "v_prediction")
        if found := OF_SD2.match(metadata.get("modelspec.architecture", "")):
            return bool(found[1])
        if base := metadata.get("ss_base_model_version"):
            return base.endswith("_v")
    return kind == "sd2"


def one_or_dynamic(values: Iterable[float]) -> str:
    """For metadata: the value of all modules, or "Dynamic"."""
    found = set(values)
    return str(found.pop()) if len(found) == 1 else "Dynamic"
