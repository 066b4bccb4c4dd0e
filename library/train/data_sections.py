"""The training data as sections of a report: folders, buckets, captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from library.data.class_folders import passed_over_folders
from library.data.findings import BucketUse, Findings, FolderUse, Regularisation, enlargement
from library.data.loading import TrainImage
from library.data.options import SourceOptions
from library.train.data_problems import picture_of
from library.train.report import Bar, Block, Facts, Gallery, Picture, Section, Table, Text
from library.wording import counted

PICTURES = 200  # of all buckets together
CAPTION_LETTERS = 160
LONGEST = 5  # captions listed for their length


def data_sections(findings: Findings, source: SourceOptions) -> list[Section]:
    """What was found, and what becomes of it."""
    return [_folders(findings, source), _buckets(findings), _captions(findings)]


# ---------------------------------------------------------------------------------------------- folders


def _folders(findings: Findings, source: SourceOptions) -> Section:
    several = len({folder.dataset for folder in findings.folders}) > 1
    header = ("folder", "images", "x repeats", "= per epoch", "used as", "captions")
    rows = tuple(_folder_row(folder, several) for folder in findings.folders)
    blocks: list[Block] = [Table(header, rows, numbers=(1, 2, 3), brief=True)]
    if source.dataset_class:
        blocks = [Facts((("batches from", f"{source.dataset_class} (--dataset_class)"),), brief=True)]
    bases = [] if _replaced(source) else [base for base in (source.train_data_dir, source.reg_data_dir) if base]
    skipped = [(str(path), why) for base in bases for path, why in passed_over_folders(base)]
    if skipped:
        blocks.append(Table(("passed over", "why"), tuple(skipped), brief=True))
    if findings.regularisation:
        blocks.append(
            Facts(
                tuple(
                    (f"regularisation{_of_dataset(reg.dataset, several)}",
                     _how_shown(reg))
                    for reg in findings.regularisation
                ),
                brief=True,
            )
        )  # fmt: skip
    if unread := len(findings.images) - findings.num_looked_at:
        why = "caches beside them show that they can be read; they are not compared with others"
        blocks.append(Facts((("not looked at", f"{counted(unread, 'image')}: {why}"),)))
    if findings.num_validation:
        held_out = f"{counted(findings.num_validation, 'image')} held out: measured, not trained on"
        blocks.append(Facts((("validation", held_out),), brief=True))
    return Section("Folders", tuple(blocks))


def _replaced(source: SourceOptions) -> bool:
    """Whether other options name the images."""
    return bool(source.dataset_config or source.in_json or source.dataset_class)


def _folder_row(folder: FolderUse, several: bool) -> tuple[str, ...]:
    images = len(folder.images)
    kind = ("regularisation" if folder.is_reg else "training") + _of_dataset(folder.dataset, several)
    captioned = images - len(folder.uncaptioned)
    captions = f"{captioned} {folder.caption_extension}" if folder.caption_extension else counted(captioned, "caption")
    captions = captions if captioned else ""
    if folder.uncaptioned:
        rest = f"{len(folder.uncaptioned)} as {folder.class_tokens!r}" if folder.class_tokens else (
            f"{len(folder.uncaptioned)} without")  # fmt: skip
        captions = f"{captions}, {rest}" if captions else rest
    return (str(folder.source), str(images), str(folder.repeats), str(images * folder.repeats), kind, captions)


def _of_dataset(number: int, several: bool) -> str:
    return f", dataset {number}" if several else ""


def _how_shown(reg: Regularisation) -> str:
    images = f"{reg.with_repeats} ({counted(reg.images, 'image')} x repeats)"
    if not reg.training:
        return f"none of {images}: no training images in their dataset"
    how = _how(reg.per_epoch, reg.with_repeats)
    return f"{reg.per_epoch} per epoch from {images}{how}, to balance {reg.training} training images"


def _how(shown: int, total: int) -> str:
    if shown < total:
        return "; others in the next epochs, until all were shown"
    return "; shown again" if shown > total else ""


# ---------------------------------------------------------------------------------------------- buckets


def _buckets(findings: Findings) -> Section:
    buckets = findings.buckets
    several = len({bucket.dataset for bucket in buckets}) > 1
    header = ("bucket", "images", "per epoch", "batches", "last batch", "cut away", "most", "enlarged")
    rows = tuple(_bucket_row(bucket, several) for bucket in buckets)
    datasets = tuple(
        (f"dataset {use.dataset}" if several else "sizes", f"{use.sizes}, batch size {use.batch_size}")
        for use in findings.datasets
    )
    blocks: list[Block] = [
        Facts(datasets, brief=True),
        Table(header, rows, numbers=tuple(range(1, len(header))), brief=True),
    ]
    if any(folder.cut_moves for folder in findings.folders):
        blocks.append(Text("Where the cut is another one each time a picture is drawn, no frame shows it."))
    is_regular = np.array([folder.is_reg for folder in findings.folders], bool)  # by subset of the run
    chosen = dict(zip(range(len(buckets)), _shares([len(bucket.images) for bucket in buckets]), strict=True))
    for index, bucket in enumerate(buckets):
        if not chosen[index]:
            continue
        images = bucket.images
        is_reg_M = is_regular[images.subset_M]
        order = np.lexsort((-bucket.shares_M, is_reg_M))
        pictures = [
            picture_of(findings, images[place], _note(images[place], is_reg=bool(is_reg_M[place])))
            for place in _spread(order, chosen[index]).tolist()
        ]
        width, height = bucket.size_wh
        title = f"{width}x{height}{_of_dataset(bucket.dataset, several)}: {counted(len(images), 'image')}"
        blocks.append(Gallery.of(pictures, title, more=len(images) - len(pictures), is_only_shown=True))
    return Section("Buckets", tuple(blocks))


def _bucket_row(bucket: BucketUse, several: bool) -> tuple[str | Bar, ...]:
    width, height = bucket.size_wh
    worst, enlarged = float(bucket.shares_M.max()), bucket.num_enlarged
    last = f"{bucket.last_batch} of {bucket.batch_size}" if bucket.last_batch < bucket.batch_size else "full"
    return (
        f"{width}x{height}{_of_dataset(bucket.dataset, several)}",
        f"{len(bucket.images)}",
        f"{bucket.samples}",
        f"{bucket.batches}",
        last if bucket.samples else "",
        Bar(f"{bucket.cropped:.1%}", bucket.cropped),
        Bar(f"{worst:.1%}", worst),
        f"{enlarged}" if enlarged else "",
    )


def _note(image: TrainImage, *, is_reg: bool) -> str:
    record = image.record
    parts = ["regularisation"] if is_reg else []
    parts += ["{}x{}".format(*record.size_wh), f"{image.placement.cropped_share:.0%} cut"]
    if enlargement(image) > 1:
        parts.append(f"{enlargement(image):.1f} x enlarged")
    if record.orientation != 1:
        parts.append("turned")
    return f"{', '.join(parts)}\n{_short(record.caption)}"


def _shares(counts: Sequence[int]) -> list[int]:
    """How many of each bucket are shown: all, or about equal shares of PICTURES, and at least one."""
    total = sum(counts)
    if total <= PICTURES:
        return list(counts)
    return [min(count, max(1, round(PICTURES * count / total))) if count else 0 for count in counts]


def _spread(places: np.ndarray, number: int) -> np.ndarray:
    """`number` of the places, evenly spread, the first among them."""
    return places[np.arange(number) * len(places) // number]


# ---------------------------------------------------------------------------------------------- captions


def _captions(findings: Findings) -> Section:
    lengths = findings.captions
    if not lengths.num_different:
        return Section("Captions", (Text("No captions."),))
    in_words = f"median {counted(lengths.median, 'token')}, longest {lengths.longest}; {findings.token_limit} are read"
    facts = (("captions", f"{lengths.num_different:,} different; {in_words}"),)
    examples = tuple((f"{tokens}", _short(caption)) for caption, tokens in lengths.examples)
    longest = tuple(
        (f"{long.tokens}", Picture(long.record.path).name, _short(long.caption))
        for long in lengths.longest_captions[:LONGEST]
        if long.record.path in findings.images
    )
    return Section(
        "Captions",
        (
            Facts(facts, brief=True),
            Table(("tokens", "some of them"), examples, numbers=(0,), brief=True),
            Table(("tokens", "the longest", ""), longest, numbers=(0,)),
        ),
    )


def _short(text: str) -> str:
    text = text.replace("\n", " / ")
    return text if len(text) <= CAPTION_LETTERS else f"{text[:CAPTION_LETTERS]}..."
