"""Headers against Pillow, and the way from a file to training pixels."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from library.data.buckets import Placement, random_cut
from library.data.headers import BadImage, Header, read_header
from library.data.images import (
    RESAMPLING,
    augment_color,
    cut_out,
    find_broken,
    load_picture,
    place,
    resize,
    to_tensor,
)
from library.data.listing import is_image
from tests.tiny_data import tiny_image

FORMATS = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}, "webp_lossy.webp": {"quality": 95}, "bmp": {}}


def written(folder, name="picture.png", size=(40, 24), orientation=None, **options):
    path = folder / name
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        options["exif"] = exif
    tiny_image(size).save(path, **options)
    return str(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_header_of_every_format(tmp_path, kind):
    path = written(tmp_path, f"picture.{kind}", (41, 24), **FORMATS[kind])
    assert read_header(path) == Header((41, 24), 1, Path(path).stat().st_size)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "webp_lossy.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_pillow_applies_it(tmp_path, kind, orientation):
    path = written(tmp_path, f"picture.{kind}", orientation=orientation, **FORMATS[kind])
    header = read_header(path)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert header.orientation == orientation
    loaded = load_picture(path, header.orientation).rgb_HWC
    assert header.size_wh == (loaded.shape[1], loaded.shape[0])
    assert np.array_equal(loaded, upright)


def test_orientation_in_xmp(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = written(tmp_path, "picture.jpg", xmp=xmp)
    assert read_header(path)[:2] == ((24, 40), 6)


def test_size_behind_a_long_first_part(tmp_path):
    path = written(tmp_path, "picture.jpg", icc_profile=b"x" * 200_000, orientation=8)
    assert read_header(path)[:2] == ((24, 40), 8)


def test_progressive_grey_and_formats_left_to_pillow(tmp_path):
    tiny_image((30, 20)).convert("L").save(tmp_path / "grey.jpg", progressive=True)
    tiny_image((30, 20)).save(tmp_path / "really_a_tiff.png", format="TIFF")
    tiny_image((30, 20)).save(tmp_path / "really_a_jpeg.png", format="JPEG")
    for name in ("grey.jpg", "really_a_tiff.png", "really_a_jpeg.png"):
        assert read_header(str(tmp_path / name)).size_wh == (30, 20)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(tmp_path):
    path = written(tmp_path, "picture.avif", orientation=6)
    header = read_header(path)
    assert header[:2] == ((24, 40), 6) and load_picture(path, 6).rgb_HWC.shape == (40, 24, 3)
    assert is_image(path) and not find_broken([path])


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
def test_every_cut_is_noticed_by_header_or_check(tmp_path, kind):
    whole = Path(written(tmp_path, f"whole.{kind}", (64, 64))).read_bytes()
    cut = str(tmp_path / f"cut.{kind}")
    for length in (0, 1, 9, 20, 30, len(whole) // 2, len(whole) - 40):
        with open(cut, "wb") as file:
            file.write(whole[:length])
        try:
            read_header(cut)
        except BadImage as error:
            assert str(error)
        else:
            assert list(find_broken([cut])) == [cut], length


def test_damaged_bytes_inside_a_png(tmp_path):
    path = written(tmp_path, "picture.png", (64, 64))
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 0xFF
    Path(path).write_bytes(content)
    assert read_header(path).size_wh == (64, 64)
    assert list(find_broken([path, written(tmp_path, "well.png")])) == [path]


def test_no_image_and_no_file(tmp_path):
    (tmp_path / "text.png").write_text("this is not an image")
    with pytest.raises(BadImage, match="not an image"):
        read_header(str(tmp_path / "text.png"))
    with pytest.raises(BadImage, match="No such file"):
        read_header(str(tmp_path / "nowhere.png"))


def test_the_reason_does_not_repeat_the_path(tmp_path):
    with pytest.raises(BadImage, match="^No such file or directory$"):
        load_picture(str(tmp_path / "nowhere.png"))


# ---------------------------------------------------------------------------------------------- odd PNG files


def png(width, height, pixels, colour_type=2):
    """A PNG file whose checksums hold."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


ROWS = zlib.compress(bytes(64 * (1 + 3 * 96)))


