"""What seems wrong with the training data, judged from the findings, with what can be done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter

import numpy as np

from library.data.columns import PathsAt
from library.data.findings import Findings, enlargements, kept_part, samples_in_short_batches
from library.data.loading import TrainImage
from library.data.options import BucketOptions, MaskOptions, SourceOptions
from library.data.sources import kinds_passed_over, with_folder
from library.data.train_images import TrainImages
from library.train.report import Gallery, Picture, Problem
from library.wording import counted

MUCH_CROPPED = 0.25  # share of a picture: its subject may be cut
MUCH_ENLARGED = 1.25  # times as long: what is learned is blur
MANY = 0.1  # share of the images: below it a peculiarity is only noted
MANY_SHORT = 0.2  # share of an epoch's samples in batches that are at most half full
LISTED = 200  # pictures of a problem


def data_problems(findings: Findings, source: SourceOptions, masks: MaskOptions) -> Iterator[Problem]:
    """Warnings and notes; the options are those of the command line, for what to do about it."""
    yield from _unusable(findings, source)
    yield from _captions(findings)
    yield from _copies(findings)
    yield from _sizes(findings)
    yield from _short_batches(findings)
    yield from _turned_or_transparent(findings, masks)


def picture_of(findings: Findings, image: TrainImage, note: str = "") -> Picture:
    """A picture with its note, and the frame of the cut unless that is another one each time."""
    return Picture(image.record.path, note, None if findings.cut_moves(image) else kept_part(image.placement))


def _gallery(findings: Findings, paths: Sequence[str], note: Callable[[str], str] = lambda path: "") -> Gallery:
    pictures = (
        picture_of(findings, findings.images[path], note(path))
        if path in findings.images
        else Picture(path, note(path))
        for path in paths[:LISTED]
    )
    return Gallery.of(pictures, more=max(0, len(paths) - LISTED))


def _unusable(findings: Findings, source: SourceOptions) -> Iterator[Problem]:
    broken = findings.scan.broken
    if broken:
        is_refused = source.on_bad_image == "stop"
        fate = "a run would stop here" if is_refused else f"{'is' if len(broken) == 1 else 'are'} left out"
        yield Problem(
            True,
            f"{counted(len(broken), 'image')} can't be read{':' if is_refused else ' and'} {fate}",
            "mend or remove them" + ("; --on_bad_image skip trains without them" if is_refused else ""),
            lines=tuple(f"{with_folder(path)}: {reason}" for path, reason in sorted(broken.items())[:LISTED]),
            more=max(0, len(broken) - LISTED),
        )
    others = findings.passed_over
    if others:
        yield Problem(
            True,
            f"{counted(len(set(others)), 'file')} beside the images passed over, which are not of a kind that is read "
            f"({kinds_passed_over(others)})",
            "convert them to PNG, JPEG or WebP if they belong to the training",
            lines=tuple(map(with_folder, sorted(set(others))[:LISTED])),
            more=max(0, len(set(others)) - LISTED),
        )
    unnamed = findings.unnamed
    if unnamed:
        yield Problem(
            True,
            f"{counted(len(unnamed), 'image')} passed over: in the folder of a metadata file that does not name "
            f"{'it' if len(unnamed) == 1 else 'them'}",
            "make the metadata anew if they belong to the training",
            lines=tuple(map(with_folder, unnamed[:LISTED])),
            more=max(0, len(unnamed) - LISTED),
        )


# ---------------------------------------------------------------------------------------------- captions


def _captions(findings: Findings) -> Iterator[Problem]:
    total = len(findings.images)
    bare = [path for folder in findings.folders if not folder.class_tokens for path in folder.uncaptioned]
    if bare:
        yield Problem(
            True,
            f"{len(bare)} of {counted(total, 'image')} have no caption and are trained on the empty one",
            f"write caption files ({_extension(findings)}), or name the folder <repeats>_<class>",
            _gallery(findings, bare),
        )
    yield from _odd_caption_files(findings)
    empty = [path for folder in findings.folders for path in folder.empty_captions]
    if empty:
        yield Problem(
            True,
            f"{counted(len(empty), 'caption file')} without text",
            "write what the picture shows",
            _gallery(findings, empty),
        )
    by_class = [folder for folder in findings.folders if folder.class_tokens and folder.uncaptioned]
    mixed = [folder for folder in by_class if len(folder.uncaptioned) < len(folder.images)]
    if mixed:
        missing = [path for folder in mixed for path in folder.uncaptioned]
        classes = " and ".join(dict.fromkeys(f"{folder.class_tokens!r}" for folder in mixed))
        yield Problem(
            True,
            f"{counted(len(missing), 'image')} without a caption, unlike others of the same folder: trained on "
            f"{classes}",
            "write what the picture shows",
            _gallery(findings, missing),
        )
    if number := findings.captions.num_cut_off:
        limit, longest = findings.token_limit, findings.captions.longest
        larger = next((size for size in (150, 225) if size > limit and size >= longest), 225)
        way_out = f"--max_token_length {larger} reads more, or shorten them" if limit < 225 else "shorten them"
        lengths = {
            long.record.path: f"{long.tokens} tokens, {long.tokens - limit} cut off: ... {long.caption[-60:]}"
            for long in findings.captions.longest_captions
            if long.tokens > limit
        }
        gallery = _gallery(findings, list(lengths), lengths.__getitem__)
        yield Problem(
            True,
            f"{counted(number, 'caption')} longer than the {limit} tokens that are read; the end is cut off",
            way_out,
            replace(gallery, more=number - len(gallery.pictures)),
        )


def _odd_caption_files(findings: Findings) -> Iterator[Problem]:
    if alone := findings.captions_alone:
        yield Problem(
            True,
            f"{counted(len(alone), 'caption file')} without an image",
            "look for the images, or remove the files",
            lines=tuple(map(with_folder, alone[:LISTED])),
            more=max(0, len(alone) - LISTED),
        )
    if sharing := findings.sharing_captions:
        yield Problem(
            True,
            f"{counted(len(sharing), 'image')} of the same name but for the extension: trained with one caption file",
            "rename those that are other pictures, and remove copies",
            _gallery(findings, sharing),
        )


def _extension(findings: Findings) -> str:
    return next((folder.caption_extension for folder in findings.folders if folder.caption_extension), ".txt")


# ---------------------------------------------------------------------------------------------- copies


def _copies(findings: Findings) -> Iterator[Problem]:
    if findings.equal:
        extra = sum(map(len, findings.equal)) - len(findings.equal)
        differing = sum(len({_caption(findings, path) for path in group}) > 1 for group in findings.equal)
        captions = f"; in {differing} of the groups the captions differ" if differing else ""
        yield Problem(
            True,
            f"{counted(extra, 'image file')} equal to another one, byte for byte{captions}",
            "remove the copies: their picture is learned more than the others; repeats are there for that",
            _groups(findings, findings.equal),
        )
    if findings.alike:
        number = sum(map(len, findings.alike))
        groups = counted(len(findings.alike), "group")
        yield Problem(
            False,
            f"{number} images in {groups} look alike: resized or saved again, or frames of one scene",
            "keep the best of each group, unless they are meant",
            _groups(findings, findings.alike),
        )


def _caption(findings: Findings, path: str) -> str:
    return findings.images[path].record.caption if path in findings.images else ""


def _groups(findings: Findings, groups: Iterable[Sequence[str]]) -> Gallery:
    made = []
    for group in groups:
        images = [findings.images[path] for path in group if path in findings.images]
        made.append(tuple(picture_of(findings, image, "{}x{}".format(*image.record.size_wh)) for image in images))
    return Gallery(tuple(made[:LISTED]), is_grouped=True, more=max(0, len(made) - LISTED))


# ---------------------------------------------------------------------------------------------- sizes


def _most(images: TrainImages, values_M: np.ndarray, limit: float) -> Sequence[str]:
    """The paths of images whose value is above the limit, the highest first."""
    places = np.flatnonzero(values_M > limit)
    return PathsAt(images.paths, places[np.argsort(-values_M[places], kind="stable")])


def _size(findings: Findings, path: str) -> str:
    return "{}x{}".format(*findings.images[path].record.size_wh)


def _sizes(findings: Findings) -> Iterator[Problem]:
    images = findings.whole
    if images is None:
        return
    cropped_M, factor_M = images.by_placement(attrgetter("cropped_share")), enlargements(images)
    worst = _most(images, cropped_M, MUCH_CROPPED)
    if worst:
        bucket = findings.bucket_of(worst[0])
        advice = (
            "crop them yourself, or try a larger --max_bucket_reso or --bucket_reso_steps below "
            f"{bucket.bucket_reso_steps}"
            if bucket.enable_bucket
            else "--enable_bucket trains each picture near its own shape"
        )
        lose = "loses" if len(worst) == 1 else "lose"
        yield Problem(
            len(worst) > MANY * len(images),
            f"{counted(len(worst), 'image')} {lose} more than {MUCH_CROPPED:.0%} of the picture to the cut",
            advice,
            _gallery(findings, worst, lambda path: f"{cropped_M[images.find(path)]:.0%} cut away"),
        )
    small = _most(images, factor_M, MUCH_ENLARGED)
    if small:
        yield Problem(
            True,
            f"{counted(len(small), 'image')} too small: enlarged more than {MUCH_ENLARGED} times",
            "find larger originals, remove them, or train at a lower --resolution"
            + _no_upscale(findings.bucket_of(small[0])),
            _gallery(findings, small, lambda path: f"{factor_M[images.find(path)]:.1f} x, {_size(findings, path)}"),
        )


def _no_upscale(bucket: BucketOptions) -> str:
    """The way not to enlarge, with all that it needs."""
    if bucket.enable_bucket and bucket.bucket_no_upscale:
        return ""
    return f"; {'' if bucket.enable_bucket else '--enable_bucket '}--bucket_no_upscale never enlarges"


def _short_batches(findings: Findings) -> Iterator[Problem]:
    samples = sum(bucket.samples for bucket in findings.buckets)
    short = samples_in_short_batches(findings.buckets)
    if samples and short / samples > MANY_SHORT:
        rare = [bucket for bucket in findings.buckets if bucket.last_batch <= bucket.batch_size / 2]
        yield Problem(
            True,
            f"{short} of the {samples} pictures of an epoch are in batches that are at most half full",
            "a batch has pictures of one bucket only: use a smaller batch, or fewer buckets by a larger "
            "--bucket_reso_steps",
            lines=tuple(
                f"{width}x{height}: {bucket.samples} per epoch, the last batch has {bucket.last_batch} of "
                f"{bucket.batch_size}"
                for bucket in rare
                for width, height in [bucket.size_wh]
            ),
        )


def _turned_or_transparent(findings: Findings, masks: MaskOptions) -> Iterator[Problem]:
    if findings.rotated:
        yield Problem(
            False,
            f"{counted(len(findings.rotated), 'photo')} turned or mirrored as the Exif orientation says",
            "",
            _gallery(
                findings, findings.rotated, lambda path: f"orientation {findings.images[path].record.orientation}"
            ),
        )
    if findings.transparent:
        number = counted(len(findings.transparent), "image")
        yield Problem(
            not masks.alpha_mask,
            f"{number} with transparent parts: left out of the loss"
            if masks.alpha_mask
            else f"{number} with transparent parts: placed on white",
            "" if masks.alpha_mask else "--alpha_mask leaves those parts out of the loss",
            _gallery(findings, findings.transparent),
        )
