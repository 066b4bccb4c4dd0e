"""How many tokens captions have."""

from __future__ import annotations

from collections.abc import Sequence

from library.text.tokens import ClipTokenizer
from library.text.weighted_tokens import weighted_tokens

UNLIMITED = 1 << 20  # windows


def count_tokens(tokenizer: ClipTokenizer, captions: Sequence[str], *, weighted: bool = False) -> list[int]:
    """Content tokens of each caption, without begin and end; of `weighted` ones without the marks of emphasis."""
    if not weighted:
        return tokenizer.lengths(captions)
    return [sum(map(len, weighted_tokens(tokenizer, caption, UNLIMITED).windows)) for caption in captions]
