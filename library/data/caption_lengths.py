"""How long captions are in tokens: counted once for each text, and kept in the index of its folder.

Shape letters: M images of a subset, T texts that are read of their captions, U different ones.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from library.data.captions import process_caption
from library.data.config import SubsetConfig
from library.data.index import DataIndex
from library.data.options import CaptionOptions
from library.data.progress import progress
from library.data.record_table import RecordTable
from library.data.records import ImageRecord
from library.data.summary import LoadedDataset
from library.data.train_images import TrainImages

COUNTED_TOGETHER = 1 << 13
KEPT = 200  # of the longest captions
EXAMPLES = 3

CountTokens = Callable[[Sequence[str]], list[int]]


class LongCaption(NamedTuple):
    """A caption and its tokens."""

    record: ImageRecord
    caption: str
    tokens: int


@dataclass(frozen=True)
class CaptionLengths:
    """Tokens of the captions of a run, with prefix and suffix."""

    num_different: int = 0
    median: int = 0
    longest: int = 0
    examples: tuple[tuple[str, int], ...] = ()  # some captions with their tokens
    longest_captions: tuple[LongCaption, ...] = ()  # by image, the longest first, whether cut off or not
    num_cut_off: int = 0  # images whose caption has more tokens than are read


class _Counted(NamedTuple):
    """The texts of one subset."""

    images: TrainImages
    subset: SubsetConfig
    hashes_T: np.ndarray  # uint64
    places_T: np.ndarray  # of their image, ascending
    tokens_T: np.ndarray

    def text(self, index: int) -> str:
        place = int(self.places_T[index])
        line = index - int(np.searchsorted(self.places_T, place))
        caption = _caption(self.images, place)
        if _changes_nothing(self.subset.caption):
            return caption.split("\n")[line]
        return written_captions(caption, self.subset)[line]


def caption_lengths(
    datasets: Sequence[LoadedDataset],
    count_tokens: CountTokens,
    token_limit: int,
    index: DataIndex,
    counter: str | None = None,
) -> CaptionLengths:
    """The lengths of all captions. `counter` names what `count_tokens` counts with, so that counts can be kept."""
    subsets = [
        _counted(images, subset, count_tokens, index, counter)
        for dataset in datasets
        for subset, images in dataset.subsets
        if len(images)
    ]
    if not subsets:
        return CaptionLengths()
    starts = np.cumsum([0, *(len(each.hashes_T) for each in subsets)])
    tokens = np.concatenate([each.tokens_T for each in subsets])
    _, first = np.unique(np.concatenate([each.hashes_T for each in subsets]), return_index=True)
    first.sort()
    lengths = np.sort(tokens[first])
    chosen = first[np.arange(EXAMPLES) * len(first) // EXAMPLES] if len(first) > EXAMPLES else first

    def text(index: int) -> str:
        subset = int(np.searchsorted(starts, index, side="right")) - 1
        return subsets[subset].text(index - int(starts[subset]))

    longest, num_cut_off = _longest(subsets, token_limit)
    return CaptionLengths(
        num_different=len(first),
        median=int(lengths[len(lengths) // 2]),
        longest=int(lengths[-1]),
        examples=tuple((text(index), int(tokens[index])) for index in chosen.tolist()),
        longest_captions=tuple(longest),
        num_cut_off=num_cut_off,
    )


def _longest(subsets: Sequence[_Counted], token_limit: int) -> tuple[list[LongCaption], int]:
    """(the longest caption of each image, the longest first; how many are cut off); a file counts once."""
    found: dict[str, LongCaption] = {}
    cut_off: set[str] = set()
    num_cut_off = 0
    is_simple = len(subsets) == 1 and subsets[0].images.has_each_file_once
    for each in subsets:
        starts = np.searchsorted(each.places_T, np.arange(len(each.images)))
        most_M = np.maximum.reduceat(each.tokens_T, starts)
        order = np.argsort(-most_M, kind="stable")
        num_over = int((most_M > token_limit).sum())
        if is_simple:
            num_cut_off = num_over
        else:
            cut_off.update(each.images.paths[place] for place in order[:num_over].tolist())
        for place in order[:KEPT].tolist():
            end = starts[place + 1] if place + 1 < len(starts) else len(each.tokens_T)
            index = int(starts[place] + each.tokens_T[starts[place] : end].argmax())
            long = LongCaption(each.images.at(place).record, each.text(index), int(each.tokens_T[index]))
            known = found.get(long.record.path)
            if known is None or known.tokens < long.tokens:
                found[long.record.path] = long
    return sorted(found.values(), key=lambda long: -long.tokens)[:KEPT], num_cut_off if is_simple else len(cut_off)


def _counted(
    images: TrainImages, subset: SubsetConfig, count_tokens: CountTokens, index: DataIndex, counter: str | None
) -> _Counted:
    hashes, places = [], []
    is_plain = _changes_nothing(subset.caption)
    for place, caption in enumerate(_captions(images)):
        texts = (caption,) if is_plain and b"\n" not in caption else _encoded(caption, subset)
        for text in texts:
            hashes.append(hashlib.blake2b(text, digest_size=8).digest())
            places.append(place)
    hashes_T, places_T = np.frombuffer(b"".join(hashes), np.uint64), np.array(places, np.int32)
    counted = _Counted(images, subset, hashes_T, places_T, np.zeros(len(hashes_T), np.int32))
    different_U, first_U = np.unique(hashes_T, return_index=True)
    folder = index.in_folder(subset.image_dir) if subset.image_dir else None
    tokens_U = np.full(len(different_U), -1, np.int32)
    if folder is not None and counter is not None:
        known, tokens = folder.lengths(counter)
        place = np.minimum(np.searchsorted(known, different_U), max(0, len(known) - 1))
        if len(known):
            tokens_U = np.where(known[place] == different_U, tokens[place], -1).astype(np.int32)
    unknown = np.flatnonzero(tokens_U < 0)
    with progress("counting tokens", len(unknown)) as bar:
        for start in range(0, len(unknown), COUNTED_TOGETHER):
            chunk = unknown[start : start + COUNTED_TOGETHER]
            tokens_U[chunk] = count_tokens([counted.text(first) for first in first_U[chunk].tolist()])
            bar.update(len(chunk))
    if folder is not None and counter is not None and len(unknown):
        folder.keep_lengths(counter, different_U, tokens_U)
    return counted._replace(tokens_T=tokens_U[np.searchsorted(different_U, hashes_T)])


def _captions(images: TrainImages) -> Iterator[bytes]:
    """The stored captions, as UTF-8."""
    subset = int(images.subset_M[0])
    records, rows = images.records[subset], images.rows - images.first_of(subset)
    if not isinstance(records, RecordTable):
        return (records[row].caption.encode("utf-8", "surrogateescape") for row in rows.tolist())
    return records.captions.raws() if len(rows) == len(records) else map(records.captions.raw, rows.tolist())


def _caption(images: TrainImages, place: int) -> str:
    records, row = images.place_of(place)
    return records.captions.at(row) if isinstance(records, RecordTable) else records[row].caption


def _encoded(caption: bytes, subset: SubsetConfig) -> list[bytes]:
    texts = written_captions(caption.decode("utf-8", "surrogateescape"), subset)
    return [text.encode("utf-8", "surrogateescape") for text in texts]


def _changes_nothing(options: CaptionOptions) -> bool:
    """Whether captions are read as they are stored, when nothing is dropped and nothing shuffled."""
    return not (
        options.enable_wildcard
        or options.caption_prefix
        or options.caption_suffix
        or options.keep_tokens_separator
        or options.secondary_separator
    )


def written_captions(caption: str, subset: SubsetConfig) -> tuple[str, ...]:
    """What the text encoder may be given of a stored caption when nothing of it is dropped: one text for each line.

    Of alternatives ({a|b}) one is taken.
    """
    whole = _undropped(subset.caption)
    return tuple(
        process_caption(line, whole, random.Random(0), epoch=1, step=0, max_train_steps=1)
        for line in caption.split("\n")
    )


@functools.lru_cache(maxsize=16)
def _undropped(options: CaptionOptions) -> CaptionOptions:
    return replace(
        options,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )
