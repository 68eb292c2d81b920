import hashlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from hanse_common.errors import PhotoError, PhotoMissing, PhotoTooLarge, PhotoUnreadable
from hanse_common.vision.photo import PhotoLimits, check, content_digest, decode, read

LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF")
ALL = ("JPEG", "GIF", *LOSSLESS)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    if kind == "WEBP":
        options.setdefault("lossless", True)
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_size(width: int, height: int) -> bytes:
    """A well-formed PNG whose zeros are packed as tightly as deflate can."""
    pack = zlib.compressobj(9)
    rows = b"".join(pack.compress(bytes(1 + width)) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


HUNDRED_MEGAPIXELS = png_of_size(10_000, 10_000)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def corners() -> Image.Image:
    """Red and green above, blue and yellow below: 32 × 16, unlike any of its own turns."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], dtype=np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((8, 16, 1), dtype=np.uint8)))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_keep_every_pixel(tmp_path, picture, kind):
    path = tmp_path / "photo"
    path.write_bytes(encoded(picture, kind))
    image = decode(path)
    assert image.mode == "RGB" and np.array_equal(pixels(image), pixels(picture))


def test_jpeg_and_gif_are_opened(picture):
    for kind in ("JPEG", "GIF"):
        image = decode(encoded(picture, kind))
        assert (image.mode, image.size) == ("RGB", picture.size)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path, picture, kind, kept):
    data = encoded(picture, kind)
    path = tmp_path / "half"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(PhotoUnreadable, match="half"):
        decode(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.png", b""),
        ("notes.jpg", b"Please order twelve more of the red ones.\n"),
        ("page.png", b"<html><body>not found</body></html>"),
        ("bare.png", b"\x89PNG\r\n\x1a\n"),
        ("bare.jpg", b"\xff\xd8\xff"),
        ("icon.ico", encoded(Image.new("RGB", (16, 16)), "ICO")),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    ],
)
def test_what_is_no_photo_is_refused_in_one_line_that_names_it(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(PhotoUnreadable) as caught:
        decode(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: found ") and "expected" in text and "\n" not in text


def test_a_png_with_a_flipped_bit_is_refused(picture):
    data = bytearray(encoded(picture, "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(PhotoUnreadable, match="damaged PNG"):
        decode(bytes(data))


def test_missing_files_folders_and_special_files_are_refused_without_waiting(tmp_path):
    with pytest.raises(PhotoMissing, match="no such file"):
        decode(tmp_path / "none.png")
    with pytest.raises(PhotoMissing, match="NUL"):
        decode(Path("a\0b"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "secret").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", Path("/dev/zero")):
        with pytest.raises(PhotoUnreadable):
            decode(path)


def test_refusing_leaves_no_file_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(PhotoError):
            read(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_link_to_a_photo_is_the_photo(tmp_path, picture):
    (tmp_path / "real.png").write_bytes(encoded(picture, "PNG"))
    (tmp_path / "link.png").symlink_to("real.png")
    assert np.array_equal(pixels(decode(tmp_path / "link.png")), pixels(picture))


def test_names_that_do_not_print_are_shown_escaped(tmp_path):
    with pytest.raises(PhotoMissing) as caught:
        decode(tmp_path / "a\nb\udcff.png")
    assert "\n" not in str(caught.value) and str(caught.value).encode()


@pytest.mark.parametrize("filter_", ["default", "error", "ignore"])
@pytest.mark.parametrize("bound", [None, Image.MAX_IMAGE_PIXELS])
def test_a_hundred_megapixels_are_refused_before_decoding(tmp_path, monkeypatch, filter_, bound):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "huge.png"
    path.write_bytes(HUNDRED_MEGAPIXELS)
    with warnings.catch_warnings(record=filter_ == "default") as seen:
        warnings.simplefilter(filter_)
        with pytest.raises(
            PhotoTooLarge, match=r"huge\.png: found 10000 × 10000 pixels, expected at most 40000000"
        ):
            decode(path)
    assert not seen


def test_a_gigapixel_header_is_too_large_too(tmp_path):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(PhotoTooLarge, match="far too many pixels"):
        decode(data)


def test_the_limits_are_exact(tmp_path, picture):
    data = encoded(picture, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    assert decode(path, PhotoLimits(max_bytes=len(data), max_pixels=2400)).size == (60, 40)
    with pytest.raises(PhotoTooLarge, match=f"found more than {len(data) - 1} bytes"):
        decode(path, PhotoLimits(max_bytes=len(data) - 1))
    with pytest.raises(PhotoTooLarge, match="found 60 × 40 pixels"):
        check(data, PhotoLimits(max_pixels=2399))
    with pytest.raises(PhotoUnreadable, match="expected JPEG, GIF"):
        check(data, PhotoLimits(formats=("JPEG", "GIF")))


def test_no_more_than_the_limit_is_read_of_an_endless_file(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(PhotoTooLarge):
        read(path)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_bomb_in_a_text_chunk_is_refused(picture, kind):
    packed = zlib.compress(bytes(50_000_000), 9)
    body = b"Comment\0\0" + packed if kind == b"zTXt" else b"Comment\0\1\0\0\0" + packed
    data = encoded(picture, "PNG")
    with pytest.raises(PhotoUnreadable, match="too large"):
        decode(data[:33] + chunk(kind, body) + data[33:])


def test_a_jpeg_of_very_many_scans_is_refused_before_decoding():
    data = io.BytesIO()
    Image.new("L", (640, 480), 128).save(data, "JPEG", progressive=True)
    whole = data.getvalue()
    assert decode(whole).size == (640, 480)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    with pytest.raises(PhotoUnreadable, match="scans"):
        decode(whole[:-2] + 300 * scan + whole[-2:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    image = decode(encoded(red, kind, save_all=True, append_images=[blue, blue], duration=50))
    assert np.array_equal(pixels(image), pixels(red))


def test_gray_palette_and_bilevel_become_rgb():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = Image.fromarray(ramp)
    expected = np.repeat(ramp[..., None], 3, axis=2)
    assert np.array_equal(pixels(decode(encoded(gray, "PNG"))), expected)
    palette = gray.convert("P")
    assert np.array_equal(pixels(decode(encoded(palette, "PNG"))), expected)
    bilevel = Image.fromarray(ramp > 127)
    assert np.array_equal(pixels(decode(encoded(bilevel, "PNG")))[..., 0], (ramp > 127) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    image = decode(encoded(Image.fromarray(ramp), kind))
    assert np.array_equal(pixels(image)[..., 1], np.arange(256).reshape(16, 16))


def test_float_samples_are_refused():
    with pytest.raises(PhotoUnreadable, match="32-bit samples"):
        decode(encoded(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_the_colour_it_prints(kind):
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    assert np.abs(pixels(decode(encoded(ink, kind))) - [255, 0, 0]).max() <= 3


def test_lab_becomes_rgb():
    lab = ImageCms.applyTransform(
        Image.new("RGB", (4, 4), (200, 30, 60)),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert np.abs(pixels(decode(encoded(lab, "TIFF"))) - [200, 30, 60]).max() <= 6


def test_transparency_lies_on_white():
    rgba = Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 102]]], dtype=np.uint8))
    expected = [[[255, 255, 255], [255, 0, 0], [153, 153, 153]]]
    for kind in ("PNG", "WEBP", "TIFF"):
        assert (
            pixels(decode(encoded(rgba, kind, **({"exact": True} if kind == "WEBP" else {})))).tolist()
            == expected
        )
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        shown = pixels(decode(encoded(palette, kind, transparency=0))).tolist()
        assert shown == [[[255, 255, 255], [9, 9, 9]]]
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 8)
    assert pixels(decode(encoded(gray, "PNG", transparency=7))).tolist() == [[[255] * 3, [8] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(corners, orientation, kind):
    # Table 6 of EXIF 2.3 (JEITA CP-3451B), 4.6.4 A: where row 0 and column 0 of the stored picture show.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(corners))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    image = decode(data)
    assert image.size == corners.size
    assert np.abs(pixels(image) - pixels(corners)).max() <= 12


def test_broken_exif_does_not_cost_the_picture(picture):
    data = encoded(picture, "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert np.array_equal(pixels(decode(data)), pixels(picture))


def test_the_digest_is_sha256_of_the_file(tmp_path, picture):
    data = encoded(picture, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    assert content_digest(read(path)) == hashlib.sha256(data).digest()


SAMPLES = [encoded(Image.effect_noise((20, 12), 60), kind) for kind in ALL]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(SAMPLES),
    edits=st.lists(
        st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=4)), min_size=1, max_size=8
    ),
)
def test_damage_anywhere_is_a_photo_error_or_a_picture(data, edits):
    damaged = bytearray(data)
    for position, piece in edits:
        position %= len(damaged)
        damaged[position : position + len(piece)] = piece
    try:
        image = decode(bytes(damaged), PhotoLimits(max_pixels=1_000_000))
    except PhotoError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height <= 1_000_000
