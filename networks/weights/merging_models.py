"""Networks merged into a model's single file, an entry at a time.

Networks act in their order, W_i = W_i-1 + ratio_i change_i(W_i-1), as when they are applied: the change of OFT, DoRA
and (IA)^3 depends on the weight. Sums are made in float32, and stored in the precision of the file. What no network
changes is copied byte by byte. Memory: the largest tensor in float32, and as it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from library.checkpoints.architecture import ArchitectureError, model_kind
from library.checkpoints.keymaps import CLIP_PREFIX, OPENCLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, Slot
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.probe import LORA_KEYS
from library.checkpoints.safetensors_io import DTYPES, Entry, NonFiniteError, is_finite, rounded
from library.checkpoints.scaled import check_not_scaled
from library.checkpoints.sd import copied_entry
from library.checkpoints.weights import Weights, open_weights
from library.options import OptionError
from networks.weights.checkpoint_layers import CheckpointLayer, bias_slot, checkpoint_layers, other_layers, rows_of
from networks.weights.fidelity import FidelityReport
from networks.weights.merge_inputs import MODELS, Source, report_unmatched
from networks.weights.module_changes import add_bias_change_, add_change_, check_change, layer_of

logger = logging.getLogger(__name__)

MODEL = "--sd_model"
# of the model itself; what else is in a file, such as schedules and averaged weights, keeps its precision
OF_MODEL = (UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX, OPENCLIP_PREFIX, "conditioner.")
PIECE = 1 << 22  # elements that are compared at a time


@dataclass(frozen=True)
class Precisions:
    """As headers name them."""

    calculation: str  # to which inputs are rounded
    saving: str | None  # of the whole model; None: changed weights as `calculation`, others as they are

    @property
    def torch_calculation(self) -> torch.dtype:
        return getattr(torch, DTYPES[self.calculation][1])


@dataclass
class ModelFile:
    """A model to be changed."""

    path: str
    weights: Weights
    kind: str
    layers: Mapping[str, CheckpointLayer]


@dataclass
class MergedModel:
    """The entries of a model with networks in it; `report` fills while they are produced."""

    entries: list[Entry]
    num_changed: int  # tensors
    report: FidelityReport = field(default_factory=FidelityReport)


def open_model(path: str) -> ModelFile:
    """A model's single file; OptionError for anything else. Only the header is read (all of a .ckpt)."""
    found = Path(path).expanduser()
    if found.is_dir():
        way_out = "make a file of it first: tools/convert_diffusers20_original_sd.py"
        raise OptionError(MODEL, f"{path} is a Diffusers folder, and networks are merged into single files", way_out)
    weights = open_weights(found, MODEL)
    check_not_scaled(weights.shapes, path, MODEL)
    if any(LORA_KEYS.search(key) for key in weights.shapes):
        raise OptionError(MODEL, f"{path} is a network, not a model", f"name it among {MODELS}")
    kind = model_kind(weights.shapes)
    if not kind:
        raise OptionError(
            MODEL, f"{path} is no Stable Diffusion model: it holds no U-Net", "name a complete checkpoint"
        )
    try:
        layers = checkpoint_layers(weights.shapes, kind)
    except ArchitectureError as error:
        raise OptionError(MODEL, f"{path} is no complete {KIND_NAMES[kind]} model: {error}") from None
    return ModelFile(path, weights, kind, layers)


def merged_model(
    model: ModelFile,
    sources: Sequence[Source],
    precisions: Precisions,
    *,
    ignore_unmatched: bool = False,
    on_done: Callable[[int], object] = lambda num_bytes: None,
) -> MergedModel:
    """The entries of the changed file, each made when its turn comes; `on_done` is told the bytes of each.

    Raises OptionError for networks that do not fit; nothing is computed yet.
    """
    places = _changed_places(model, sources, ignore_unmatched)
    by_key: dict[str, list[Place]] = {}
    for place in places:
        by_key.setdefault(place.slot.key, []).append(place)
    merged = MergedModel([], len(by_key))
    work = _Work(model, sources, precisions, merged.report, on_done)
    for name in model.weights.shapes:
        merged.entries.append(work.changed(name, by_key[name]) if name in by_key else work.copied(name))
    return merged


@dataclass(frozen=True)
class Place:
    """A weight or bias that networks change."""

    layer: CheckpointLayer
    slot: Slot
    changes: tuple[tuple[Source, str], ...]  # a network and the name of its module
    is_bias: bool = False


