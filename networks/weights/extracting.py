"""A LoRA from the difference of two models, a layer at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from library.checkpoints.architecture import ArchitectureError
from library.checkpoints.safetensors_io import NonFiniteError, is_finite, rounded
from library.checkpoints.weights import Weights
from library.options import OptionError
from library.wording import counted
from networks.layers import UNET_PREFIX
from networks.weights.checkpoint_layers import CheckpointLayer, checkpoint_layers
from networks.weights.low_rank_options import ExtractOptions
from networks.weights.low_rank_work import Layer, Results, device_of, torch_dtype
from networks.weights.merge_options import PRECISIONS
from networks.weights.stored_results import StoredResults
from networks.weights.svd import Svd, matrix_svd

logger = logging.getLogger(__name__)
ORG, TUNED = "--model_org", "--model_tuned"
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Pair:
    """A layer of both models."""

    org: CheckpointLayer
    tuned: CheckpointLayer

    @property
    def name(self) -> str:
        return self.org.name

    @property
    def layer(self) -> Layer:
        return Layer(self.org.name, self.org.shape)


@dataclass(frozen=True)
class TwoModels:
    """The files that are subtracted, opened lazily."""

    org: Weights
    tuned: Weights
    kind: str  # "sd1" | "sd2" | "sdxl"
    precision: torch.dtype | None = None  # to which both are rounded first; None: as they are
    paths: tuple[str, str] = (ORG, TUNED)  # for messages

    def difference(self, pair: Pair, device: torch.device) -> torch.Tensor:
        """tuned - org in float32 as a matrix [out, in (x height x width)]; NonFiniteError for NaN and infinity."""
        tuned = self._rounded(pair.tuned, self.tuned, self.paths[1]).to(device, torch.float32, copy=True)
        difference = tuned.sub_(self._rounded(pair.org, self.org, self.paths[0]).to(device, torch.float32))
        if not is_finite(difference):
            bad = self.paths[1] if is_finite(pair.org.weight(self.org)) else self.paths[0]
            raise NonFiniteError(f"{bad}: {pair.org.slot.key} holds NaN or infinity", "take another file")
        return difference.flatten(1)

    def _rounded(self, layer: CheckpointLayer, weights: Weights, path: str) -> torch.Tensor:
        weight = layer.weight(weights)
        if self.precision is None:
            return weight
        return rounded(weight, self.precision, f"{path}: {layer.slot.key}", "--load_precision")


def layer_pairs(models: TwoModels, *, has_convs: bool, ignore_unmatched: bool) -> list[Pair]:
    """The layers that LoRA stands on: text encoders, then the U-Net; `has_convs`: those of convolution blocks too.

    Raises OptionError that lists layers which only one of the models has, or which differ in size.
    """
    org, tuned = (
        _layers(weights.shapes, models.kind, where) for weights, where in ((models.org, ORG), (models.tuned, TUNED))
    )
    wanted = {name: layer for name, layer in org.items() if has_convs or not layer.is_in_conv_block}
    more = [name for name, layer in tuned.items() if name not in org and (has_convs or not layer.is_in_conv_block)]
    odd = [name for name, layer in wanted.items() if name not in tuned or tuned[name].shape != layer.shape] + more
    if odd:
        listed = ", ".join(odd[:SHOWN]) + (f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else "")
        problem = f"{counted(len(odd), 'layer')} of the two models don't match ({listed})"
        if not ignore_unmatched:
            raise OptionError(TUNED, problem, "take a model that came of the other, or use --ignore_unmatched")
        logger.warning("%s; left out", problem)
    return [Pair(layer, tuned[name]) for name, layer in wanted.items() if name not in odd]


def _layers(shapes: Mapping[str, tuple[int, ...]], kind: str, where: str) -> dict[str, CheckpointLayer]:
    try:
        return checkpoint_layers(shapes, kind)
    except ArchitectureError as error:
        raise OptionError(where, f"the model is not complete: {error}", "take a whole model") from None


def extract(
    models: TwoModels, options: ExtractOptions, store: StoredResults, bar: Callable[[list[Pair]], Iterator[Pair]] = iter
) -> Results:
    """All tensors of the LoRA, in `store`; `bar` passes the layers on and shows how far it is.

    Raises OptionError where the models have no common layers, or no difference.
    """
    device = device_of(options.device)
    pairs = layer_pairs(models, has_convs=options.conv_dim is not None, ignore_unmatched=options.ignore_unmatched)
    if not _text_encoders_differ(models, pairs, options.min_diff, device):
        pairs = [pair for pair in pairs if pair.name.startswith(UNET_PREFIX)]
    dtype = torch_dtype(PRECISIONS[options.save_precision or "float"])
    results = Results(store, dtype, torch.int64 if options.save_precision is None else dtype)
    for pair in bar(pairs):
        difference = models.difference(pair, device)
        rank = pair.layer.largest_rank(options.dim, options.conv_dim)
        svd = _decomposed(difference, rank, options.svd_method)
        down, up = results.add(pair.layer, svd, rank, clamp=options.clamp_quantile)
        difference.addmm_(up, down, alpha=-1)
        results.note(pair.name, svd.energy, squared_norm(difference), svd)
    if not results.report.total.exact_sq:
        raise OptionError(TUNED, "is equal to the other model in every layer", "name a model that was trained")
    return results


def _decomposed(difference_OI: torch.Tensor, rank: int, method: str) -> Svd:
    """Of a layer without a difference: nothing, in any directions."""
    if difference_OI.any():
        return matrix_svd(difference_OI, rank, method)
    nothing = difference_OI.new_zeros(0)
    return Svd(difference_OI[:, :0], difference_OI[:0], nothing.double(), 0.0)


def squared_norm(matrix_OI: torch.Tensor) -> float:
    """Squared Frobenius norm, summed in float64 some rows at a time."""
    return sum(float(rows.double().square().sum()) for rows in matrix_OI.split(1024))


def _text_encoders_differ(models: TwoModels, pairs: list[Pair], min_diff: float, device: torch.device) -> bool:
    """Whether a weight of a text encoder differs by more than `min_diff`; says what was measured."""
    in_text = [pair for pair in pairs if not pair.name.startswith(UNET_PREFIX)]
    if not in_text:
        return False
    largest, name = max((float(models.difference(pair, device).abs().max()), pair.name) for pair in in_text)
    differ = largest > min_diff
    verdict = "they are part of the LoRA" if differ else "they are left out (a smaller --min_diff keeps them)"
    what = "no difference" if not largest else f"a largest difference of {largest:.3g} ({name})"
    logger.info("text encoders: %s, --min_diff is %g: %s", what, min_diff, verdict if largest else "they are left out")
    return differ
