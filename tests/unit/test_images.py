"""Pixels: the official preprocessing's geometry, transparency, orientation, limits, and broken files."""

import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from megatron_vl.data.images import ImageRule, ImageTokens, decode_image, read_size
from megatron_vl.data.sample import SampleError
from tests.support.tiny_data import picture

RULE = ImageRule(size=32, mean=(0.48145466, 0.4578275, 0.40821073), max_pixels=10_000)
BACKGROUND = (122, 116, 104)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=file_format, **options)
    return file.getvalue()


def decode(data: bytes, rule: ImageRule = RULE) -> np.ndarray:
    return decode_image(data, rule, "key", "shard-000000.tar")


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    data = encode(Image.new("RGB", (32, 32), "white").convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert (decode(data) == 255).all()


def test_the_camera_s_orientation_is_applied() -> None:
    image = Image.new("RGB", (32, 16), "black")
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90°
    data = encode(image, "JPEG", exif=exif)
    assert read_size(data) == (16, 32)
    pixels = decode(data)[0]
    assert pixels[8, 16] > 200  # its left half is on top now
    assert pixels[24, 16] < 50


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

    def fail(image: Image.Image) -> Image.Image:
        raise struct.error

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
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


def test_image_tokens_are_a_fixed_number_each() -> None:
    assert ImageTokens(tokens_per_image=36).count(np.zeros((3, 2), dtype=np.int32)).tolist() == [36, 36, 36]
