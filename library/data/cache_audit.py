"""What state every cache file of a data set is in, without changing any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from library.data import cache_files, text_cache_files
from library.data.cache_files import CacheItem
from library.data.newer_names import under_found_names
from library.data.packed_files import pack_name
from library.data.packed_latents import packed_states
from library.data.progress import progress
from library.data.text_cache import EncodeText, making_of
from library.data.text_cache_files import TextItem

DAMAGED = ("unreadable", "not finite")
VERDICTS = ("valid", "of another program", "missing", "stale", "damaged", "another file")


class FileState(NamedTuple):
    """A cache file, and what was found."""

    file: str
    verdict: str  # one of VERDICTS
    reason: str  # in words

    @property
    def is_valid(self) -> bool:
        """Whether a training run would use it."""
        return self.verdict in ("valid", "of another program")


def latent_states(items: Sequence[CacheItem], vae_fingerprint: str, *, packed: bool = False) -> list[FileState]:
    """The state of every file of cached latents, or of each item's record in a pack, read to its end."""
    states = []
    if packed:
        records = packed_states(items, vae_fingerprint)
        return [
            _state(pack_name(item) if state.reason == cache_files.NOT_OURS else item.path, state.reason)
            for item, state in zip(items, records, strict=True)
        ]
    with progress("checking cached latents", len(items), stays=True) as bar:
        for item in under_found_names(items, vae_fingerprint):
            states.append(_state(item.npz, cache_files.state_of(item, vae_fingerprint).reason))
            bar.update()
    return states


def text_states(items: Sequence[TextItem], encode: EncodeText, encoders: str) -> list[FileState]:
    """The state of every file of cached text, read to its end; `encoders` identifies what `encode` encodes with."""
    making, states = making_of(encode, encoders), []
    unique = {item.npz: item for item in items}
    with progress("checking cached text", len(unique), stays=True) as bar:
        for item in unique.values():
            states.append(_state(item.npz, text_cache_files.state_of(item, making)))
            bar.update()
    return states


def verdicts(states: Sequence[FileState]) -> dict[str, int]:
    """How many files there are of each verdict, none left out."""
    counts = Counter(state.verdict for state in states)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def _state(file: str, reason: str) -> FileState:
    if reason in (cache_files.NOT_OURS, text_cache_files.NOT_OURS):
        return FileState(file, "another file", f"{reason}, but stands where one belongs: move it away")
    if reason in VERDICTS:
        return FileState(file, reason, reason)
    verdict = "damaged" if reason in DAMAGED else "stale"
    return FileState(file, verdict, f"{verdict} ({reason})")
