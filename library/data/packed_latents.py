"""Cached latents in pack files (packed_files.py): filled, and read when they are drawn."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from library.data import cache_files
from library.data.cache import Encode, encoded_images, grouped, report_states
from library.data.cache_files import KEYS, NOT_OURS, UNCHECKED, VALID, CacheItem, State
from library.data.packed_files import (
    Packs,
    PackWriter,
    Record,
    is_foreign,
    is_intact,
    pack_name,
    pages_of,
    read_record,
)
from library.data.progress import progress
from library.options import OptionError
from library.wording import counted

logger = logging.getLogger(__name__)

FLAG = "--cache_format"


class PackedLatents:
    """Latents read from memory-mapped packs, of all items but those `left_out`.

    `places` has (file, offset, whether there are mirrored ones) by index, as far as this process checked or wrote them;
    what other processes wrote is looked up when it is drawn.
    """

    in_memory = False

    def __init__(
        self, items: Sequence[CacheItem], vae_fingerprint: str, places: dict[int, Record], left_out: Collection[int]
    ) -> None:
        self.items = items
        self.vae_fingerprint = vae_fingerprint
        self.places = places
        self.left_out = frozenset(left_out)
        self._pages: dict[str, np.ndarray] = {}
        self._packs = Packs()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pages": {}}  # a worker process maps files by itself

    def holds(self, index: int) -> bool:
        return index not in self.left_out

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        """(C, H, W) float32; raises OptionError for latents that are gone or no longer fit."""
        if index not in self.places:
            self.places[index] = self._written_by_others(index)
        record = self.places[index]
        if record.file not in self._pages:
            self._pages[record.file] = _mapped(record.file)
        return torch.from_numpy(read_record(record, self._pages[record.file], flipped=flipped).copy())

    def load_alpha(self, index: int) -> np.ndarray:
        raise AssertionError("packs hold no alpha masks")

    def _written_by_others(self, index: int) -> Record:
        item = self.items[index]
        record = self._packs.find(item)
        if record is None or _state(item, record, _mapped(record.file), self.vae_fingerprint).reason not in VALID:
            raise OptionError(FLAG, f"the latents of {item.path} are gone from their pack", "start again")
        return record


def _mapped(file: str) -> np.ndarray:
    try:
        return pages_of(file)
    except (OSError, ValueError) as error:
        raise OptionError(FLAG, f"{file} can't be read any more ({error})", "start again") from None


def fill_packs(
    items: Sequence[CacheItem],
    encode: Encode,
    batch_size: int,
    *,
    vae_fingerprint: str,
    left_out: Collection[int] = (),
    is_checked: bool = True,
    share: tuple[int, int] = (0, 1),
) -> PackedLatents:
    """Encode what has no valid record, every process its own `share` (its number, how many there are) of the groups.

    Valid .npz files of this program become records without being encoded again. Without `is_checked` checksums and
    images are not looked at. The caller lets the processes wait for each other afterwards.
    """
    _refuse_alpha(items)
    process_index, num_processes = share
    groups = grouped(items, batch_size, left_out)[process_index::num_processes]
    own = sorted(index for group in groups for index in group)
    states, places = _states(items, own, vae_fingerprint, is_checked=is_checked)
    needed = {index for index in own if states[index].reason not in VALID}
    _refuse_foreign_files({pack_name(items[index], *share) for index in needed})
    report_states(Counter(state.reason for state in states.values()))
    with PackWriter(process_index, num_processes) as writer:
        for index in sorted(needed):
            if (found := _from_npz(items[index], vae_fingerprint)) is not None:
                writer.append(items[index], *found)
                needed.discard(index)
        for index, latents, loaded in encoded_images(items, [each for each in groups if needed & set(each)], encode):
            if index in needed:
                arrays = {flipped: latents_CHW.numpy() for flipped, latents_CHW in latents.items()}
                fingerprint = cache_files.fingerprint_of(items[index], loaded.source, vae_fingerprint)
                writer.append(items[index], arrays, fingerprint)
    packs = Packs()
    written = {index: packs.find(items[index]) for index in own if index not in places}
    places |= {index: record for index, record in written.items() if record is not None}
    files = {record.file for record in places.values()}
    logger.info("latents: those of %s are in %s", counted(len(places), "image"), counted(len(files), "pack"))
    return PackedLatents(items, vae_fingerprint, places, left_out)


def packed_states(items: Sequence[CacheItem], vae_fingerprint: str) -> list[State]:
    """The state of each item's record; NOT_OURS where a file that is no pack has the name of the item's."""
    foreign = {file for file in {pack_name(item) for item in items} if is_foreign(file)}
    states = _states(items, range(len(items)), vae_fingerprint, is_checked=True)[0]
    return [
        State(NOT_OURS) if state.reason == "missing" and pack_name(item) in foreign else state
        for item, state in zip(items, states.values(), strict=True)
    ]


def _states(
    items: Sequence[CacheItem], own: Sequence[int], vae_fingerprint: str, *, is_checked: bool
) -> tuple[dict[int, State], dict[int, Record]]:
    """The states of these items' records, and where the valid ones are."""
    packs, pages = Packs(), dict[str, np.ndarray]()
    states: dict[int, State] = {}
    places: dict[int, Record] = {}
    with progress("checking cached latents", len(own)) as bar:
        for index in own:
            item, record = items[index], packs.find(items[index])
            if record is None:
                states[index] = State("unreadable" if packs.may_have_lost(item) else "missing")
            else:
                if record.file not in pages:
                    pages[record.file] = _mapped(record.file)
                check = partial(_state, item, record, pages[record.file], vae_fingerprint)
                states[index] = check() if is_checked else _unchecked(item, record, vae_fingerprint)
                if states[index].reason in VALID:
                    places[index] = record
            bar.update()
    return states, places


def _unchecked(item: CacheItem, record: Record, vae_fingerprint: str) -> State:
    """By what its header says alone."""
    if item.flipped_too and not record.has_mirrored:
        return State("without mirrored latents")
    return State(cache_files.difference(record.facts["fingerprint"], item, vae_fingerprint) or UNCHECKED)


def _state(item: CacheItem, record: Record, pages: np.ndarray, vae_fingerprint: str) -> State:
    if not is_intact(record, pages):
        return State("unreadable")
    arrays = {
        KEYS[flipped]: read_record(record, pages, flipped=flipped)
        for flipped in (False, True)[: 1 + record.has_mirrored]
    }
    return cache_files.fitting_state(item, arrays, dict(record.facts["fingerprint"]), vae_fingerprint)


def _from_npz(item: CacheItem, vae_fingerprint: str) -> tuple[dict[bool, np.ndarray], Mapping[str, str | int]] | None:
    """(latents, fingerprint) of an item's valid .npz file of this program; None where there is none."""
    if cache_files.state_of(item, vae_fingerprint).reason != "valid":
        return None
    arrays = cache_files.read_arrays(item.npz, KEYS)
    found = {flipped: arrays[KEYS[flipped]] for flipped in (False, True)[: 1 + item.flipped_too]}
    return found, json.loads(str(arrays["fingerprint"]))


def _refuse_foreign_files(files: Collection[str]) -> None:
    if foreign := sorted(file for file in files if is_foreign(file)):
        problem = f"packed: {foreign[0]} would be overwritten, but is no pack of latents"
        raise OptionError(FLAG, problem, "move it to another folder")


def _refuse_alpha(items: Sequence[CacheItem]) -> None:
    if any(item.alpha_too for item in items):
        raise OptionError(FLAG, "packed: packs hold no alpha masks", "use npz, or leave out alpha_mask")
