"""Cached latents: encode every image once, keep the results in memory or in .npz files next to the images.

The files are those of the trade (`latents`, `original_size`, `crop_ltrb`, `latents_flipped`), readable both ways, with
one more array: `fingerprint`, a JSON text that says what made them. A file whose fingerprint does not fit is rebuilt.

Shape letters: B samples, C latent channels, H W pixels or latent pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from library.data.buckets import Placement, Size, crop_ltrb
from library.data.headers import BadImage
from library.data.images import load_image, place, to_tensor, usable_cores
from library.data.options import LATENT_STRIDE
from library.options import OptionError
from library.randomness import torch_generator

logger = logging.getLogger(__name__)

CODE_VERSION = 1  # of everything between the file's bytes and the VAE's input; raise it when that changes
LATENT_CHANNELS = 4
NOISE_SEED = 0  # the posterior's noise follows from the image alone, so that a cache serves every run

Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images_BCHW [-1, 1], noise_BCHW -> latents_BCHW


@dataclass(frozen=True, slots=True)
class CacheItem:
    """One image at one placement: what one cache file holds."""

    path: str
    size_wh: Size
    orientation: int
    placement: Placement
    flipped_too: bool
    npz: str

    @property
    def latent_hw(self) -> tuple[int, int]:
        width, height = self.placement.bucket_wh
        return height // LATENT_STRIDE, width // LATENT_STRIDE


def latent_shape(bucket_wh: Size) -> tuple[int, int, int]:
    """(channels, height, width) of a latent for images of this size."""
    return LATENT_CHANNELS, bucket_wh[1] // LATENT_STRIDE, bucket_wh[0] // LATENT_STRIDE


def cache_file_names(images: Sequence[tuple[str, Placement]]) -> list[str]:
    """The cache file of each image: `<base>.npz` as in the trade, longer where two would share that name.

    Images of one stem but several extensions use the whole file name; one image trained at several sizes has the
    sizes in the name. Equal (path, placement) pairs share a file.
    """
    unique = list(dict.fromkeys(images))
    names = {image: f"{os.path.splitext(image[0])[0]}.npz" for image in unique}
    for lengthen in (
        lambda path, _: f"{path}.npz",
        lambda path, placement: f"{path}.{_size_text(placement.bucket_wh)}.npz",
        lambda path, placement: f"{path}.{_size_text(placement.bucket_wh)}.{_size_text(placement.resized_wh)}.npz",
    ):
        uses = Counter(names.values())
        names = {image: lengthen(*image) if uses[name] > 1 else name for image, name in names.items()}
    return [names[image] for image in images]


# ---------------------------------------------------------------------------------------------- stores


class DiskLatents:
    """Latents read from their files when they are drawn."""

    in_memory = False

    def __init__(self, items: Sequence[CacheItem]) -> None:
        self.items = items

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        """(C, H, W) float32."""
        item = self.items[index]
        try:
            with np.load(item.npz) as arrays:
                return torch.from_numpy(arrays["latents_flipped" if flipped else "latents"]).float()
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise OptionError("--cache_latents_to_disk", f"{item.npz} can't be read ({error})", "start again") from None


class MemoryLatents:
    """Latents in one float32 tensor per bucket."""

    in_memory = True

    def __init__(self, items: Sequence[CacheItem]) -> None:
        rows: Counter[Size] = Counter()
        self.rows: dict[tuple[int, bool], tuple[Size, int]] = {}
        for index, item in enumerate(items):
            for flipped in _variants(item):
                bucket = item.placement.bucket_wh
                self.rows[index, flipped] = bucket, rows[bucket]
                rows[bucket] += 1
        self.latents = {bucket: torch.empty(count, *latent_shape(bucket)) for bucket, count in rows.items()}

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        """(C, H, W) float32."""
        bucket, row = self.rows[index, flipped]
        return self.latents[bucket][row]

    def keep(self, index: int, latents: dict[bool, torch.Tensor]) -> None:
        """Take the latents of one item, by whether they are of the mirrored image."""
        for flipped, latents_CHW in latents.items():
            bucket, row = self.rows[index, flipped]
            self.latents[bucket][row] = latents_CHW


LatentStore = DiskLatents | MemoryLatents


def fill_memory(items: Sequence[CacheItem], encode: Encode, batch_size: int) -> MemoryLatents:
    """Encode everything and keep it."""
    store = MemoryLatents(items)
    for index, latents, _ in _encoded(items, range(len(items)), encode, batch_size):
        store.keep(index, latents)
    return store


def fill_disk(
    items: Sequence[CacheItem],
    encode: Encode,
    batch_size: int,
    *,
    vae_fingerprint: str,
    process_index: int = 0,
    num_processes: int = 1,
) -> DiskLatents:
    """Encode what has no valid cache file, every process its own share of the items.

    The caller lets the processes wait for each other afterwards.
    """
    share = range(process_index, len(items), num_processes)
    states = {index: _state(items[index], vae_fingerprint) for index in share}
    needed = [index for index in share if states[index] not in VALID]
    _report(Counter(states.values()))
    _check_writable({os.path.dirname(items[index].npz) for index in needed})
    with ThreadPoolExecutor(4) as pool:
        writing: deque[Future] = deque()
        for index, latents, source in _encoded(items, needed, encode, batch_size):
            fingerprint = _fingerprint(items[index], source, vae_fingerprint)
            writing.append(pool.submit(_write, items[index], latents, fingerprint))
            while len(writing) > 2 * batch_size + 8:
                writing.popleft().result()
        for job in writing:
            job.result()
    return DiskLatents(items)


# ---------------------------------------------------------------------------------------------- encoding


class SourceBytes(NamedTuple):
    """What identifies the bytes of an image file."""

    hash: str
    num_bytes: int
    mtime_ns: int


class _Loaded(NamedTuple):
    pixels_HWC: np.ndarray
    source: SourceBytes


def _encoded(
    items: Sequence[CacheItem], indices: Sequence[int], encode: Encode, batch_size: int
) -> Iterator[tuple[int, dict[bool, torch.Tensor], SourceBytes]]:
    """(index, latents by flipped, source) of each item; images are decoded ahead while the VAE works."""
    batches = _batches(items, indices, batch_size)
    bar = tqdm(total=len(indices), desc="caching latents", unit="image", disable=not indices)
    with ThreadPoolExecutor(usable_cores()) as pool, bar:
        ahead: deque[list[Future[_Loaded]]] = deque()
        depth = max(2, -(-2 * usable_cores() // batch_size))  # batches; keeps every core busy
        to_submit = iter(batches)
        for batch in batches:
            while len(ahead) < depth and (following := next(to_submit, None)):
                ahead.append([pool.submit(_load, items[index]) for index in following])
            loaded = [job.result() for job in ahead.popleft()]
            yield from _encode_batch(items, batch, loaded, encode)
            bar.update(len(batch))


def _batches(items: Sequence[CacheItem], indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of items of one bucket, at most `batch_size` together, small buckets first."""
    by_bucket: dict[Size, list[int]] = {}
    for index in indices:
        by_bucket.setdefault(items[index].placement.bucket_wh, []).append(index)
    ordered = sorted(by_bucket, key=lambda size: (size[0] * size[1], size))
    return [
        by_bucket[bucket][start : start + batch_size]
        for bucket in ordered
        for start in range(0, len(by_bucket[bucket]), batch_size)
    ]


