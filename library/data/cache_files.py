"""Files of cached latents: when they are trusted, how they are read and written; how they are named: cache_names.py.

The files are those of the trade (`latents`, `original_size`, `crop_ltrb`, `latents_flipped`), readable both ways, with
one more array: `fingerprint`, a JSON text that says what made them. A file whose fingerprint does not fit, or whose
checksums don't hold, is rebuilt; one that can't have been a latent cache is never touched.

Whether the image is still the same is told by its size and its times of modification and of change, without reading
it. The latter (st_ctime_ns; on Windows, of creation) can't be set back by a program. Where one of them differs, as
after copying, the bytes decide by their hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from library.data.buckets import Placement, Size, crop_ltrb
from library.data.npz_files import DAMAGE, fingerprint_in, read_arrays, save_arrays
from library.data.options import LATENT_STRIDE
from library.options import OptionError

CODE_VERSION = 1  # of everything between the file's bytes and the VAE's input; raise it when that changes
LATENT_CHANNELS = 4
ALPHA = "alpha_mask"
KEYS = ("latents", "latents_flipped", "original_size", "crop_ltrb", ALPHA, "fingerprint")
FLAG = "--cache_latents_to_disk"

OTHER_PRECISIONS = "vae_in_other_precisions"  # a list in the fingerprint
UNCHECKED = "taken unchecked"
VALID = {"valid", "of another program", UNCHECKED}
NOT_OURS = "not a latent cache"
OF_ANOTHER_PROGRAM = ""  # in place of an image's hash


@dataclass(frozen=True, slots=True)
class CacheItem:
    """One image at one placement: what one cache file holds."""

    path: str
    size_wh: Size
    orientation: int
    placement: Placement
    flipped_too: bool
    npz: str
    flipped_npz: str | None = None  # of older tools: the mirrored latents, where `npz` lacks them
    has_image: bool = True  # False: there is only the npz, and `path` is its name
    alpha_too: bool = False  # the alpha channel is wanted as well
    given_with: int | None = None  # its dataset brings latents for all its images: used without being asked to cache
    other_precisions: tuple[str, ...] = ()  # fingerprints of the VAE in others, noted in what is written

    @property
    def keys(self) -> tuple[str, ...]:
        """The arrays of latents that its file must have."""
        return KEYS[: 1 + self.flipped_too]


def latent_shape(bucket_wh: Size) -> tuple[int, int, int]:
    """(channels, height, width) of a latent for images of this size."""
    return LATENT_CHANNELS, bucket_wh[1] // LATENT_STRIDE, bucket_wh[0] // LATENT_STRIDE


def size_text(size: Size) -> str:
    """ "512x768", width first."""
    return f"{size[0]}x{size[1]}"


# ---------------------------------------------------------------------------------------------- fingerprints


class SourceBytes(NamedTuple):
    """What identifies the bytes of an image file."""

    hash: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, content_hash: str, status: os.stat_result) -> SourceBytes:
        return cls(content_hash, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def hash_of(content: bytes) -> str:
    """Identifies the bytes of an image."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def fingerprint_of(item: CacheItem, source: SourceBytes, vae_fingerprint: str) -> dict[str, str | int]:
    """What a cache file says of its making."""
    resizing = {"interpolation": item.placement.interpolation} if item.placement.interpolation else {}
    return resizing | {
        "code": CODE_VERSION,
        "image": source.hash,
        "bytes": source.num_bytes,
        "mtime_ns": source.mtime_ns,
        "ctime_ns": source.ctime_ns,
        "vae": vae_fingerprint,
        "resized": size_text(item.placement.resized_wh),
        "bucket": size_text(item.placement.bucket_wh),
    }


def _fingerprint_for(item: CacheItem, arrays: Mapping[str, np.ndarray], vae_fingerprint: str) -> dict[str, Any] | None:
    """What a file says of its making; raises ValueError where that can't be told.

    Latents that a dataset brings along were made before its training was thought of: there it does not matter in which
    precision the VAE was, nor how small the image was made before it was cut.
    """
    found = fingerprint_in(arrays)
    if found is None:
        return None
    others = found.get(OTHER_PRECISIONS)
    if item.given_with is not None:
        found["resized"] = size_text(item.placement.resized_wh)
        if isinstance(others, list) and vae_fingerprint in others:
            found["vae"] = vae_fingerprint
    return found


def difference(found: Mapping[str, Any], item: CacheItem, vae_fingerprint: str) -> str | None:
    """What the latents were made with that would now be something else; the image apart."""
    expected = fingerprint_of(item, SourceBytes("", 0, 0, 0), vae_fingerprint)
    reasons = {
        "code": "older code", "resized": "other size", "bucket": "other size", "interpolation": "other resizing",
        "vae": "other VAE",
    }  # fmt: skip
    return next((reason for key, reason in reasons.items() if found.get(key) != expected.get(key)), None)


