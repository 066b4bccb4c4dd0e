"""Prompts as conditioning of the U-Net: emphasis, BREAK, long prompts; each text is encoded once.

Shape letters: B prompts, N windows of text, T = 77 N tokens, D features.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch

from library.families.base import Conditioning, ModelBundle, ModelFamily
from library.families.options import TextOptions
from library.generate.request import GenerationRequest
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
        self._kept: OrderedDict[tuple[str, int, int, int | None], Conditioning] = OrderedDict()

    def forget(self) -> None:
        """Encode everything anew from here on: the text encoders have learned something."""
        self._kept.clear()

    def windows(self, request: GenerationRequest) -> int:
        """Windows that a request's conditioning has: the longer one of its prompt and its negative prompt."""
        texts = (request.prompt, request.negative_prompt) if request.is_guided else (request.prompt,)
        return max(len(tokens.windows) for text in texts for tokens in self._tokenize(text, request.max_windows))

    def __call__(self, requests: Sequence[GenerationRequest]) -> Conditioning:
        """Conditioning of one batch: the negative prompts, where guidance is on, and then the prompts."""
        num_windows = max(map(self.windows, requests))
        texts = [(request.negative_prompt, request) for request in requests if request.is_guided]
        texts += [(request.prompt, request) for request in requests]
        return _joined([self._encoded(text, num_windows, request) for text, request in texts])

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

    def _encoded(self, text: str, num_windows: int, request: GenerationRequest) -> Conditioning:
        key = (text, num_windows, request.max_windows, request.clip_skip)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tokens = self._tokenize(text, request.max_windows)
        self._kept[key] = conditioning = self._encode(tokens, num_windows, TextOptions(clip_skip=request.clip_skip))
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return conditioning

    def _encode(self, tokens: tuple[WeightedTokens, ...], num_windows: int, text: TextOptions) -> Conditioning:
        """One prompt: its windows are encoded each for itself and joined with their begin and end states."""
        ids = tuple(
            token_ids(tokenizer, [item], num_windows).transpose(0, 1).to(_device(encoder))  # (N, 1, 77)
            for tokenizer, item, encoder in zip(self.bundle.tokenizers, tokens, self.bundle.text_encoders, strict=True)
        )
        encoded = self.family.encode_text(self.bundle.text_encoders, ids, text)
        context_BTD = encoded.context_BTD.flatten(0, 1).unsqueeze(0)
        if tokens[0].is_weighted:
            context_BTD = apply_weights(context_BTD, token_weights([tokens[0]], num_windows).flatten(1))
        vector_BD = None if encoded.vector_BD is None else encoded.vector_BD[:1]
        return Conditioning(context_BTD, vector_BD)


def _joined(rows: Sequence[Conditioning]) -> Conditioning:
    vectors = [row.vector_BD for row in rows if row.vector_BD is not None]
    return Conditioning(torch.cat([row.context_BTD for row in rows]), torch.cat(vectors) if vectors else None)


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