def _encode_batch(
    items: Sequence[CacheItem], batch: Sequence[int], loaded: Sequence[_Loaded], encode: Encode
) -> Iterator[tuple[int, dict[bool, torch.Tensor], SourceBytes]]:
    latents: dict[int, dict[bool, torch.Tensor]] = {index: {} for index in batch}
    for flipped in (False, True):
        members = [(index, one) for index, one in zip(batch, loaded, strict=True) if flipped in _variants(items[index])]
        if not members:
            continue
        images = [to_tensor(one.pixels_HWC[:, ::-1] if flipped else one.pixels_HWC) for _, one in members]
        shape = latent_shape(items[batch[0]].placement.bucket_wh)
        noise = [posterior_noise(shape, one.source.hash, flipped=flipped) for _, one in members]
        encoded_BCHW = encode(torch.stack(images), torch.stack(noise)).float().cpu()
        _check_finite(encoded_BCHW, [items[index].path for index, _ in members])
        for (index, _), latents_CHW in zip(members, encoded_BCHW, strict=True):
            latents[index][flipped] = latents_CHW
    for index, one in zip(batch, loaded, strict=True):
        yield index, latents[index], one.source


def posterior_noise(shape_chw: tuple[int, int, int], content_hash: str, *, flipped: bool) -> torch.Tensor:
    """N(0, 1) noise for the VAE's sample of one image: a function of the image's bytes."""
    generator = torch_generator(NOISE_SEED, "latent-cache", content_hash, int(flipped))
    return torch.randn(shape_chw, generator=generator)


def _check_finite(latents_BCHW: torch.Tensor, paths: Sequence[str]) -> None:
    finite_B = latents_BCHW.isfinite().flatten(1).all(dim=1)
    if not finite_B.all():
        names = ", ".join(path for path, finite in zip(paths, finite_B.tolist(), strict=True) if not finite)
        raise OptionError(
            "--cache_latents", f"the VAE gives no finite latents for {names}", "use --no_half_vae or another --vae"
        )


