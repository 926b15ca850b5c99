"""Pixels: the official preprocessing's geometry, Pillow's levels, transparency, orientation, limits, broken files."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.images import MIN_SIDE, ImageRule, decode_image, read_size
from megatron_vl.data.sample import SampleError
from tests.support.tiny_data import picture

RULE = ImageRule(size=32, mean=(0.48145466, 0.4578275, 0.40821073), max_pixels=10_000)
BACKGROUND = (122, 116, 104)
ORIENTATION = 0x0112
# What turns a stored picture upright, by EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=file_format, **options)
    return file.getvalue()


def decode(data: bytes, rule: ImageRule = RULE) -> np.ndarray:
    return decode_image(data, rule, "key", "shard-000000.tar")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Black and white at random: the sharpest edges that there are."""
    pixels = np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return Image.fromarray(pixels)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def padded_by_pillow(image: Image.Image, rule: ImageRule) -> np.ndarray:
    """[3, size, size], one axis after the other: the width, unless it has to grow where the height shrinks."""
    width, height = (max(int(side / max(image.size) * rule.size), MIN_SIDE) for side in image.size)
    grows = width >= image.width and height < image.height
    between = (image.width, height) if grows else (width, image.height)
    bicubic = Image.Resampling.BICUBIC
    square = Image.new("RGB", (rule.size, rule.size), rule.background)
    resized = image.resize(between, bicubic).resize((width, height), bicubic)
    square.paste(resized, ((rule.size - width) // 2, (rule.size - height) // 2))
    return np.asarray(square).transpose(2, 0, 1)


@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.sampled_from([28, 32, 100]))
@settings(max_examples=60)
def test_pixels_are_pillow_s_within_two_levels(width: int, height: int, size: int) -> None:
    rule, image = ImageRule(size=size, mean=RULE.mean, max_pixels=100_000), noise(width, height, width)
    difference = np.abs(decode(encode(image), rule).astype(int) - padded_by_pillow(image, rule))
    assert difference.max() <= 2


@pytest.mark.parametrize("size", [384, 1024])
def test_a_photograph_s_pixels_are_pillow_s_but_for_one_in_a_hundred(size: int) -> None:
    rule = ImageRule(size=size, mean=RULE.mean, max_pixels=1_000_000)
    photograph = Image.fromarray(skimage.data.coffee())
    difference = decode(encode(photograph), rule).astype(int) - padded_by_pillow(photograph, rule)
    assert np.abs(difference).mean() < 0.01


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 5000), (5000, 1), (5, 2000), (2000, 5)])
def test_the_smallest_and_the_longest(size: tuple[int, int]) -> None:
    image = noise(*size)
    difference = np.abs(decode(encode(image)).astype(int) - padded_by_pillow(image, RULE))
    assert difference.max() <= 2


@given(width=st.integers(1, 90), height=st.integers(1, 90))
@settings(max_examples=40)
def test_the_long_side_fills_the_square_and_the_rest_is_background(width: int, height: int) -> None:
    """White pictures: where white is, is the picture."""
    pixels = decode(encode(Image.new("RGB", (width, height), "white")))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 32, 32))
    is_picture = (pixels == 255).all(axis=0)
    assert (pixels[:, ~is_picture].T == BACKGROUND).all()
    rows, columns = np.flatnonzero(is_picture.any(axis=1)), np.flatnonzero(is_picture.any(axis=0))
    long_side = max(width, height)
    for side, filled in ((height, rows), (width, columns)):
        length = max(int(side / long_side * 32), 14)
        assert (filled[0], len(filled)) == ((32 - length) // 2, length)
    assert is_picture.sum() == len(rows) * len(columns)


def test_sides_truncate_as_the_official_code_does() -> None:
    rule = ImageRule(size=384, mean=(0.5, 0.5, 0.5), max_pixels=1_000_000)
    pixels = decode(encode(Image.new("RGB", (1000, 333), "white")), rule)
    assert int((pixels[0, :, 0] == 255).sum()) == 127


def test_a_square_of_the_right_size_is_untouched() -> None:
    data = picture(32, 32)
    np.testing.assert_array_equal(decode(data).transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(data))))


def test_transparency_shows_white() -> None:
    rgba = np.zeros((32, 32, 4), dtype=np.uint8)
    rgba[:, :16] = (200, 0, 0, 255)
    pixels = decode(encode(Image.fromarray(rgba)))
    assert pixels[:, 5, 5].tolist() == [200, 0, 0]
    assert pixels[:, 5, 25].tolist() == [255, 255, 255]


