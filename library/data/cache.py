"""Cached latents: encode every image once, keep the results in memory or in files next to the images (`cache_files`).

Images are encoded in groups that follow from the list of items alone, so latents are the same to the last bit whether
they were made in one go, after an interruption or by several processes.

Shape letters: B samples, C latent channels, H W pixels or latent pixels.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch

from library.data import cache_files
from library.data.buckets import Size, central_cut
from library.data.cache_files import NOT_OURS, UNCHECKED, VALID, CacheItem, SourceBytes, State, latent_shape
from library.data.cache_report import report_counts
from library.data.headers import BadImage
from library.data.images import Picture, cut_out, load_picture, reason, to_tensor, usable_cores
from library.data.masks import latent_mask
from library.data.newer_names import under_found_names
from library.data.progress import progress
from library.options import OptionError
from library.randomness import torch_generator
from library.wording import counted

logger = logging.getLogger(__name__)

UNTRUSTED = "of another program, which does not say what made them"
NOISE_SEED = 0  # the posterior's noise follows from the image alone, so that a cache serves every run

Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images_BCHW [-1, 1], noise_BCHW -> latents_BCHW


# ---------------------------------------------------------------------------------------------- stores


class LatentsByIndex(Protocol):
    """Latents of the items of a run, wherever they are."""

    @property
    def in_memory(self) -> bool: ...

    def holds(self, index: int) -> bool: ...

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        """(C, H, W) float32."""
        ...

    def load_alpha(self, index: int) -> np.ndarray:
        """The alpha channel, (h, w) in [0, 1], of an item that asks for it."""
        ...


class DiskLatents:
    """Latents read from their files when they are drawn.

    `image_hashes` are those of the states of the files, by index, as far as this process checked or wrote them.
    `indices` are the items that it has latents of, by default all. Without `is_checked` nobody has looked at the files.
    """

    in_memory = False

    def __init__(
        self,
        items: Sequence[CacheItem],
        vae_fingerprint: str,
        image_hashes: Mapping[int, str],
        indices: Collection[int] | None = None,
        *,
        is_checked: bool = True,
    ) -> None:
        self.is_checked = is_checked
        self.items = items
        self.vae_fingerprint = vae_fingerprint
        self.image_hashes = image_hashes
        self.indices = range(len(items)) if indices is None else frozenset(indices)

    def holds(self, index: int) -> bool:
        return index in self.indices

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        """(C, H, W) float32; raises OptionError for a file that is no longer the one of the start."""
        latents_CHW = cache_files.read_latents(
            self.items[index],
            flipped=flipped,
            vae_fingerprint=self.vae_fingerprint,
            image_hash=self.image_hashes.get(index),
            is_checked=self.is_checked,
        )
        return torch.from_numpy(latents_CHW).float()

    def load_alpha(self, index: int) -> np.ndarray:
        """The alpha channel, (h, w) in [0, 1], of an item that asks for it."""
        return cache_files.read_alpha(self.items[index], is_checked=self.is_checked)


class MemoryLatents:
    """Latents in one float32 tensor per bucket, of all items but those `left_out`."""

    in_memory = True

    def __init__(self, items: Sequence[CacheItem], left_out: Collection[int] = ()) -> None:
        rows: Counter[Size] = Counter()
        self.rows: dict[tuple[int, bool], tuple[Size, int]] = {}
        for index, item in enumerate(items):
            for flipped in _variants(item) if index not in left_out else ():
                bucket = item.placement.bucket_wh
                self.rows[index, flipped] = bucket, rows[bucket]
                rows[bucket] += 1
        self.latents = {bucket: torch.empty(count, *latent_shape(bucket)) for bucket, count in rows.items()}
        self.alphas: dict[int, np.ndarray] = {}  # (h, w) by index

    def holds(self, index: int) -> bool:
        return (index, False) in self.rows

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        """(C, H, W) float32."""
        bucket, row = self.rows[index, flipped]
        return self.latents[bucket][row]

    def load_alpha(self, index: int) -> np.ndarray:
        """The alpha channel, (h, w) in [0, 1], of an item that asks for it."""
        return self.alphas[index]

    def keep(self, index: int, latents: dict[bool, torch.Tensor], alpha_hw: np.ndarray | None = None) -> None:
        """Take the latents of one item, by whether they are of the mirrored image, and its alpha channel."""
        if alpha_hw is not None:
            self.alphas[index] = alpha_hw
        for flipped, latents_CHW in latents.items():
            bucket, row = self.rows[index, flipped]
            self.latents[bucket][row] = latents_CHW


class JoinedLatents:
    """Latents of two places."""

    def __init__(self, first: DiskLatents, second: LatentsByIndex) -> None:
        self.first, self.second = first, second
        self.in_memory = second.in_memory and not first.indices

    def holds(self, index: int) -> bool:
        return self.first.holds(index) or self.second.holds(index)

    def load(self, index: int, *, flipped: bool) -> torch.Tensor:
        """(C, H, W) float32."""
        return self._holder(index).load(index, flipped=flipped)

    def load_alpha(self, index: int) -> np.ndarray:
        """The alpha channel, (h, w) in [0, 1], of an item that asks for it."""
        return self._holder(index).load_alpha(index)

    def _holder(self, index: int) -> LatentsByIndex:
        return self.first if self.first.holds(index) else self.second


LatentStore = LatentsByIndex


def fill_memory(
    items: Sequence[CacheItem], encode: Encode, batch_size: int, left_out: Collection[int] = ()
) -> MemoryLatents:
    """Encode everything but what is `left_out`, and keep it."""
    store = MemoryLatents(items, left_out)
    for index, latents, loaded in encoded_images(items, grouped(items, batch_size, left_out), encode):
        store.keep(index, latents, loaded.alpha_hw)
    return store


def fill_disk(
    items: Sequence[CacheItem],
    encode: Encode,
    batch_size: int,
    *,
    vae_fingerprint: str,
    is_checked: bool = True,
    trusts_others: bool = True,
    process_index: int = 0,
    num_processes: int = 1,
) -> DiskLatents:
    """Encode what has no valid cache file, every process its own share of the groups.

    A group with one missing file is encoded whole, as it was the first time, but only that file is written. Without
    `is_checked`, every file that is there counts as valid; without `trusts_others`, none that another program wrote.
    The caller lets the processes wait for each other afterwards.
    """
    items = under_found_names(items, vae_fingerprint, is_checked=is_checked)
    imageless = [index for index, item in enumerate(items) if not item.has_image]
    groups = grouped(items, batch_size, imageless)[process_index::num_processes]
    share = sorted([*imageless, *(index for group in groups for index in group)])
    states = states_of(items, share, vae_fingerprint, is_checked=is_checked)
    if not trusts_others:
        states = {index: _if_ours(state) if items[index].has_image else state for index, state in states.items()}
    needed = {index for index in share if states[index].reason not in VALID}
    refuse_without_image({items[index].npz: states[index].reason for index in imageless if index in needed})
    _refuse_foreign_files([items[index].npz for index in share if states[index].reason == NOT_OURS])
    report_states(Counter(state.reason for state in states.values()))
    _check_writable({os.path.dirname(items[index].npz) for index in needed})
    image_hashes = {
        index: states[index].image_hash for index in share if index not in needed and states[index].reason != UNCHECKED
    }
    with ThreadPoolExecutor(4) as pool:
        writing: deque[Future] = deque()
        for index, latents, loaded in encoded_images(items, [group for group in groups if needed & set(group)], encode):
            if index not in needed:
                continue
            image_hashes[index] = loaded.source.hash
            arrays = {flipped: latents_CHW.numpy() for flipped, latents_CHW in latents.items()}
            fingerprint = cache_files.fingerprint_of(items[index], loaded.source, vae_fingerprint)
            writing.append(pool.submit(cache_files.write, items[index], arrays, fingerprint, loaded.alpha_hw))
            while len(writing) > 2 * batch_size + 8:
                writing.popleft().result()
        for job in writing:
            job.result()
    return DiskLatents(items, vae_fingerprint, image_hashes, is_checked=is_checked)


def states_of(
    items: Sequence[CacheItem], share: Collection[int], vae_fingerprint: str, *, is_checked: bool = True
) -> dict[int, State]:
    """The states of these items' files; valid ones that took a look at their image are spared it the next time."""
    if not is_checked:
        found = {index: os.path.isfile(items[index].npz) for index in share}
        return {index: State(UNCHECKED if is_there else "missing") for index, is_there in found.items()}
    states: dict[int, State] = {}
    with progress("checking cached latents", len(share)) as bar:
        for index in share:
            state = cache_files.state_of(items[index], vae_fingerprint)
            if state.restamped is not None:
                cache_files.restamp(items[index], state.restamped)
            states[index] = state._replace(restamped=None)
            bar.update()
    return states


