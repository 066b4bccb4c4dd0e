"""Encoded captions: encode every caption once, keep the results in memory or in files next to the images.

Captions are encoded in batches of one shape, so that what comes out for one does not depend on its neighbours.

Shape letters: B captions, T = 75 N + 2 states of N windows of text, D features, P pooled features.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from library.data import text_cache_files
from library.data.cache_report import report_counts
from library.data.progress import progress
from library.data.text_cache_files import OF_ANOTHER_PROGRAM, TextItem, TextMaking
from library.data.text_cache_options import FLAG
from library.options import OptionError
from library.text.states import TextStates

logger = logging.getLogger(__name__)

UNTRUSTED = "of another program, which does not say what made them"
BATCH = 32  # captions encoded together
SPOT_CHECKS = 2  # files of other programs that are compared with what the encoders say here
LIKENESS = 0.05  # relative difference that rounding explains: half precision, other kernels

EncodeText = Callable[[Sequence[str]], TextStates]  # captions -> CPU tensors (B, T, D) and (B, P)


# ---------------------------------------------------------------------------------------------- stores


class MemoryTexts:
    """Encoded captions in one tensor per encoder."""

    in_memory = True

    def __init__(self, items: Sequence[TextItem], encode: EncodeText) -> None:
        self.items = items
        unique = dict.fromkeys(caption for item in items for caption in item.captions)
        captions = list(dict.fromkeys(["", *unique]))
        self.rows = {caption: row for row, caption in enumerate(captions)}
        tensors: list[torch.Tensor] = []
        for first, states in encoded(captions, encode):
            if not tensors:
                tensors = [part.new_empty(len(captions), *part.shape[1:]) for part in states.tensors]
                size = sum(part.numel() * part.element_size() for part in tensors)
                logger.info("text: %d captions, %.1f GB in memory", len(captions), size / 2**30)
            for kept, part in zip(tensors, states.tensors, strict=True):
                kept[first : first + len(part)] = part
        self.states = _of_tensors(tensors, states)

    def num_versions(self, index: int) -> int:
        return len(self.items[index].captions)

    def caption(self, index: int, version: int | None) -> str:
        return "" if version is None else self.items[index].captions[version]

    def load(self, index: int, version: int | None) -> TextStates:
        """What the encoders say of one caption of an item, (T, D) and (P); of the empty caption for None."""
        row = self.rows[self.caption(index, version)]
        return _of_tensors([part[row] for part in self.states.tensors], self.states)


class DiskTexts:
    """Encoded captions read from their files when they are drawn; the empty caption is in memory."""

    in_memory = False

    def __init__(self, items: Sequence[TextItem], making: TextMaking, empty: TextStates) -> None:
        self.items = items
        self.making = making
        self.empty = empty

    def num_versions(self, index: int) -> int:
        return len(self.items[index].captions)

    def caption(self, index: int, version: int | None) -> str:
        return "" if version is None else self.items[index].captions[version]

    def load(self, index: int, version: int | None) -> TextStates:
        """As :class:`MemoryTexts`; raises OptionError for a file that is no longer the one of the start."""
        if version is None:
            return self.empty
        return text_cache_files.read_version(self.items[index], version, self.making)


TextStore = MemoryTexts | DiskTexts


def _of_tensors(tensors: Sequence[torch.Tensor], like: TextStates) -> TextStates:
    """The inverse of TextStates.tensors."""
    if like.pooled_BP is None:
        return TextStates(tuple(tensors))
    return TextStates(tuple(tensors[:-1]), tensors[-1])


def stacked(texts: Sequence[TextStates]) -> TextStates:
    """Single captions as a batch."""
    tensors = [torch.stack(parts) for parts in zip(*(text.tensors for text in texts), strict=True)]
    return _of_tensors(tensors, texts[0])


# ---------------------------------------------------------------------------------------------- encoding


def encoded(captions: Sequence[str], encode: EncodeText) -> Iterator[tuple[int, TextStates]]:
    """(index of the first, what the encoders say) of the captions in batches; the last one is filled up and cut."""
    with progress("encoding captions", len(captions), stays=True, unit="caption") as bar:
        for first in range(0, len(captions), BATCH):
            batch = list(captions[first : first + BATCH])
            states = encode([*batch, *[""] * (BATCH - len(batch))])
            _check_finite(states, batch)
            yield first, _of_tensors([part[: len(batch)] for part in states.tensors], states)
            bar.update(len(batch))


def _alone(caption: str, encode: EncodeText) -> TextStates:
    """What the encoders say of one caption, in a batch of the usual shape."""
    return encode([caption, *[""] * (BATCH - 1)])


def _check_finite(states: TextStates, captions: Sequence[str]) -> None:
    finite_B = torch.stack([part.isfinite().flatten(1).all(dim=1) for part in states.tensors]).all(dim=0)
    for caption, is_finite in zip(captions, finite_B.tolist(), strict=False):
        if not is_finite:
            problem = f"the text encoders give no finite numbers for {caption[:80]!r}"
            raise OptionError(FLAG, problem, "use --mixed_precision bf16 or no")


def _one(states: TextStates, row: int) -> TextStates:
    return _of_tensors([part[row] for part in states.tensors], states)


# ---------------------------------------------------------------------------------------------- files


def making_of(encode: EncodeText, encoders: str) -> TextMaking:
    """What makes encoded captions; `encoders` identifies what encodes."""
    return TextMaking.of(encoders, _alone("", encode))


def fill_disk(
    items: Sequence[TextItem],
    encode: EncodeText,
    encoders: str,
    *,
    is_checked: bool = True,
    trusts_others: bool = True,
    process_index: int = 0,
    num_processes: int = 1,
) -> DiskTexts:
    """Encode what has no valid cache file, every process its own share of the items; `encoders` identifies them.

    Without `is_checked`, every file that is there counts as valid; without `trusts_others`, none that another program
    wrote. The caller lets the processes wait for each other
    afterwards.
    """
    first = _alone("", encode)
    making = TextMaking.of(encoders, first)
    share = {item.npz: index for index, item in enumerate(items)}  # one item per file
    own = sorted(share.values())[process_index::num_processes]
    states = _states_of(items, own, making, is_checked=is_checked)
    others = [index for index in own if states[index] == OF_ANOTHER_PROGRAM]
    if others and not trusts_others:
        states |= dict.fromkeys(others, UNTRUSTED)
    elif others and not _agree(items, others[:SPOT_CHECKS], making, encode):
        states |= dict.fromkeys(others, "made with other text encoders")
    _refuse_foreign_files([items[index].npz for index in own if states[index] == text_cache_files.NOT_OURS])
    _report(Counter(states.values()))
    _write([items[index] for index in own if states[index] not in text_cache_files.VALID], making, encode)
    return DiskTexts(items, making, _one(first, 0))


def _states_of(
    items: Sequence[TextItem], own: Collection[int], making: TextMaking, *, is_checked: bool
) -> dict[int, str]:
    if not is_checked:
        there = {index: os.path.isfile(items[index].npz) for index in own}
        return {index: text_cache_files.UNCHECKED if is_there else "missing" for index, is_there in there.items()}
    states = {}
    with progress("checking cached text", len(own)) as bar:
        for index in own:
            states[index] = text_cache_files.state_of(items[index], making)
            bar.update()
    return states


def _agree(items: Sequence[TextItem], indices: Sequence[int], making: TextMaking, encode: EncodeText) -> bool:
    """Whether files of another program hold what the encoders say here, to rounding."""
    for index in indices:
        ours = _one(_alone(items[index].captions[0], encode), 0)
        theirs = text_cache_files.read_version(items[index], 0, making)
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            if float((a.float() - b.float()).norm() / a.float().norm()) > LIKENESS:
                return False
    return True


def _write(items: Sequence[TextItem], making: TextMaking, encode: EncodeText) -> None:
    """Encode each caption of the items once, and write a file as soon as all of its captions are there."""
    if not items:
        return
    last_use = {caption: number for number, item in enumerate(items) for caption in item.captions}
    kept: dict[str, TextStates] = {}
    pending = deque(enumerate(items))
    captions = list(dict.fromkeys(caption for item in items for caption in item.captions))
    with ThreadPoolExecutor(4) as pool:
        writing: deque[Future] = deque()
        for first, states in encoded(captions, encode):
            rows = len(states.by_encoder[0])
            kept |= {captions[first + row]: _one(states, row) for row in range(rows)}
            while pending and all(caption in kept for caption in pending[0][1].captions):
                number, item = pending.popleft()
                versions = [kept[caption] for caption in item.captions]
                writing.append(pool.submit(text_cache_files.write, item, versions, making))
                for caption in {caption for caption in item.captions if last_use[caption] == number}:
                    del kept[caption]
            while len(writing) > 2 * BATCH:
                writing.popleft().result()
        for job in writing:
            job.result()


def _refuse_foreign_files(paths: Sequence[str]) -> None:
    if paths:
        problem = f"{paths[0]} would be overwritten, but is no cache of text"
        raise OptionError(text_cache_files.DISK_FLAG, problem, "move it to another folder")


def _report(states: Mapping[str, int]) -> None:
    total, new = sum(states.values()), states.get("missing", 0)
    stale = {reason: count for reason, count in states.items() if reason not in text_cache_files.VALID | {"missing"}}
    if unchecked := states.get(text_cache_files.UNCHECKED):
        logger.info("text: %d cache files taken unchecked, as --skip_cache_check asks", unchecked)
    if foreign := states.get(OF_ANOTHER_PROGRAM):
        logger.info("text: %d cache files of another program used; what they hold agrees with the encoders", foreign)
    report_counts("text", total, new, stale)
