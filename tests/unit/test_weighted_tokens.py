"""Windows of weighted tokens, and the weighting of text states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.families.options import TextOptions
from library.families.sd import StableDiffusion
from library.models.build import build_text_encoder
from library.text.tokens import BEGIN_ID, END_ID, ClipTokenizer
from library.text.weighted_tokens import apply_weights, token_ids, token_weights, weighted_tokens, weighted_windows
from tests.tiny_models import TEXT_ENCODERS

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
    assert weights.shape == (2, 2, 77)
    assert weights[0, 0, :4].tolist() == [1, 2, 1, 1] and weights[0, 1, :3].tolist() == [1, 3, 1]
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


# ---------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("pad_token", ["eos", "zero"])
@pytest.mark.parametrize("num_windows", [1, 2, 3])
@given(st.lists(st.sampled_from(["cat", "1girl", "!", "long hair,", "été"]), max_size=120))
@settings(max_examples=15)
def test_a_caption_without_emphasis_has_its_usual_ids(pad_token: str, num_windows: int, words: list[str]) -> None:
    tokenizer = ClipTokenizer(pad_token)
    captions = [" ".join(words), "a dog"]
    tokens = weighted_windows([tokenizer], captions, num_windows)
    assert torch.equal(tokens.ids[0], tokenizer.windows(captions, num_windows))
    assert tokens.weights is not None and tokens.weights[0].shape == tokens.ids[0].shape
    assert tokens.weights[0].eq(1).all()


def test_a_caption_with_emphasis_has_the_ids_of_its_words() -> None:
    tokenizer = ClipTokenizer()
    tokens = weighted_windows([tokenizer], ["a (red:1.3) [cat], \\(sitting\\)"], 1)
    assert torch.equal(tokens.ids[0], tokenizer.windows(["a red cat, (sitting)"], 1))
    assert tokens.weights is not None
    expected = [1, 1, 1.3, 1 / 1.1, 1, 1, 1, 1, 1]
    assert tokens.weights[0][0, 0, :9].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize(("num_windows", "clip_skip"), [(1, None), (2, None), (3, 2)])
def test_states_follow_their_weights(kind: str, num_windows: int, clip_skip: int | None) -> None:
    """Computed by hand: each state times its token's weight, then the sample's mean restored."""
    encoder = build_text_encoder(TEXT_ENCODERS[kind]).eval()
    tokenizer = ClipTokenizer("zero" if kind == "sd2" else "eos")
    family, text = StableDiffusion(), TextOptions(clip_skip=clip_skip, max_token_length=75 * num_windows)
    captions = ["tiny cat, " * 30 + "(on a mat:1.5)", "(a dog:0.5), sky", "plain"]
    tokens = family.tokenize([tokenizer], captions, text.token_windows, weighted=True)
    with torch.no_grad():
        weighted = family.encode_text([encoder], tokens.ids, text, tokens.weights).context_BTD
        plain = family.encode_text([encoder], tokens.ids, text).context_BTD
    assert weighted.shape == plain.shape == (3, 75 * num_windows + 2, 64)
    assert tokens.weights is not None
    joined = torch.cat([torch.ones(3, 1), tokens.weights[0][:, :, 1:-1].flatten(1), torch.ones(3, 1)], 1)
    product = plain * joined.unsqueeze(-1)
    expected = product * (plain.mean((1, 2)) / product.mean((1, 2))).view(-1, 1, 1)
    absolute = product * (plain.abs().mean((1, 2)) / product.abs().mean((1, 2))).view(-1, 1, 1)
    for found, by_mean, by_absolute in zip(weighted, expected, absolute, strict=True):
        assert torch.allclose(found, by_mean, atol=1e-5) or torch.allclose(found, by_absolute, atol=1e-5)
    assert torch.equal(weighted[2], plain[2]) and not torch.equal(weighted[1], plain[1])
    assert torch.equal(weighted[0], plain[0]) == (num_windows == 1), "its emphasis lies beyond the first window"


@pytest.mark.parametrize("weight", [0.0, 1.5, -2.0])
def test_gradients_stay_finite_where_means_cancel(weight: float) -> None:
    context = torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1, 77)
    weights[0, 1:6] = weight
    context -= (context * weights.unsqueeze(-1)).mean() / weights.mean()
    context.requires_grad_()
    apply_weights(context, weights).square().sum().backward()
    assert context.grad is not None and context.grad.isfinite().all() and context.grad.abs().max() < 1e4


def test_an_emphasis_beyond_arithmetic_is_bounded_in_captions() -> None:
    weights = weighted_windows(
        [NumberTokenizer()], ["1 " + "(" * 200 + "2", "(1:-9999999999) 2", "(1:99999999999) 2"], 1
    ).weights
    assert weights is not None and weights[0].isfinite().all() and weights[0].abs().max() == 1e6
