"""From placed images to samples: numbers them, repeats them, balances regularisation images, forms the pools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from library.data.buckets import Size
from library.data.config import DatasetConfig, SubsetConfig
from library.data.epoch_plan import Pool, registered_repeats, rotation_quotas
from library.data.loading import Samples
from library.data.summary import LoadedDataset
from library.data.train_images import TrainImages


class Assembly:
    """Takes the datasets of a run one after the other; then :meth:`samples` has them all.

    `images` come dataset by dataset and name their subset by its index in `subsets`.
    """

    def __init__(self, images: TrainImages, subsets: Sequence[SubsetConfig]) -> None:
        self.images = images
        self.subsets = subsets
        self._pools: list[Pool] = []
        self._image_of_sample: list[np.ndarray] = []
        self._num_samples = 0
        self._num_datasets = 0
        self._first_of_subset = np.searchsorted(images.subset_M, range(len(subsets) + 1))
        self._repeats_M = np.array([subset.folder.num_repeats for subset in subsets], np.int64)[images.subset_M]
        self._buckets = sorted({placement.bucket_wh for placement in images.placements})
        number_of = {bucket: number for number, bucket in enumerate(self._buckets)}
        self._bucket_M = images.by_placement(lambda placement: number_of[placement.bucket_wh])

    def add(self, config: DatasetConfig, subsets: range) -> LoadedDataset:
        """Form the pools of one dataset, whose subsets these are."""
        train, reg = self._chosen(subsets, is_reg=False), self._chosen(subsets, is_reg=True)
        of_train, of_reg = self._repeats_M[train], self._repeats_M[reg]
        num_train, num_reg = int(of_train.sum()), int(of_reg.sum())
        registered = np.array(registered_repeats(of_reg.tolist(), num_train), np.int64)
        reg_per_epoch = int(registered.sum())
        rotates = reg_per_epoch < num_reg
        always = self._numbered(train, of_train)
        rotating: dict[Size, np.ndarray] = {}
        if rotates:
            rotating = self._numbered(reg, of_reg)
        else:
            for bucket, ids in self._numbered(reg, registered).items():
                always[bucket] = np.concatenate([always[bucket], ids]) if bucket in always else ids
        pools = self._form_pools(config.batch_size, always, rotating, reg_per_epoch)
        self._pools += pools.values()
        self._num_datasets += 1
        return LoadedDataset(
            config,
            tuple(self.images.of_subsets(range(subset, subset + 1)) for subset in subsets),
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

    def _chosen(self, subsets: range, *, is_reg: bool) -> np.ndarray:
        """The places of their images."""
        first = self._first_of_subset
        chosen = [np.arange(first[subset], first[subset + 1]) for subset in subsets
                  if self.subsets[subset].folder.is_reg == is_reg]  # fmt: skip
        return np.concatenate([np.empty(0, np.int64), *chosen])

    def _numbered(self, places: np.ndarray, showings: np.ndarray) -> dict[Size, np.ndarray]:
        """Give each showing of these images the next sample id; the ids by bucket, ascending."""
        count = int(showings.sum())
        self._image_of_sample.append(np.repeat(places.astype(np.int32), showings))
        bucket = np.repeat(self._bucket_M[places].astype(np.int32), showings)
        order = np.argsort(bucket, kind="stable")
        ids = (order + self._num_samples).astype(np.int64 if self._num_samples + count > 2**31 - 1 else np.int32)
        self._num_samples += count
        ends = np.searchsorted(bucket[order], range(1, len(self._buckets)))
        by_bucket = zip(self._buckets, np.split(ids, ends), strict=True) if self._buckets else ()
        return {size: of_size for size, of_size in by_bucket if len(of_size)}
