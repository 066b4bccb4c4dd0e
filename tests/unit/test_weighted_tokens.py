"""Windows of weighted tokens, and the weighting of text states."""

from __future__ import annotations

import pytest
import torch

from library.text.tokens import BEGIN_ID, END_ID, ClipTokenizer
from library.text.weighted_tokens import apply_weights, token_ids, token_weights, weighted_tokens

PAD = 0


class NumberTokenizer(ClipTokenizer):
    """Reads "11 12" as the tokens 11 and 12: the vocabulary plays no part here."""

    def __init__(self) -> None:
        super().__init__("zero")

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def numbers(count: int, first: int = 10) -> str:
    return " ".join(str(first + index) for index in range(count))


def windows(prompt: str, max_windows: int = 9) -> list[list[int]]:
    tokens = weighted_tokens(NumberTokenizer(), prompt, max_windows)
    return [[token for token, _ in window] for window in tokens.windows]


def test_weights_follow_their_tokens() -> None:
    tokens = weighted_tokens(NumberTokenizer(), "11 (12 13:1.5) [14]", 1)
    assert tokens.windows == (((11, 1.0), (12, 1.5), (13, 1.5), (14, pytest.approx(1 / 1.1))),)
    assert tokens.is_weighted
    assert not weighted_tokens(NumberTokenizer(), "11 12", 1).is_weighted


def test_long_prompts_fill_windows_of_75() -> None:
    assert list(map(len, windows(numbers(75)))) == [75]
    assert list(map(len, windows(numbers(76)))) == [75, 1]
    assert windows("") == [[]]


def test_break_starts_a_window_of_75() -> None:
    assert windows("11 BREAK 12") == [[11], [12]]
    assert list(map(len, windows(f"11 BREAK {numbers(80)}"))) == [1, 75, 5]
    assert list(map(len, windows(f"{numbers(75)} BREAK 12"))) == [75, 1]  # no empty window between


def test_break_opens_no_empty_window() -> None:
    assert windows("BREAK 11 BREAK BREAK 12 BREAK") == [[11], [12]]
    assert windows("BREAK") == [[]]


def test_what_does_not_fit_is_counted() -> None:
    tokens = weighted_tokens(NumberTokenizer(), numbers(160), 2)
    assert list(map(len, tokens.windows)) == [75, 75]
    assert tokens.num_cut == 10
    assert weighted_tokens(NumberTokenizer(), "11 BREAK 12 13", 1).num_cut == 2


def test_each_window_is_a_prompt_of_its_own() -> None:
    tokens = weighted_tokens(NumberTokenizer(), "11 BREAK 12 13", 2)
    ids = token_ids(NumberTokenizer(), [tokens], 3)
    assert ids.shape == (1, 3, 77)
    assert ids.dtype == torch.int64
    for window, content in zip(ids[0].tolist(), ([11], [12, 13], []), strict=True):
        assert window == [BEGIN_ID, *content, END_ID] + [PAD] * (75 - len(content))


def test_a_full_window_ends_with_the_end_token() -> None:
    ids = token_ids(NumberTokenizer(), [weighted_tokens(NumberTokenizer(), numbers(75), 1)], 1)
    assert ids[0, 0, -1] == END_ID
    assert ids[0, 0, -2] == 84


def test_weights_lie_beside_the_ids() -> None:
    tokenizer = NumberTokenizer()
    prompts = [weighted_tokens(tokenizer, "(11:2) 12 BREAK (13:3)", 2), weighted_tokens(tokenizer, "", 2)]
    weights = token_weights(prompts, 2)
    assert weights.shape == (2, 154)
    assert weights[0, [0, 1, 2, 3, 77, 78, 79]].tolist() == [1, 2, 1, 1, 1, 3, 1]
    assert weights[0].sum() == 154 + 1 + 2
    assert weights[1].eq(1).all()


def test_the_mean_stays() -> None:
    context = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.ones(2, 77)
    weights[0, 1:4] = 1.4
    weighted = apply_weights(context, weights)
    assert torch.allclose(weighted.mean((1, 2)), context.mean((1, 2)), atol=1e-6)
    ratio = weighted[0] / context[0]
    assert torch.allclose(ratio[1:4] / ratio[0], torch.full((3, 16), 1.4), atol=1e-4)
    assert torch.equal(weighted[1], context[1])


@pytest.mark.parametrize("weight", [0.0, 1.3, 5.0, -1.0])
def test_a_mean_near_zero_does_not_explode(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        context = torch.randn(1, 77, 16, generator=generator)
        weights = torch.ones(1, 77)
        weights[0, 1:6] = weight
        weighted = apply_weights(context - (context * weights.unsqueeze(-1)).mean(), weights)
        assert weighted.isfinite().all()
        assert 0.3 < weighted.abs().mean() / context.abs().mean() < 3


def test_half_precision_stays_half() -> None:
    context = torch.ones(1, 77, 4, dtype=torch.float16)
    assert apply_weights(context, torch.full((1, 77), 2.0)).dtype == torch.float16