@pytest.mark.parametrize(
    "content",
    [
        png(96, 64, zlib.compress(bytes(97))),
        png(96, 64, b"garbage garbage"),
        png(96, 64, ROWS, colour_type=5),
        png(0, 64, ROWS),
        png(2**31 - 1, 2**31 - 1, ROWS),
        png(30_000, 20_000, ROWS),
    ],
    ids=["few pixels", "no pixels", "colour type", "no width", "huge", "large"],
)
def test_broken_inside_right_checksums(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    try:
        read_header(str(path))
    except BadImage as error:
        assert "pixels" in str(error)
    else:
        assert list(find_broken([str(path)])) == [str(path)]


def test_the_same_file_with_its_pixels_is_well(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(96, 64, ROWS))
    assert not find_broken([str(path)]) and load_picture(str(path)).rgb_HWC.shape == (64, 96, 3)


def test_a_long_text_in_a_png(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    path = written(tmp_path, pnginfo=text)
    assert not find_broken([path]) and load_picture(path).rgb_HWC.shape == (24, 40, 3)


def test_a_picture_above_the_limit_of_pillow(tmp_path, recwarn):
    """196 million pixels, of one bit each."""
    path = str(tmp_path / "large.png")
    Image.new("1", (14_000, 14_000)).save(path)
    assert read_header(path).size_wh == (14_000, 14_000)
    assert not find_broken([path]) and not recwarn.list


def test_a_picture_too_large_is_refused_before_it_is_decoded(tmp_path):
    with pytest.raises(BadImage, match="30000x20000 pixels; 20000x20000 is the largest"):
        load_picture(png(30_000, 20_000, ROWS))


# ---------------------------------------------------------------------------------------------- pixels


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def test_transparent_parts_become_white():
    rgba = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    assert load_picture(saved(rgba)).rgb_HWC[0].tolist() == [[200, 0, 0], [255, 255, 255], [204, 204, 204]]


def test_transparent_palette_and_colour_key():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert load_picture(saved(palette, transparency=1)).rgb_HWC[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    keyed = Image.new("RGB", (1, 1), (9, 9, 9))
    assert load_picture(saved(keyed, transparency=(9, 9, 9))).rgb_HWC[0].tolist() == [[255, 255, 255]]


def test_sixteen_bits_of_grey_keep_their_range():
    values = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
    assert load_picture(saved(Image.fromarray(values))).rgb_HWC[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("largest", [1.0, 255.0])
def test_grey_in_floating_point_keeps_its_range(largest):
    content = io.BytesIO()
    Image.fromarray(np.float32([[0, 0.2 * largest, largest, np.nan]])).save(content, "TIFF")
    assert load_picture(content.getvalue()).rgb_HWC[0, :, 0].tolist() == [0, 51, 255, 0]


def test_shrinking_averages_and_enlarging_is_smooth():
    checks = np.indices((8, 8)).sum(0) % 2 * 255
    checks = np.repeat(checks[..., None], 3, axis=2).astype(np.uint8)
    assert set(resize(checks, (4, 4)).ravel().tolist()) <= {127, 128}
    steps = np.repeat(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8), 2, axis=0)
    assert len(set(resize(steps, (16, 16))[0, :, 0].tolist())) > 4  # by area there would be only two values
    assert resize(checks, (8, 8)) is checks


@pytest.mark.parametrize("name", ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"])
@pytest.mark.parametrize("size", [(20, 12), (80, 48), (20, 96)])
def test_every_way_of_resizing(name, size):
    image = np.asarray(tiny_image((40, 24)))
    resized = resize(image, size, name)
    assert resized.shape == (size[1], size[0], 3) and resized.dtype == np.uint8
    smooth = np.abs(resized.mean((0, 1)) - image.mean((0, 1)))
    assert smooth.max() < 8, "the picture as a whole stays as bright as it was"


def test_ways_of_resizing_differ_and_synonyms_do_not():
    image = np.asarray(tiny_image((40, 24)))
    results = {name: resize(image, (23, 17), name).tobytes() for name in (*RESAMPLING, "area")}
    assert results["cubic"] == results["bicubic"] and results["linear"] == results["bilinear"]
    assert len(set(results.values())) == len(results) - 2
    assert resize(image, (23, 17)).tobytes() == results["area"]
    assert resize(image, (23, 30)).tobytes() == resize(image, (23, 30), "lanczos").tobytes()


@pytest.mark.parametrize(
    ("mode", "kind", "has_alpha"),
    [
        ("RGB", "png", False),
        ("RGBA", "png", True),
        ("LA", "png", True),
        ("L", "png", False),
        ("RGB", "webp", False),
        ("RGBA", "webp", True),
        ("RGB", "jpg", False),
        ("RGB", "bmp", False),
    ],
)
@pytest.mark.parametrize("lossless", [False, True])
def test_headers_tell_of_transparency(tmp_path, mode, kind, has_alpha, lossless):
    image = tiny_image((41, 24)).convert(mode)
    if has_alpha:
        image.putalpha(Image.new("L", image.size, 100))
    image.save(tmp_path / f"a.{kind}", **({"lossless": lossless} if kind == "webp" else {}))
    assert read_header(str(tmp_path / f"a.{kind}")).has_alpha == has_alpha
    assert (load_picture(str(tmp_path / f"a.{kind}")).alpha_HW is not None) == has_alpha


def test_headers_tell_of_a_transparent_colour(tmp_path):
    tiny_image((8, 8)).convert("P").save(tmp_path / "a.png", transparency=3)
    assert read_header(str(tmp_path / "a.png")).has_alpha


def test_alpha_is_turned_upright_with_its_picture(tmp_path):
    image = tiny_image((40, 24)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 24)))
    image.save(tmp_path / "a.png")
    picture = load_picture(str(tmp_path / "a.png"), 6)
    assert picture.rgb_HWC.shape == (40, 24, 3) and picture.alpha_HW.shape == (40, 24)
    assert np.array_equal(picture.alpha_HW, np.rot90(np.asarray(image.getchannel("A")), -1))


def test_crop_in_the_centre_and_at_random():
    image = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    placement = Placement((9, 10), (12, 10))
    assert np.array_equal(place(image, placement), image[:, 1:10])
    crops = {cut_out(image, random_cut(placement, random.Random(seed)))[0, 0, 0] for seed in range(40)}
    assert crops == {0, 3, 6, 9}


def test_tensor_range_and_order():
    pixels = to_tensor(np.array([[[0, 127, 255]]], dtype=np.uint8))
    assert pixels.shape == (3, 1, 1)
    assert pixels.flatten().tolist() == pytest.approx([-1, -0.00392157, 1])


def test_colour_augmentation_is_slight_rare_and_true_to_rgb():
    orange = np.full((8, 8, 3), (240, 120, 20), dtype=np.uint8)
    results = [augment_color(orange, random.Random(seed)) for seed in range(300)]
    changed = [result for result in results if not np.array_equal(result, orange)]
    assert 60 < len(changed) < 130
    for result in changed:  # still an orange: a shift of hue in BGR order would turn it towards blue
        red, green, blue = result[0, 0].tolist()
        assert red > green > blue - 40 and abs(red - 240) < 80 and blue < 80