def _load(item: CacheItem) -> _Loaded:
    try:
        status = os.stat(item.path)
        with open(item.path, "rb") as file:
            content = file.read()
        pixels_HWC = place(load_image(content, item.orientation), item.placement)
    except (OSError, BadImage) as error:
        raise OptionError("training images", f"{item.path} can't be read ({error})", "mend or remove it") from None
    return _Loaded(pixels_HWC, SourceBytes(_hash(content), len(content), status.st_mtime_ns))


def _variants(item: CacheItem) -> tuple[bool, ...]:
    return (False, True) if item.flipped_too else (False,)


def _size_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------- files

VALID = {"valid", "of another program"}


def _fingerprint(item: CacheItem, source: SourceBytes, vae_fingerprint: str) -> dict[str, str | int]:
    return {
        "code": CODE_VERSION,
        "image": source.hash,
        "bytes": source.num_bytes,
        "mtime_ns": source.mtime_ns,
        "vae": vae_fingerprint,
        "resized": _size_text(item.placement.resized_wh),
        "bucket": _size_text(item.placement.bucket_wh),
    }


def _state(item: CacheItem, vae_fingerprint: str) -> str:
    """One of VALID (of another program: no fingerprint, but all sizes fit), "missing", or what is stale about it."""
    if not os.path.exists(item.npz):
        return "missing"
    try:
        status = os.stat(item.path)
        with np.load(item.npz) as arrays:
            if "latents" not in arrays:
                return "not a latent cache"
            if item.flipped_too and "latents_flipped" not in arrays:
                return "without mirrored latents"
            if "fingerprint" not in arrays:
                return _state_of_foreign(item, arrays, newer=os.stat(item.npz).st_mtime_ns >= status.st_mtime_ns)
            found = json.loads(str(arrays["fingerprint"]))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return "unreadable"
    expected = _fingerprint(item, SourceBytes("", status.st_size, status.st_mtime_ns), vae_fingerprint)
    for key, reason in (
        ("code", "older code"),
        ("resized", "other size"),
        ("bucket", "other size"),
        ("vae", "other VAE"),
    ):
        if found.get(key) != expected[key]:
            return reason
    unchanged = (found.get("bytes"), found.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
    return "valid" if unchanged or found.get("image") == _hash_of_file(item.path) else "image changed"


def _state_of_foreign(item: CacheItem, arrays: np.lib.npyio.NpzFile, *, newer: bool) -> str:
    """State of a file without fingerprint, of the trade's programs, which neither rotate nor look at the image."""
    if item.orientation != 1:
        return "not rotated"
    for key in ("latents", "latents_flipped") if item.flipped_too else ("latents",):
        if arrays[key].shape[1:] != item.latent_hw:
            return "other size"
    if tuple(arrays["original_size"].tolist()) != item.size_wh:
        return "other size"
    return "of another program" if newer else "image changed"


def decoded_before(path: str, npz: str) -> bool:
    """Whether a cache file shows that the image, unchanged since, has been decoded to the end once."""
    try:
        status = os.stat(path)
        with np.load(npz) as arrays:
            found = json.loads(str(arrays["fingerprint"]))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return False
    return (found.get("bytes"), found.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)


def _hash_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return _hash(file.read())


def _write(item: CacheItem, latents: dict[bool, torch.Tensor], fingerprint: dict[str, str | int]) -> None:
    """Write a cache file whole or not at all."""
    arrays: dict[str, Any] = {
        "latents": latents[False].numpy(),
        "original_size": np.array(item.size_wh),
        "crop_ltrb": np.array(crop_ltrb(item.size_wh, item.placement.bucket_wh)),
        "fingerprint": np.array(json.dumps(fingerprint)),
    }
    if item.flipped_too:
        arrays["latents_flipped"] = latents[True].numpy()
    temporary = f"{item.npz}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, item.npz)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise _unwritable(item.npz, error.strerror or str(error)) from None


def _check_writable(folders: set[str]) -> None:
    for folder in sorted(folders):
        if not os.access(folder or ".", os.W_OK):
            raise _unwritable(folder, "no permission")


def _unwritable(path: str, reason: str) -> OptionError:
    return OptionError("--cache_latents_to_disk", f"can't write {path} ({reason})", "use --cache_latents (in memory)")


def _report(states: Counter[str]) -> None:
    total, new, foreign = sum(states.values()), states["missing"], states["of another program"]
    stale = {reason: count for reason, count in states.items() if reason not in VALID | {"missing"}}
    if foreign:
        logger.info("latents: %d cache files of another program used, as they say nothing of their VAE", foreign)
    if stale:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(stale.items()))
        logger.info("latents: %d stale cache files are rebuilt (%s)", sum(stale.values()), reasons)
    logger.info("latents: %d of %d cached before, %d new", total - new - sum(stale.values()), total, new)
