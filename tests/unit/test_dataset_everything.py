"""With everything random switched on, a batch still depends on nothing but the seed and its position in the run."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from PIL import Image

from library.data.batch import Position
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, MaskOptions
from library.diffusion.noise import NoiseSource
from library.diffusion.options import NoiseOptions
from library.families.sd import StableDiffusion
from library.text.tokens import ClipTokenizer
from tests.tiny_data import tiny_image
from tests.tiny_runs import assert_equal, batches, build, cache

CAPTIONS = ["(cat:1.3), sits ||| {red|blue {sofa|bed}}, night;;sky, lamp ||| photo\nanother [line]", "dog, runs, fast"]
CAPTION = CaptionOptions(
    shuffle_caption=True,
    caption_prefix="{best|good},",
    caption_dropout_rate=0.1,
    caption_tag_dropout_rate=0.2,
    token_warmup_step=0.3,
    keep_tokens=1,
    keep_tokens_separator="|||",
    secondary_separator=";;",
    enable_wildcard=True,
)
NOISE = NoiseOptions(
    noise_offset=0.1,
    noise_offset_random_strength=True,
    adaptive_noise_scale=0.1,
    multires_noise_iterations=4,
    ip_noise_gamma=0.1,
    ip_noise_gamma_random_strength=True,
)
IN_BUCKETS = {"augment": AugmentOptions(True, True, True, resize_interpolation="bicubic")}
AROUND_FACES = {
    "augment": AugmentOptions(True, True, True, face_crop_aug_range=(1.0, 2.0)),
    "bucket": BucketOptions((64, 64)),
}
CACHED = {"augment": AugmentOptions(flip_aug=True, resize_interpolation="box")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six transparent images of several shapes, with a face each and a mask."""
    root = tmp_path_factory.mktemp("data")
    for name in ("train/2_any", "masks"):
        (root / name).mkdir(parents=True)
    for index, size in enumerate([(90, 80), (80, 128), (128, 80)] * 2):
        name = f"image_{index}_45_40_44_30"
        image = tiny_image(size, seed=index).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(size))
        image.save(root / "train" / "2_any" / f"{name}.png")
        (root / "train" / "2_any" / f"{name}.txt").write_text(CAPTIONS[index % 2])
        tiny_image(size, seed=50 + index).save(root / "masks" / f"{name}.jpg")
    return root


def data_of(root, **settings):
    masks = MaskOptions(alpha_mask=True, conditioning_data_dir=root / "masks")
    return build(root / "train", caption=CAPTION, masks=masks, **settings)


def drawn(data, **changes):
    tokenize = partial(StableDiffusion().tokenize, [ClipTokenizer()], windows=2, weighted=True)
    return batches(data, draw=NoiseSource(NOISE, 1), tokenize=tokenize, **changes)


@pytest.mark.parametrize(
    ("settings", "cached"),
    [(IN_BUCKETS, None), (AROUND_FACES, None), (CACHED, "memory"), (CACHED, "disk")],
    ids=["in buckets", "around faces", "in memory", "on disk"],
)
def test_neither_workers_nor_the_start_change_a_batch(folders, settings, cached):
    data = data_of(folders, **settings)
    if cached:
        cache(data, cache_latents_to_disk=cached == "disk")
    alone = drawn(data, epochs=3)
    for other in (drawn(data, epochs=3, workers=1), drawn(data, epochs=3, workers=4)):
        assert list(other) == list(alone)
        for position, batch in other.items():
            assert_equal(batch, alone[position])
    start = Position(2, 2)
    resumed = drawn(data, epochs=3, start=start)
    assert list(resumed) == list(alone)[list(alone).index(start) :]
    for position, batch in resumed.items():
        assert_equal(batch, alone[position])


def test_everything_varies(folders):
    """The test above would also pass if nothing were random."""
    data = data_of(folders, **IN_BUCKETS)
    shown: dict[str, list] = {}
    for batch in drawn(data, epochs=8).values():
        for row, name in enumerate(batch.image_names):
            seen = (
                batch.images_BCHW[row],
                batch.mask_B1HW[row],
                batch.noise_BCHW[row],
                batch.token_ids[0][row],
                batch.noise_offset_B[row],
                batch.offset_noise_BC11[row],
                batch.input_perturbation_BCHW[row],
            )
            shown.setdefault(name, []).append((batch.captions[row], *seen))
    for draws in shown.values():
        assert len({caption for caption, *_ in draws}) > 3
        for field in range(1, len(draws[0])):
            assert sum(not torch.equal(one[field], two[field]) for one, two in pairwise(draws)) > len(draws) // 2
    texts = {caption for draws in shown.values() for caption, *_ in draws}
    assert not any(mark in text for text in texts for mark in ("{", "|||", ";;", "\n"))
    assert any("another [line]" in text for text in texts) and any("night,sky" in text for text in texts)


def test_processes_share_the_masks_of_one(folders):
    halves = [data_of(folders, batch_size=1, **IN_BUCKETS) for _ in range(2)]
    parts = [drawn(data, process_index=index, num_processes=2) for index, data in enumerate(halves)]
    for position, whole in drawn(data_of(folders, batch_size=2, **IN_BUCKETS)).items():
        together = torch.cat([part[position].mask_B1HW for part in parts])
        weights = torch.cat([part[position].token_weights[0] for part in parts])
        assert torch.equal(together[: whole.size], whole.mask_B1HW)
        assert torch.equal(weights[: whole.size], whole.token_weights[0])