def test_a_transparent_palette_entry_shows_white() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 0, 90, 0])
    image.paste(0, (0, 0, 16, 32))
    pixels = decode(encode(image, transparency=0))
    assert pixels[:, 5, 5].tolist() == [255, 255, 255]
    assert pixels[:, 5, 25].tolist() == [0, 90, 0]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((32, 32), 0x8040, dtype=np.uint16))
    assert decode(encode(image))[:, 3, 3].tolist() == [128, 128, 128]


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    row = b"\0" + struct.pack(">3H", 0x8040, 0x01FF, 0xFF00) * 32
    header = struct.pack(">2I5B", 32, 32, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * 32)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)
    assert decode(data)[:, 3, 3].tolist() == [0x80, 0x01, 0xFF]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_counts(file_format: str) -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    data = encode(red, file_format, save_all=True, append_images=[blue], duration=10, lossless=True)
    assert decode(data)[:, 3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_a_jpeg_has_pillow_s_pixels(mode: str, options: dict[str, object]) -> None:
    data = encode(noise(32, 32).convert(mode), "JPEG", **options)
    theirs = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode(data).transpose(1, 2, 0), np.asarray(theirs))


def test_a_damaged_jpeg_that_pillow_still_reads_has_its_pixels() -> None:
    data = encode(noise(32, 32), "JPEG")
    damaged = data[:-2] + bytes(9) + data[-2:]
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        simplejpeg.decode_jpeg(damaged)
    theirs = Image.open(io.BytesIO(damaged)).convert("RGB")
    np.testing.assert_array_equal(decode(damaged).transpose(1, 2, 0), np.asarray(theirs))


def test_a_jpeg_whose_header_is_read_in_two_ways_is_not_decoded_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data: (60_000, 60_000, "YCbCr", "420"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: pytest.fail("decoded"))
    assert (decode(encode(Image.new("RGB", (32, 32), "white"), "JPEG")) == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    data = encode(Image.new("RGB", (32, 32), "white").convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert (decode(data) == 255).all()


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    orientation=st.sampled_from(sorted(UPRIGHT)),
    file_format=st.sampled_from(["PNG", "JPEG"]),
)
@settings(max_examples=60)
def test_an_orientation_gives_the_pixels_of_a_file_that_was_turned(
    width: int, height: int, orientation: int, file_format: str
) -> None:
    data = encode(noise(width, height), file_format, exif=oriented(orientation))
    turned = Image.open(io.BytesIO(data)).transpose(UPRIGHT[orientation])
    assert read_size(data) == turned.size
    np.testing.assert_array_equal(decode(data), decode(encode(turned)))


@pytest.mark.parametrize("orientation", [0, 9, 60_000])
def test_an_orientation_that_does_not_exist_is_none(orientation: int) -> None:
    image = noise(40, 20)
    data = encode(image, exif=oriented(orientation))
    assert read_size(data) == (40, 20)
    np.testing.assert_array_equal(decode(data), decode(encode(image)))


def test_an_image_beyond_the_pixel_limit_is_refused_on_its_header() -> None:
    """The pixel data is cut off: decoding it first would be another error."""
    data = encode(Image.new("RGB", (200, 51)))[:60]
    with pytest.raises(
        SampleError, match=r"key.*shard-000000.tar: image beyond the pixel limit: 200 x 51 pixels"
    ):
        decode(data)
    decode(picture(100, 100))  # exactly the limit


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", picture()[:-30], picture(file_format="JPEG")[:200], picture(file_format="BMP")]
)
def test_what_cannot_be_decoded_is_an_error_that_names_the_sample(data: bytes) -> None:
    with pytest.raises(
        SampleError, match=r"sample 'key' in shard-000000.tar: image cannot be decoded"
    ) as caught:
        decode(data)
    assert caught.value.cause == "image cannot be decoded"
    assert " object at 0x" not in str(caught.value)


def test_an_exception_of_any_kind_is_the_sample_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow lets struct.error, SyntaxError and TypeError out, for one damaged file in a thousand."""

    def fail(file: ImageFile.ImageFile) -> None:
        raise struct.error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(SampleError, match="image cannot be decoded"):
        decode(picture())


@given(file_format=st.sampled_from(["PNG", "JPEG", "WEBP"]), cut=st.integers(0, 300), data=st.data())
@settings(max_examples=150)
def test_whatever_bytes_come_only_sample_errors_come_out(
    file_format: str, cut: int, data: st.DataObject
) -> None:
    damaged = bytearray(picture(file_format=file_format))
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=4)
    ):
        damaged[position % len(damaged)] = value
    damaged = damaged[: len(damaged) - cut]
    read_size(bytes(damaged))
    with contextlib.suppress(SampleError):
        assert decode(bytes(damaged)).shape == (3, 32, 32)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_size_is_read_from_the_header(file_format: str) -> None:
    assert read_size(picture(21, 13, file_format=file_format)) == (21, 13)
    assert read_size(b"no image") == (0, 0)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_no_pixel_is_decoded_for_a_size(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a small file of many pixels would fill the memory of whoever indexes it."""
    data = encode(noise(21, 13), file_format, exif=oriented(6))
    plain = encode(noise(21, 13), file_format)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda file: pytest.fail("decoded"))
    assert (read_size(data), read_size(plain)) == ((13, 21), (21, 13))


def test_image_tokens_are_a_fixed_number_each() -> None:
    assert ImageTokens(tokens_per_image=36).count(np.zeros((3, 2), dtype=np.int32)).tolist() == [36, 36, 36]
