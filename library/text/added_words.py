"""Words beyond CLIP's vocabulary, as textual inversion adds them (Gal et al. 2022, arXiv:2208.01618).

A word stands for one or more vectors, each with an id of its own behind those of the vocabulary.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import torch

from library.text.tokens import WINDOW, ClipTokenizer

# the cross-attention layers of a U-Net of SD 1.x or 2.x, from its input to its output, as files of extended textual
# inversion call them (Voynov et al. 2023, arXiv:2303.09522)
LAYERS = ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{number:02d}" for number in range(3, 12)))
NUM_LAYERS = len(LAYERS)


class WordTokenizer(ClipTokenizer):
    """CLIP's tokenizer with words of its own; the vocabulary, which all tokenizers share, stays as it is.

    A word is found in any case, and inside of no other word. What is longer is looked for first.
    """

    def __init__(self, pad_token: str, words: Mapping[str, tuple[int, ...]]) -> None:
        """`words`: the ids of each word; at most 75, so that they fit into a window."""
        super().__init__(pad_token)
        assert all(0 < len(ids) <= WINDOW for ids in words.values())
        self.words = {_normalized(word): ids for word, ids in words.items()}
        longest_first = sorted(self.words, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(_as_pattern, longest_first)) + ")", re.IGNORECASE)

    def __reduce__(self) -> tuple[type, tuple]:
        return WordTokenizer, (self.pad_token, self.words)

    def encode(self, text: str) -> list[int]:
        return [token for group in self.groups(text) for token in group]

    def groups(self, text: str) -> Sequence[Sequence[int]]:
        groups: list[tuple[int, ...]] = []
        for index, piece in enumerate(self._pattern.split(unicodedata.normalize("NFC", text))):
            if index % 2:
                groups.append(self.words[_normalized(piece)])
            else:
                groups += [(token,) for token in super().encode(piece)]
        return groups

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(self.encode(caption)) for caption in captions]

    def windows(self, captions: Sequence[str], num_windows: int) -> torch.Tensor:
        """(B, N, 77) int64 ids of captions; a word that is not whole within 75 N tokens is cut off as a whole."""
        rows = []
        for caption in captions:
            content: list[int] = []
            for group in self.groups(caption):
                if len(content) + len(group) > WINDOW * num_windows:
                    break
                content.extend(group)
            rows.append(self.layout(content, num_windows))
        return torch.tensor(rows, dtype=torch.int64)


def _normalized(word: str) -> str:
    return " ".join(unicodedata.normalize("NFC", word).split()).lower()


def _as_pattern(word: str) -> str:
    """Letters of ASCII beside a word make another word of it; scripts that write no blanks have none of them."""
    pattern = r"\s+".join(map(re.escape, word.split()))
    before = r"(?<![A-Za-z0-9_])" if re.match(r"[A-Za-z0-9_]", word) else ""
    after = r"(?![A-Za-z0-9_])" if re.search(r"[A-Za-z0-9_]$", word) else ""
    return before + pattern + after
