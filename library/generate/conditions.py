"""Prompts as conditioning of the U-Net: emphasis, BREAK, long prompts; each text is encoded once.

Shape letters: B prompts, N windows of text, T = 77 N tokens, D features.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from library.families.base import Conditioning, ModelBundle, ModelFamily, PictureSizes
from library.families.options import TextOptions
from library.generate.request import GenerationRequest
from library.models.added_words import LayeredWords
from library.text.added_words import NUM_LAYERS
from library.text.states import TextStates
from library.text.tokens import WINDOW
from library.text.weighted_tokens import (
    WeightedTokens,
    apply_weights,
    token_ids,
    token_weights,
    weighted_tokens,
)

logger = logging.getLogger(__name__)

KEPT = 256  # encoded prompts held at most; one of SD 1.x takes 0.1 to 0.2 MB a window


class RegionalNetworks(Protocol):
    """Networks of which each belongs to one part of the prompt."""

    def for_text_of(self, part: int | None) -> AbstractContextManager[None]:
        """The block in which the network of this part alone acts on text encoders, and none for None."""
        ...


class PromptEncoder:
    """Encodes the prompts of requests and keeps the results, as long as the text encoders' weights stay the same.

    Prompts are encoded one by one, so that a prompt's conditioning does not depend on its batch.
    """

    def __init__(self, family: ModelFamily, bundle: ModelBundle, way_out: str = "") -> None:
        """`way_out` is added, in brackets, to what is said about prompts that are too long."""
        self.family = family
        self.bundle = bundle
        self._way_out = f" ({way_out})" if way_out else ""
        self._tokens: dict[tuple[str, int], tuple[WeightedTokens, ...]] = {}
        self._kept: OrderedDict[Hashable, TextStates] = OrderedDict()
        self.layered_words: LayeredWords | None = None
        self.networks: RegionalNetworks | None = None  # for regional use

    def forget(self) -> None:
        """Encode everything anew from here on: the text encoders have learned something."""
        self._kept.clear()

    def windows(self, request: GenerationRequest) -> int:
        """Windows that a request's conditioning has: those of its longest text."""
        texts = [self._tokenize(text, request.max_windows) for text in request.texts]
        return max(len(tokens.windows) for by_tokenizer in texts for tokens in by_tokenizer)

    def __call__(self, requests: Sequence[GenerationRequest]) -> Conditioning:
        """Conditioning of one batch: the first of each request's `texts`, then the second of each, and so on."""
        num_windows = max(map(self.windows, requests))
        if requests[0].is_regional:
            return self._regional(requests, num_windows)
        groups = zip(*(request.texts for request in requests), strict=True)
        rows = [(text, request) for group in groups for text, request in zip(group, requests, strict=True)]
        joined = _joined([self._encoded(text, num_windows, request) for text, request in rows])
        return self.family.condition(joined, self._sizes(requests, len(requests[0].texts)))

    def _sizes(self, requests: Sequence[GenerationRequest], num_groups: int) -> PictureSizes:
        """What is told of sizes: a row for each request, `num_groups` times; the first is the negative prompt's."""
        rows = []
        for group in range(num_groups):
            for request in requests:
                is_negative = request.is_guided and group == 0
                told = request.sizes.negative_original_hw if is_negative else request.sizes.original_hw
                target = (request.height, request.width)
                rows.append((told(*target), request.sizes.crop_yx, target))
        original, crop, target = torch.tensor(rows, device=_device(self.bundle.unet)).unbind(1)
        return PictureSizes(original, crop, target)

    def _regional(self, requests: Sequence[GenerationRequest], num_windows: int) -> Conditioning:
        """Conditioning of which the parts of a prompt share a row of the U-Net.

        The context has rows for the negative prompts, then for all parts of the first picture, all of the second and so
        on; the pooled text and the sizes have one row for each picture there, of its last part.
        """
        first = requests[0]
        begin, end = int(first.is_guided), int(first.is_guided) + len(first.part_texts)

        def group(place: int) -> list[TextStates]:
            return [self._encoded(request.texts[place], num_windows, request) for request in requests]

        before = [row for place in range(begin) for row in group(place)]
        after = [row for place in range(end, len(first.texts)) for row in group(place)]
        parts = [
            [self._encoded(text, num_windows, request, part) for part, text in enumerate(request.part_texts)]
            for request in requests
        ]
        text = _joined([*before, *(row for of_picture in parts for row in of_picture), *after])
        shared = [*before, *(of_picture[-1] for of_picture in parts), *after]
        sizes = self._sizes(requests, len(shared) // len(requests))
        return self.family.condition(TextStates(text.by_encoder, _joined(shared).pooled_BP), sizes)

    def _tokenize(self, text: str, max_windows: int) -> tuple[WeightedTokens, ...]:
        """The text as tokens of every tokenizer; says once what does not fit."""
        key = (text, max_windows)
        if key not in self._tokens:
            tokens = tuple(weighted_tokens(tokenizer, text, max_windows) for tokenizer in self.bundle.tokenizers)
            num_cut = max(item.num_cut for item in tokens)
            if num_cut:
                logger.warning(
                    "%d tokens beyond the limit of %d are cut off%s: %s",
                    num_cut, max_windows * WINDOW, self._way_out, text,
                )  # fmt: skip
            self._tokens[key] = tokens
        return self._tokens[key]

    def _encoded(self, text: str, num_windows: int, request: GenerationRequest, part: int | None = None) -> TextStates:
        """`part` is the text's place among the parts of the prompt, in regional use."""
        networks = (request.multipliers, request.is_regional, part)
        key = (text, num_windows, request.max_windows, request.clip_skip, request.weighting, networks)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tokens = self._tokenize(text, request.max_windows)
        of_part = self.networks.for_text_of(part) if request.is_regional and self.networks else nullcontext()
        with of_part:
            self._kept[key] = states = self._encode(tokens, num_windows, request)
        if len(self._kept) > (KEPT if self.layered_words is None else KEPT // NUM_LAYERS):
            self._kept.popitem(last=False)
        return states

    def _encode(self, tokens: tuple[WeightedTokens, ...], num_windows: int, request: GenerationRequest) -> TextStates:
        """One prompt, at the U-Net's place: its windows are encoded each for itself and joined with their begin and
        end states; the pooled text is that of the first one. Words that mean something else to each cross-attention
        layer make as many sets of features, side by side."""
        ids = tuple(
            token_ids(tokenizer, [item], num_windows).transpose(0, 1).to(_device(encoder))  # (N, 1, 77)
            for tokenizer, item, encoder in zip(self.bundle.tokenizers, tokens, self.bundle.text_encoders, strict=True)
        )
        weights_1T = token_weights([tokens[0]], num_windows).flatten(1) if tokens[0].is_weighted else None
        if self.layered_words is None:
            return self._states(ids, weights_1T, request)
        states = [self._states((variant,), weights_1T, request) for variant in self.layered_words.variants(ids[0])]
        of_layers = states * NUM_LAYERS if len(states) == 1 else states
        return TextStates((torch.cat([each.context_BTD for each in of_layers], dim=-1),))

    def _states(
        self, ids: tuple[torch.Tensor, ...], weights_1T: torch.Tensor | None, request: GenerationRequest
    ) -> TextStates:
        """What the encoders say of the ids (N, 1, 77) of one prompt."""
        text = TextOptions(clip_skip=request.clip_skip)
        encoded = self.family.encode_text(self.bundle.text_encoders, ids, text)
        device = _device(self.bundle.unet)
        by_encoder = tuple(states_NTD.to(device).flatten(0, 1).unsqueeze(0) for states_NTD in encoded.by_encoder)
        if weights_1T is not None:
            by_encoder = tuple(apply_weights(states, weights_1T, request.weighting) for states in by_encoder)
        return TextStates(by_encoder, None if encoded.pooled_BP is None else encoded.pooled_BP[:1].to(device))


def _joined(rows: Sequence[TextStates]) -> TextStates:
    by_encoder = tuple(map(torch.cat, zip(*(row.by_encoder for row in rows), strict=True)))
    pooled = [row.pooled_BP for row in rows if row.pooled_BP is not None]
    return TextStates(by_encoder, torch.cat(pooled) if pooled else None)


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
