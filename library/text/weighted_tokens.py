"""Prompts with emphasis as windows of tokens with weights, and the weighting of their text states.

Shape letters: B prompts, N windows, 77 = begin + 75 content tokens + end, T = 77 N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from library.text.prompt_weights import BREAK, LARGEST_EMPHASIS, parse_prompt_weights
from library.text.tokens import WINDOW, ClipTokenizer, Tokens


@dataclass(frozen=True)
class WeightedTokens:
    """A prompt as windows of content tokens, each token with its weight."""

    windows: tuple[tuple[tuple[int, float], ...], ...]  # (token id, weight); at least one window, each up to 75 long
    num_cut: int = 0  # tokens that did not fit

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1.0 for window in self.windows for _, weight in window)


def weighted_tokens(tokenizer: ClipTokenizer, prompt: str, max_windows: int) -> WeightedTokens:
    """Tokenize the segments of a prompt one by one and lay them into at most `max_windows` windows of 75.

    BREAK ends the window: what follows it starts a new one, unless the window at hand is still empty.
    """
    windows: list[list[tuple[int, float]]] = [[]]
    for segment, weight in parse_prompt_weights(prompt):
        if (segment, weight) == BREAK:
            if windows[-1]:
                windows.append([])
            continue
        for group in tokenizer.groups(segment):
            if len(windows[-1]) + len(group) > WINDOW:
                windows.append([])
            windows[-1].extend((token, weight) for token in group)
    if len(windows) > 1 and not windows[-1]:
        windows.pop()
    num_cut = sum(map(len, windows[max_windows:]))
    return WeightedTokens(tuple(map(tuple, windows[:max_windows])), num_cut)


def caption_tokens(
    tokenizers: Sequence[ClipTokenizer], captions: Sequence[str], num_windows: int, *, weighted: bool
) -> Tokens:
    """Ids (B, N, 77) of captions per tokenizer, and weights where they hold emphasis (`weighted`)."""
    if weighted:
        return weighted_windows(tokenizers, captions, num_windows)
    return Tokens(tuple(tokenizer.windows(captions, num_windows) for tokenizer in tokenizers))


def weighted_windows(tokenizers: Sequence[ClipTokenizer], captions: Sequence[str], num_windows: int) -> Tokens:
    """Captions with emphasis as ids and weights; tokens beyond `num_windows` windows are cut off.

    A caption without emphasis and BREAK gets the ids it has without weighting; no weight is beyond LARGEST_EMPHASIS.
    """
    ids, weights = [], []
    for tokenizer in tokenizers:
        prompts = [weighted_tokens(tokenizer, caption, num_windows) for caption in captions]
        ids.append(token_ids(tokenizer, prompts, num_windows))
        weights.append(token_weights(prompts, num_windows).clamp_(-LARGEST_EMPHASIS, LARGEST_EMPHASIS))
    return Tokens(tuple(ids), tuple(weights))


def token_ids(tokenizer: ClipTokenizer, prompts: Sequence[WeightedTokens], num_windows: int) -> torch.Tensor:
    """(B, N, 77) int64: each window as begin, its tokens, end, padding, as if it were a prompt of its own."""
    rows = [[_laid_out(tokenizer, window) for window in _padded(prompt, num_windows)] for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64)


def token_weights(prompts: Sequence[WeightedTokens], num_windows: int) -> torch.Tensor:
    """(B, N, 77) float32 weights of the ids of :func:`token_ids`; begin, end and padding weigh 1."""
    weights = torch.ones(len(prompts), num_windows, WINDOW + 2)
    for row, prompt in zip(weights, prompts, strict=True):
        for window_weights, window in zip(row, prompt.windows, strict=False):
            window_weights[1 : len(window) + 1] = torch.tensor([weight for _, weight in window])
    return weights


def apply_weights(context_BTD: torch.Tensor, weights_BT: torch.Tensor, keep: str = "original") -> torch.Tensor:
    """Each token's state times its weight, then each sample scaled so that its mean is what it was before.

    `keep` is "abs" where the mean of absolute values is meant, and "none" for states that are not scaled. The mean runs
    over tokens and features in float32. States of both signs can nearly cancel, and the quotient of two such means is
    noise; where it is more than twice or less than half the quotient of the mean absolute values (which cancels
    nothing), that one is taken.
    """
    before_BTD = context_BTD.float()
    weights_BT = weights_BT.to(before_BTD)
    after_BTD = before_BTD * weights_BT.unsqueeze(-1)
    if keep == "none":
        return after_BTD.to(context_BTD.dtype)
    by_absolute = before_BTD.abs().mean((1, 2)) / after_BTD.abs().mean((1, 2))
    before_B, after_B = before_BTD.mean((1, 2)), after_BTD.mean((1, 2))
    is_sound = (before_B / after_B / by_absolute - 1.25).abs() <= 0.75  # between half and twice; false for nan
    divisor_B = torch.where(is_sound, after_B, 1.0)  # gradients of a quotient near 0 would not be finite
    scale_B = by_absolute if keep == "abs" else torch.where(is_sound, before_B / divisor_B, by_absolute)
    scale_B = torch.where((weights_BT != 1).any(dim=1), scale_B, 1.0)  # without emphasis gradients stay as they are
    return (after_BTD * scale_B.view(-1, 1, 1)).to(context_BTD.dtype)


def _padded(prompt: WeightedTokens, num_windows: int) -> Sequence[tuple[tuple[int, float], ...]]:
    assert len(prompt.windows) <= num_windows
    return prompt.windows + ((),) * (num_windows - len(prompt.windows))


def _laid_out(tokenizer: ClipTokenizer, window: Sequence[tuple[int, float]]) -> list[int]:
    (ids,) = tokenizer.layout([token for token, _ in window], 1)
    return ids
