"""The training data of a run: found, checked, sorted into buckets, cached, served in batches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from library.data import text_cache
from library.data.assembly import Assembly
from library.data.batch import Batch, Position
from library.data.cache import Encode, JoinedLatents, LatentStore, fill_disk, fill_memory
from library.data.cache_files import CacheItem, decoded_before
from library.data.checked_images import find_broken_images, items_of_unknown_looks, known_whole
from library.data.config import DatasetConfig, SubsetConfig, check_cacheable
from library.data.face_crop import report_faces
from library.data.folder_contents import FolderContents, under_one_name
from library.data.folder_scan import scan_folder
from library.data.given_latents import datasets_with_latents, given_latents
from library.data.images import usable_cores
from library.data.index import DataIndex
from library.data.info_cache import write_info
from library.data.inspect import ShownSample, shown_samples
from library.data.loading import RunFacts, Samples, load_batches
from library.data.lookalikes import Looks
from library.data.mask_files import report_masks, with_mask_files
from library.data.metadata_source import scan_metadata
from library.data.options import CacheOptions
from library.data.packed_files import Packs
from library.data.packed_latents import fill_packs
from library.data.placed_images import placed_images
from library.data.record_table import RecordTable
from library.data.scan import Scan
from library.data.sources import refuse_broken, report_captions, table_of_broken
from library.data.summary import LoadedDataset, metadata
from library.data.text_cache import EncodeText, MemoryTexts, TextStore
from library.data.text_cache_check import check_text_cacheable
from library.data.text_cache_files import TextItem
from library.data.text_cache_options import TextCacheOptions
from library.data.text_items import text_items
from library.data.train_images import TrainImages, described_images
from library.data.validation_set import ValidationSet, split_images, with_own_items
from library.options import OptionError

logger = logging.getLogger(__name__)


class TrainingData:
    """All datasets of a run. Make it with :meth:`build`."""

    def __init__(
        self,
        datasets: Sequence[LoadedDataset],
        items: Sequence[CacheItem],
        images: TrainImages,
        samples: Samples,
        validation: ValidationSet | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self.validation = validation
        self._items = items
        self.scan = Scan()  # what else was seen while they were found
        self._samples = samples
        self._images = images
        self._store: LatentStore | None = None
        self._texts: TextStore | None = None

    @classmethod
    def build(
        cls, configs: Sequence[DatasetConfig], *, seed: int, on_bad_image: str, checks_images: bool = True
    ) -> TrainingData:
        """Find the images, read captions, check every image to its last byte, and sort them into buckets.

        `on_bad_image` "stop": all broken images in one OptionError; "skip": the run does without. What was found
        beside the images to train on is in `scan`. Without `checks_images` no image is decoded.
        """
        subsets = [subset for config in configs for subset in config.subsets]
        index = DataIndex()
        found = [_scan(subset, index) for subset in subsets]
        report_captions(zip(found, (subset.caption.caption_extension for subset in subsets), strict=True))
        found, broken_masks = with_mask_files(found, subsets)
        found = under_one_name(found)
        with_latents, unusable = datasets_with_latents(configs, found)
        images, items = placed_images(configs, found, with_latents)
        broken = {path: reason for contents in found for path, reason in contents.broken.items()} | unusable
        broken |= broken_masks
        packs, looks = Packs(), Looks()
        unknown = items_of_unknown_looks(images, items, looks, index)
        for path, look in known_whole((item.path for item in unknown if item.has_image), index):
            looks.add(path, look)
        unchecked = {item.path: None for item in unknown if item.path not in looks and _needs_a_look(item, packs)}
        others = (record for records in images.records if not isinstance(records, RecordTable) for record in records)
        unchecked |= {record.mask.path: None for record in others if record.mask}
        broken |= find_broken_images(unchecked if checks_images else (), looks, index)
        if on_bad_image == "stop":
            refuse_broken(broken)
        if broken:
            found = [contents.without(broken) for contents in found]
            images, items = placed_images(configs, found, with_latents)
        report_masks(found, subsets)
        crops_faces = [config.crops_faces(subset) for config in configs for subset in config.subsets]
        report_faces(images.has_face_M[np.array(crops_faces, bool)[images.subset_M]].tolist())
        split = split_images(configs, images, seed)
        validation = None
        if len(split.validation):
            validation = ValidationSet(configs, *with_own_items(split.validation, items), seed)
            images, items = with_own_items(split.training, items)
        assembly = Assembly(images, subsets)
        starts = accumulate((len(config.subsets) for config in configs), initial=0)
        datasets = [
            assembly.add(config, range(start, start + len(config.subsets)))
            for config, start in zip(configs, starts, strict=False)
        ]
        if not any(dataset.num_train for dataset in datasets):
            looked_at = ", ".join(str(subset.source) for subset in subsets)
            way_out = f"add images that are not is_reg{table_of_broken(broken)}"
            raise OptionError("training images", f"none left to train on in {looked_at}", way_out)
        _report_unused(datasets)
        data = cls(datasets, items, images, assembly.samples(seed), validation)
        data.scan = Scan(tuple(found), broken, looks, index)
        return data

    # ------------------------------------------------------------------------------------------ facts

    @property
    def num_train_images(self) -> int:
        """Training images x repeats, over all datasets."""
        return sum(dataset.num_train for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images x repeats; an epoch shows as many of them as there are training images."""
        return sum(dataset.num_reg for dataset in self.datasets)

    @property
    def is_empty(self) -> bool:
        return self.num_train_images == 0

    @property
    def latents_in_memory(self) -> bool:
        return self._store is not None and self._store.in_memory

    @property
    def brings_latents(self) -> bool:
        """Whether a dataset comes with latents, which are used without being asked to cache."""
        return any(item.given_with is not None for item in self._items)

    @property
    def needs_vae(self) -> bool:
        """Whether images are encoded while training."""
        parts = [(self._items, self._store)]
        if self.validation is not None:
            parts.append((self.validation.items, self.validation.store))
        return not all(
            store is not None and store.holds(index) for items, store in parts for index in range(len(items))
        )

    def batches_per_epoch(self, num_processes: int) -> int:
        """Batches over all processes; the same for every epoch."""
        return sum(pool.num_batches(num_processes) for pool in self._samples.pools)

    def metadata(self, *, num_processes: int = 1, accumulation: int = 1) -> dict[str, Any]:
        """The ss_* keys about the data, for str()."""
        num_validation = 0 if self.validation is None else self.validation.num_images
        facts = metadata(self.datasets, samples_per_step=num_processes * accumulation)
        return facts | {"ss_num_validation_images": num_validation}

    def digest(self) -> dict[str, int | str]:
        """By what it is of: changes with whatever samples are made of. Hashes are hexadecimal.

        It doesn't when the folders move, nor for an image replaced by one of its name with as many bytes and pixels.
        """
        options, files, captions = (hashlib.blake2b(digest_size=16) for _ in range(3))
        for dataset in self.datasets:
            options.update(repr(_without_place(dataset.config)).encode())
        for text, caption in described_images(self._images):
            files.update(text.encode())
            captions.update(repr(caption).encode())
        return {
            "number of images": len(self._samples.images),
            "image files": files.hexdigest(),
            "captions": captions.hexdigest(),
            "options of the data": options.hexdigest(),
        }

    # ------------------------------------------------------------------------------------------ latents

    def cache_latents(
        self,
        encode: Encode,
        fingerprint: str,
        cache: CacheOptions,
        *,
        trusts_others: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Encode all images, or take latents from valid cache files; batches then hold latents.

        Without an order to cache, this only takes up the latents that datasets bring along.

        `encode` turns images (B, 3, H, W) in [-1, 1] and noise (B, 4, H/8, W/8) into unscaled latents, shaped like
        the noise; `fingerprint` identifies the VAE's weights. On disk every process encodes its own share: let them
        wait for each other before the first batch. In memory every process encodes everything. `trusts_others` as in
        :func:`library.data.cache.fill_disk`.
        """
        check_cacheable([dataset.config for dataset in self.datasets], cache)

        def filled(items: Sequence[CacheItem]) -> LatentStore:
            is_checked = not cache.skip_cache_check
            if not cache.cache_latents_to_disk or cache.is_packed:
                left_to = None if cache.enabled else "the images themselves are"
                given = given_latents(items, fingerprint, left_to=left_to, is_checked=is_checked)
                if not cache.enabled:
                    return given
                if not cache.is_packed:
                    return JoinedLatents(given, fill_memory(items, encode, cache.vae_batch_size, given.indices))
                packed = fill_packs(
                    items,
                    encode,
                    cache.vae_batch_size,
                    vae_fingerprint=fingerprint,
                    left_out=given.indices,
                    is_checked=is_checked,
                    share=(process_index, num_processes),
                )
                return JoinedLatents(given, packed)
            return fill_disk(
                items,
                encode,
                cache.vae_batch_size,
                vae_fingerprint=fingerprint,
                is_checked=is_checked,
                trusts_others=trusts_others,
                process_index=process_index,
                num_processes=num_processes,
            )

        self._store = filled(self._items)
        if self.validation is not None:
            self.validation.store = filled(self.validation.items)

    def cache_items(self) -> list[CacheItem]:
        """What each file of cached latents is of, those of validation among them."""
        return [*self._items, *(self.validation.items if self.validation else ())]

    # ------------------------------------------------------------------------------------------ text

    def text_items(self, num_versions: int | None) -> list[TextItem]:
        """What each file of cached text is of, those of validation among them."""
        parts = [self._samples, *([self.validation.samples] if self.validation else ())]
        return [item for samples in parts for item in text_items(samples, num_versions)]

    def cache_texts(
        self,
        encode: EncodeText,
        encoders: str,
        cache: TextCacheOptions,
        *,
        is_checked: bool = True,
        trusts_others: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Encode all captions, or take them from valid cache files; batches then hold them encoded.

        `encode` turns captions into what the text encoders, identified by `encoders`, say of them. On disk every
        process encodes its own share: let them wait for each other before the first batch.
        """
        check_text_cacheable([dataset.config for dataset in self.datasets], cache)

        def filled(samples: Samples) -> TextStore:
            items = text_items(samples, cache.text_variations)
            if not cache.cache_text_encoder_outputs_to_disk:
                return MemoryTexts(items, encode)
            return text_cache.fill_disk(
                items,
                encode,
                encoders,
                is_checked=is_checked,
                trusts_others=trusts_others,
                process_index=process_index,
                num_processes=num_processes,
            )

        self._texts = filled(self._samples)
        if self.validation is not None:
            self.validation.texts = filled(self.validation.samples)

    # ------------------------------------------------------------------------------------------ batches

    def loader(self, *, start: Position, workers: int, **run: Any) -> Iterator[tuple[Position, Batch]]:
        """The run's batches from `start` on, made by up to `workers` processes; `run` are the fields of RunFacts.

        Latents in memory need none: taking them costs less than handing them over.
        """
        in_memory = self.latents_in_memory and (self._texts is None or self._texts.in_memory)
        workers = 0 if in_memory else min(workers, usable_cores())
        facts = RunFacts(**run)
        return load_batches(self._samples, self._store, facts, start=start, workers=workers, texts=self._texts)

    def first_epoch(self, *, num_pictured: int, workers: int, **run: Any) -> Iterator[ShownSample]:
        """The samples of the first epoch in their order, for a look; the first ones with pictures."""
        facts = RunFacts(**{**run, "epochs": 1})
        return shown_samples(self._samples, self._items, facts, num_pictured=num_pictured, workers=workers)


# ---------------------------------------------------------------------------------------------- assembly


def _without_place(config: DatasetConfig) -> DatasetConfig:
    """The same, wherever its folders are and wherever it was written."""
    subsets = tuple(
        replace(
            subset,
            folder=replace(subset.folder, image_dir=None, metadata_file=None, custom_attributes=None),
            caption=replace(subset.caption, cache_info=False, data_index="auto"),
            masks=replace(subset.masks, conditioning_data_dir=None),
        )
        for subset in config.subsets
    )
    return replace(config, subsets=subsets, from_file=False)


def _report_unused(datasets: Sequence[LoadedDataset]) -> None:
    """Warn of regularisation images that balance nothing."""
    for dataset in datasets:
        if dataset.num_reg and not dataset.num_train:
            sources = ", ".join(str(subset.source) for subset in dataset.config.subsets if subset.folder.is_reg)
            logger.warning(
                "%s: regularisation images are not used without training images in their dataset; "
                "move the subset to the [[datasets]] of the images that it is to balance",
                sources,
            )


def _needs_a_look(item: CacheItem, packs: Packs) -> bool:
    """Whether nothing shows so far that the image can be decoded, and it will be."""
    if not item.has_image or item.given_with is not None:
        return False
    return not (decoded_before(item.path, item.npz) or packs.decoded_before(item))


def _scan(subset: SubsetConfig, index: DataIndex) -> FolderContents:
    options = subset.caption
    if subset.is_metadata:
        return scan_metadata(
            subset.source,
            subset.image_dir,
            between=options.joint,
            all_lines=options.enable_wildcard,
            index=index,
            index_policy=options.data_index,
        )
    contents = scan_folder(
        subset.image_dir,
        caption_extension=options.caption_extension,
        class_tokens=subset.folder.class_tokens,
        all_lines=options.enable_wildcard,
        index=index,
        index_policy=options.data_index,
    )
    if options.cache_info:
        write_info(subset.image_dir, contents.images)
    if not (contents.images or contents.broken or contents.unreadable_captions):
        logger.warning("%s: no images, passed over", subset.image_dir)
    return contents