def decoded_before(path: str, npz: str) -> bool:
    """Whether a cache file shows that the image, unchanged since, has been decoded to the end once.

    Here size and time of modification do; what they don't tell is found when the cache is checked.
    """
    try:
        status = os.stat(path)
        found = fingerprint_in(read_arrays(npz, KEYS[-1:]))
    except DAMAGE:
        return False
    return found is not None and (found.get("bytes"), found.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)


# ---------------------------------------------------------------------------------------------- states


class State(NamedTuple):
    """What was found of a cache file."""

    reason: str  # one of VALID, "missing", NOT_OURS, or what is stale about it
    image_hash: str = OF_ANOTHER_PROGRAM  # of the image that a valid file was made of
    restamped: dict[str, np.ndarray] | None = None  # of a valid file: what would spare the next hash of the image


def state_of(item: CacheItem, vae_fingerprint: str) -> State:
    """Whether an item's cache file can be used; reads and checks the whole file."""
    if not os.path.exists(item.npz):
        return State("missing")
    try:
        with open(item.npz, "rb") as file:
            content = file.read()
    except OSError:  # a folder, or not for us to read
        return State(NOT_OURS)
    try:
        arrays = read_arrays(io.BytesIO(content), KEYS)
        found = _fingerprint_for(item, arrays, vae_fingerprint)
    except DAMAGE:
        return State("unreadable" if _may_be_a_cache(content) else NOT_OURS)
    if "latents" not in arrays:
        return State(NOT_OURS)
    if (mirrored := _mirrored_beside(item, arrays)) is not None:
        arrays[KEYS[1]] = mirrored
    return fitting_state(item, arrays, found, vae_fingerprint)


def fitting_state(
    item: CacheItem, arrays: dict[str, np.ndarray], found: Mapping[str, Any] | None, vae_fingerprint: str
) -> State:
    """Whether latents with the fingerprint `found` can be used for an item."""
    if misfit := _misfit(item, arrays, found, vae_fingerprint):
        return State(misfit)
    try:
        return _state_of_source(item, arrays, found, vae_fingerprint)
    except OSError:
        return State("image changed")


