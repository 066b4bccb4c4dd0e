"""From placed images to samples: numbers them, repeats them, balances regularisation images, forms the pools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from library.data.buckets import Size
from library.data.config import DatasetConfig, SubsetConfig
from library.data.epoch_plan import Pool, registered_repeats, rotation_quotas
from library.data.loading import Samples, TrainImage
from library.data.summary import LoadedDataset


class Assembly:
    """Takes the datasets of a run one after the other; then :meth:`samples` has them all.

    `images` come dataset by dataset and name their subset by its index in `subsets`.
    """

    def __init__(self, images: Sequence[TrainImage], subsets: Sequence[SubsetConfig]) -> None:
        self.images = images
        self.subsets = subsets
        self._pools: list[Pool] = []
        self._image_of_sample: list[np.ndarray] = []
        self._num_samples = 0
        self._num_datasets = 0
        self._images_of_subset: list[list[int]] = [[] for _ in subsets]
        for index, image in enumerate(images):
            self._images_of_subset[image.subset].append(index)

    def add(self, config: DatasetConfig, subsets: range) -> LoadedDataset:
        """Form the pools of one dataset, whose subsets these are."""
        train, reg = self._chosen(subsets, is_reg=False), self._chosen(subsets, is_reg=True)
        num_train, num_reg = sum(map(self._repeats, train)), sum(map(self._repeats, reg))
        registered = registered_repeats([self._repeats(index) for index in reg], num_train)
        reg_per_epoch = sum(registered)
        rotates = reg_per_epoch < num_reg
        always: dict[Size, list[np.ndarray]] = {}
        rotating: dict[Size, list[np.ndarray]] = {}
        for index in train:
            self._number(index, self._repeats(index), always)
        for index, showings in zip(reg, registered, strict=True):
            self._number(index, self._repeats(index) if rotates else showings, rotating if rotates else always)
        pools = self._form_pools(config.batch_size, _joined(always), _joined(rotating), reg_per_epoch)
        self._pools += pools.values()
        self._num_datasets += 1
        return LoadedDataset(
            config,
            tuple(tuple(self.images[index] for index in self._images_of_subset[subset]) for subset in subsets),
            tuple((bucket, pool.size) for bucket, pool in pools.items() if bucket is not None),
            num_train,
            num_reg,
            reg_per_epoch,
        )

    def samples(self, seed: int) -> Samples:
        """All samples of the datasets added."""
        image_of_sample = np.concatenate(self._image_of_sample)
        return Samples(self.images, self.subsets, image_of_sample, tuple(self._pools), seed)

    def _form_pools(
        self, batch_size: int, always: dict[Size, np.ndarray], rotating: dict[Size, np.ndarray], reg_per_epoch: int
    ) -> dict[Size | None, Pool]:
        """By bucket, ascending; None is the pool of regularisation images that make batches of their own."""
        nothing = np.empty(0, dtype=np.int64)
        quotas: dict[Size, int] = {}
        pools: dict[Size | None, Pool] = {}
        if reg_per_epoch and rotating:
            shares = rotation_quotas([len(ids) for ids in rotating.values()], reg_per_epoch)
            if shares is None:  # they come in more sizes than an epoch shows of them
                everything = np.concatenate(list(rotating.values()))
                pools[None] = Pool(f"{self._num_datasets}/single", nothing, everything, reg_per_epoch, None)
            else:
                quotas = dict(zip(rotating, shares, strict=True))
        for bucket in sorted({*always, *quotas}):
            pools[bucket] = Pool(
                f"{self._num_datasets}/{bucket[0]}x{bucket[1]}",
                always.get(bucket, nothing),
                rotating.get(bucket, nothing),
                quotas.get(bucket, 0),
                batch_size,
            )
        return pools

    def _chosen(self, subsets: range, *, is_reg: bool) -> list[int]:
        return [
            index
            for subset in subsets
            if self.subsets[subset].folder.is_reg == is_reg
            for index in self._images_of_subset[subset]
        ]

    def _repeats(self, image_index: int) -> int:
        return self.subsets[self.images[image_index].subset].folder.num_repeats

    def _number(self, image_index: int, showings: int, buckets: dict[Size, list[np.ndarray]]) -> None:
        """Give the image's showings the next sample ids, and note them under its bucket."""
        ids = np.arange(self._num_samples, self._num_samples + showings)
        self._num_samples += showings
        self._image_of_sample.append(np.full(showings, image_index, dtype=np.int64))
        buckets.setdefault(self.images[image_index].placement.bucket_wh, []).append(ids)


def _joined(buckets: dict[Size, list[np.ndarray]]) -> dict[Size, np.ndarray]:
    return {bucket: np.concatenate(ids) for bucket, ids in sorted(buckets.items())}