def _changed_places(model: ModelFile, sources: Sequence[Source], ignore_unmatched: bool) -> list[Place]:
    """What the networks change; OptionError for modules that stand on no layer, or on one of another size."""
    layers = {**model.layers, **other_layers(model.weights.shapes, model.kind)}
    unmatched: dict[str, list[str]] = {}
    weights: dict[str, list[tuple[Source, str]]] = {}
    biases: dict[str, list[tuple[Source, str]]] = {}
    for source in sources:
        file, has_any = source.file, False
        for name in file.modules:
            layer = layers.get(layer_of(name))
            if layer is None:
                unmatched.setdefault(str(file.path), []).append(name)
                continue
            has_any = True
            changes_bias = check_change(file, name, layer.shape)
            if changes_bias and bias_slot(layer).key not in model.weights.shapes:
                problem = f"{file.path} changes the bias of {name}, which has none in {model.path}"
                raise OptionError(MODELS, problem, "take another network, or another model")
            if source.ratio_of(name):
                weights.setdefault(layer.name, []).append((source, name))
                if changes_bias:
                    biases.setdefault(layer.name, []).append((source, name))
        if not has_any:
            problem = f"none of the {len(file.modules)} modules of {file.path} is in {model.path}"
            first = next(iter(file.modules))
            raise OptionError(MODELS, f"{problem} (the first is {first})", "take a network for this kind of model")
        unmatched.setdefault(str(file.path), []).extend(file.other_keys)
    report_unmatched(unmatched, f"{model.path} has no layers for these modules", ignore=ignore_unmatched)
    return [
        *(Place(layers[name], layers[name].slot, tuple(found)) for name, found in weights.items()),
        *(Place(layers[name], bias_slot(layers[name]), tuple(found), is_bias=True) for name, found in biases.items()),
    ]


class _Work:
    """Makes entries."""

    def __init__(
        self,
        model: ModelFile,
        sources: Sequence[Source],
        precisions: Precisions,
        report: FidelityReport,
        on_done: Callable[[int], object],
    ) -> None:
        self.model, self.sources, self.precisions = model, sources, precisions
        self.report, self.on_done = report, on_done

    def copied(self, name: str) -> Entry:
        """A tensor that no network changes: as it is, or in the precision of the file."""
        plain = copied_entry(self.model.weights, name)
        dtype = self.precisions.saving
        if dtype is None or not plain.dtype.startswith(("F", "BF")) or not name.startswith(OF_MODEL):
            dtype = plain.dtype

        def produce() -> torch.Tensor:
            tensor = plain.produce()
            cast = rounded(tensor, getattr(torch, DTYPES[dtype][1]), f"{self.model.path}: {name}")
            self.on_done(entry.nbytes)
            return cast

        entry = Entry(name, dtype, plain.shape, produce, is_trusted=True)
        return entry

    def changed(self, name: str, places: Sequence[Place]) -> Entry:
        """A tensor with the changes of all networks; three places share one where q, k and v are fused."""
        dtype = self.precisions.saving or self.precisions.calculation
        calculation = self.precisions.torch_calculation

        def produce() -> torch.Tensor:
            what = f"{self.model.path}: {name}"
            original = rounded(self.model.weights.tensor(name), calculation, what, "--precision")
            if not is_finite(original):
                raise NonFiniteError(f"{what} holds NaN or infinity", "take another model")
            merged = original.to(torch.float32, copy=True)
            for place in places:
                rows = rows_of(place.slot, merged)
                for source, module in place.changes:
                    multiplier = source.ratio_of(module)
                    if place.is_bias:
                        add_bias_change_(rows, source.file, module, multiplier, calculation)
                    else:
                        add_change_(rows, source.file, module, multiplier, calculation)
            if not is_finite(merged):
                raise NonFiniteError(f"{what} is no finite number once the networks are in it", "use smaller --ratios")
            stored = rounded(merged, getattr(torch, DTYPES[dtype][1]), what)
            for place in places:
                if not place.is_bias:
                    norms = _norms(*(rows_of(place.slot, tensor) for tensor in (original, merged, stored)))
                    self.report.add(place.layer.name, *norms)
            self.on_done(entry.nbytes)
            return stored

        entry = Entry(name, dtype, tuple(self.model.weights.shapes[name]), produce, is_trusted=True)
        return entry


def _norms(original: torch.Tensor, merged: torch.Tensor, stored: torch.Tensor) -> tuple[float, float]:
    """(||merged - original||^2, ||stored - merged||^2), a piece at a time."""
    change_sq = error_sq = 0.0
    flat = [tensor.reshape(-1).split(PIECE) for tensor in (original, merged, stored)]
    for before, exact, after in zip(*flat, strict=True):
        change_sq += float((exact - before.float()).square_().sum())
        if stored.dtype is not torch.float32:
            error_sq += float((after.float() - exact).square_().sum())
    return change_sq, error_sq