def _if_ours(state: State) -> State:
    return state._replace(reason=UNTRUSTED) if state.reason == "of another program" else state


# ---------------------------------------------------------------------------------------------- encoding


class _Loaded(NamedTuple):
    pixels_HWC: np.ndarray
    source: SourceBytes
    alpha_hw: np.ndarray | None  # where the item asks for it


def encoded_images(
    items: Sequence[CacheItem], groups: Sequence[Sequence[int]], encode: Encode
) -> Iterator[tuple[int, dict[bool, torch.Tensor], _Loaded]]:
    """(index, latents by flipped, what was loaded) of each item; images are decoded ahead while the VAE works."""
    num_images = sum(map(len, groups))
    with ThreadPoolExecutor(usable_cores()) as pool, progress("caching latents", num_images, stays=True) as bar:
        ahead: deque[list[Future[_Loaded]]] = deque()
        to_submit = iter(groups)
        for group in groups:
            depth = max(2, -(-2 * usable_cores() // len(group)))  # groups; keeps every core busy
            while len(ahead) < depth and (following := next(to_submit, None)):
                ahead.append([pool.submit(_load, items[index]) for index in following])
            loaded = [job.result() for job in ahead.popleft()]
            yield from _encode_group(items, group, loaded, encode)
            bar.update(len(group))


def grouped(items: Sequence[CacheItem], size: int, left_out: Collection[int] = ()) -> list[list[int]]:
    """Indices of items of one bucket but those `left_out`, at most `size` together, small buckets first."""
    by_bucket: dict[Size, list[int]] = {}
    left_out = frozenset(left_out)
    for index, item in enumerate(items):
        if index in left_out:
            continue
        by_bucket.setdefault(item.placement.bucket_wh, []).append(index)
    ordered = sorted(by_bucket, key=lambda bucket: (bucket[0] * bucket[1], bucket))
    return [
        by_bucket[bucket][start : start + size]
        for bucket in ordered
        for start in range(0, len(by_bucket[bucket]), size)
    ]


def _encode_group(
    items: Sequence[CacheItem], group: Sequence[int], loaded: Sequence[_Loaded], encode: Encode
) -> Iterator[tuple[int, dict[bool, torch.Tensor], _Loaded]]:
    latents: dict[int, dict[bool, torch.Tensor]] = {index: {} for index in group}
    for flipped in (False, True):
        members = [(index, one) for index, one in zip(group, loaded, strict=True) if flipped in _variants(items[index])]
        if not members:
            continue
        images = [to_tensor(one.pixels_HWC[:, ::-1] if flipped else one.pixels_HWC) for _, one in members]
        shape = latent_shape(items[group[0]].placement.bucket_wh)
        noise = [posterior_noise(shape, one.source.hash, flipped=flipped) for _, one in members]
        encoded_BCHW = encode(torch.stack(images), torch.stack(noise)).float().cpu()
        _check_finite(encoded_BCHW, [items[index].path for index, _ in members])
        for (index, _), latents_CHW in zip(members, encoded_BCHW, strict=True):
            latents[index][flipped] = latents_CHW
    for index, one in zip(group, loaded, strict=True):
        yield index, latents[index], one


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
        picture = load_picture(content, item.orientation)
    except (OSError, BadImage) as error:
        raise OptionError(
            "training images", f"{item.path} can't be read ({reason(error)})", "mend or remove it"
        ) from None
    cut = central_cut(item.placement)
    pixels_HWC = cut_out(picture.rgb_HWC, cut, item.placement.interpolation)
    alpha_hw = latent_mask(_alpha_of(picture), cut) if item.alpha_too else None
    return _Loaded(pixels_HWC, SourceBytes.of(cache_files.hash_of(content), status), alpha_hw)


def _alpha_of(picture: Picture) -> np.ndarray:
    """255 all over for a picture that can't be transparent."""
    return np.full(picture.rgb_HWC.shape[:2], 255, np.uint8) if picture.alpha_HW is None else picture.alpha_HW


def _variants(item: CacheItem) -> tuple[bool, ...]:
    return (False, True) if item.flipped_too else (False,)


# ---------------------------------------------------------------------------------------------- checks and reports


def _refuse_foreign_files(paths: Sequence[str]) -> None:
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise OptionError(
            cache_files.FLAG,
            f"{paths[0]}{more} would be overwritten, but is no latent cache",
            "move it to another folder",
        )


def refuse_without_image(reasons: Mapping[str, str]) -> None:
    """Raise OptionError for latents that can't be used, by file, where there is no image to make them anew from."""
    if reasons:
        table = "".join(f"\n  {npz}: {reason}" for npz, reason in sorted(reasons.items()))
        problem = f"{len(reasons)} entries of a metadata file have latents that can't be used, and no image"
        raise OptionError("metadata_file", f"{problem}; put the images back, or remove the entries:{table}")


def _check_writable(folders: set[str]) -> None:
    for folder in sorted(folders):
        if not os.access(folder or ".", os.W_OK):
            raise cache_files.unwritable(folder, "no permission")


def report_states(states: Counter[str]) -> None:
    """Say how many files, or records, of each state there are."""
    total, new, foreign = sum(states.values()), states["missing"], states["of another program"]
    if states[UNCHECKED]:
        count = counted(states[UNCHECKED], "cache file")
        logger.info("latents: %s taken unchecked, as --skip_cache_check asks", count)
    stale = {reason: count for reason, count in states.items() if reason not in VALID | {"missing"}}
    if foreign:
        count = counted(foreign, "cache file")
        logger.info("latents: %s of another program used: nothing in it tells of its VAE", count)
    report_counts("latents", total, new, stale)