def _mirrored_beside(item: CacheItem, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Mirrored latents from a file of their own, where the item needs them and its npz lacks them."""
    if not item.flipped_too or KEYS[1] in arrays or item.flipped_npz is None:
        return None
    try:
        found = read_arrays(item.flipped_npz, KEYS)
    except DAMAGE:
        return None
    return found.get(KEYS[1], found.get(KEYS[0]))


def _may_be_a_cache(content: bytes) -> bool:
    """Whether a file that can't be read may have been a cache: by its names, or as an empty or unfinished archive."""
    try:
        return "latents.npy" in zipfile.ZipFile(io.BytesIO(content)).namelist()
    except DAMAGE:
        return content.startswith(b"PK\x03\x04") or not content.strip(b"\0")  # zeros: what a power cut leaves


def _misfit(
    item: CacheItem, arrays: Mapping[str, np.ndarray], found: Mapping[str, Any] | None, vae_fingerprint: str
) -> str | None:
    """What about the contents does not suit the item."""
    if any(key not in arrays for key in item.keys):
        return "without mirrored latents"
    if item.alpha_too and not _is_mask(arrays.get(ALPHA)):
        return "without alpha mask"
    if found is None and item.orientation != 1:
        return "not rotated"  # other programs take no notice of it
    if found is not None and (other := difference(found, item, vae_fingerprint)):
        return other
    if found is None and tuple(arrays.get("original_size", np.empty(0)).ravel().tolist()) != item.size_wh:
        return "other size"
    for latents_CHW in (arrays[key] for key in item.keys):
        if not np.issubdtype(latents_CHW.dtype, np.floating):
            return "unreadable"
        if latents_CHW.shape != latent_shape(item.placement.bucket_wh):
            return "other size"
        if not np.isfinite(latents_CHW).all():
            return "not finite"
    return None


def _is_mask(array: np.ndarray | None) -> bool:
    return array is not None and array.ndim == 2 and array.size > 0 and bool(((array >= 0) & (array <= 1)).all())


def _state_of_source(
    item: CacheItem, arrays: dict[str, np.ndarray], found: Mapping[str, Any] | None, vae_fingerprint: str
) -> State:
    """State of a file that suits the item, by whether its image has changed; raises OSError without an image."""
    if not item.has_image:
        return State("of another program" if found is None else "valid", str((found or {}).get("image", "")))
    status = os.stat(item.path)
    if found is None:
        newer = os.stat(item.npz).st_mtime_ns >= status.st_mtime_ns
        return State("of another program" if newer else "image changed")
    image_hash = str(found.get("image"))
    noted = {name: value for name, value in found.items() if name == OTHER_PRECISIONS}
    expected = fingerprint_of(item, SourceBytes.of(image_hash, status), vae_fingerprint) | noted
    if dict(found) == expected:
        return State("valid", image_hash)
    with open(item.path, "rb") as file:
        if hash_of(file.read()) != image_hash:
            return State("image changed")
    if item.given_with is not None:  # its own VAE and scale would be lost
        return State("valid", image_hash)
    return State("valid", image_hash, {**arrays, "fingerprint": np.array(json.dumps(expected))})


# ---------------------------------------------------------------------------------------------- reading


def read_latents(
    item: CacheItem, *, flipped: bool, vae_fingerprint: str, image_hash: str | None, is_checked: bool = True
) -> np.ndarray:
    """(C, H, W) of a file that was valid at the start; raises OptionError when it is that file no longer.

    `image_hash` is that of its state; None where another process has seen to it. Of a file that was taken unchecked,
    the OptionError says what about it does not fit.
    """
    key = KEYS[flipped]
    try:
        arrays = read_arrays(item.npz, (key, "fingerprint"))
        if flipped and (mirrored := _mirrored_beside(item, arrays)) is not None:
            arrays[key] = mirrored
        found = _fingerprint_for(item, arrays, vae_fingerprint)
    except DAMAGE as error:
        raise _unreadable(item.npz, error, is_checked=is_checked) from None
    misfit = None if found is None else difference(found, item, vae_fingerprint)
    if key not in arrays:
        misfit = "without mirrored latents" if flipped else "without latents"
    elif arrays[key].shape != latent_shape(item.placement.bucket_wh):
        misfit = "other size"
    if misfit and not is_checked:
        raise _unfit(item.npz, misfit)
    same_image = image_hash in (None, OF_ANOTHER_PROGRAM if found is None else found.get("image"))
    if misfit or not same_image:
        raise OptionError(FLAG, f"another run has rewritten {item.npz}", "resume when that run has ended")
    return arrays[key]


def original_size(npz: str) -> Size:
    """(width, height) of the image that a file's latents were made of; raises one of DAMAGE."""
    width, height = read_arrays(npz, ("original_size",))["original_size"].ravel().tolist()
    return int(width), int(height)


def read_alpha(item: CacheItem, *, is_checked: bool = True) -> np.ndarray:
    """(h, w) in [0, 1] of a file that was valid at the start; at latent size or, by other programs, at image size."""
    try:
        alpha_hw = read_arrays(item.npz, (ALPHA,)).get(ALPHA)
    except DAMAGE as error:
        raise _unreadable(item.npz, error, is_checked=is_checked) from None
    if alpha_hw is None:
        raise _unfit(item.npz, "without alpha mask")
    return alpha_hw


def _unreadable(npz: str, error: BaseException, *, is_checked: bool) -> OptionError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if not is_checked:
        return _unfit(npz, f"it can't be read: {reason}")
    return OptionError(FLAG, f"{npz} can't be read any more ({reason})", "delete it and resume")


def _unfit(npz: str, why: str) -> OptionError:
    """The error for a file that nobody has checked."""
    way_out = "leave out --skip_cache_check, and what does not fit is made anew"
    return OptionError("--skip_cache_check", f"{npz} does not fit this run ({why})", way_out)


def peek_latents(item: CacheItem, *, flipped: bool) -> np.ndarray:
    """(C, H, W) of an item's file as it is, for a look; raises OptionError where there are none."""
    try:
        arrays = read_arrays(item.npz, KEYS)
        mirrored = _mirrored_beside(item, arrays) if flipped else None
        return arrays[KEYS[flipped]] if mirrored is None else mirrored
    except DAMAGE as error:
        raise OptionError("metadata_file", f"{item.npz} can't be read ({error})", "remove its entry") from None


# ---------------------------------------------------------------------------------------------- writing


def write(
    item: CacheItem,
    latents: Mapping[bool, np.ndarray],
    fingerprint: Mapping[str, str | int],
    alpha_hw: np.ndarray | None = None,
) -> None:
    """Write a cache file, whole or not at all; `latents` (C, H, W) by whether they are of the mirrored image."""
    arrays = {} if alpha_hw is None else {ALPHA: alpha_hw}
    noted = {OTHER_PRECISIONS: item.other_precisions} if item.other_precisions else {}
    arrays |= {
        "original_size": np.array(item.size_wh),
        "crop_ltrb": np.array(crop_ltrb(item.size_wh, item.placement.bucket_wh)),
        "fingerprint": np.array(json.dumps({**fingerprint, **noted})),
    }
    try:
        save_arrays(item.npz, arrays | {KEYS[flipped]: latents_CHW for flipped, latents_CHW in latents.items()})
    except OSError as error:
        raise unwritable(item.npz, error.strerror or str(error)) from None


def restamp(item: CacheItem, arrays: Mapping[str, np.ndarray]) -> None:
    """Note the image's new times in a valid file; only to save work later, so it may fail."""
    with contextlib.suppress(OSError):
        save_arrays(item.npz, arrays)


def unwritable(path: str, reason: str) -> OptionError:
    """The error for a file or folder that can't be written."""
    way_out = "free some space or make the folder writable; training can also keep latents in memory: --cache_latents"
    return OptionError(FLAG, f"can't write {path} ({reason})", way_out)
