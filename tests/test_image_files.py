"""Images as a viewer shows them, in 8-bit RGB, for all who read them; and files that are refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cnext.backbones.seed_x.anyres import whole
from cnext.backbones.tiny.model import pixels
from cnext.errors import UserError
from cnext.image_files import Inspection, for_web, image_size, inspect, open_image
from cnext.judging.cases import Case
from cnext.judging.requests import Prompts
from cnext.report.samples import picture
from cnext.scoring import images
from cnext.tasks.base import Sample, Turn

DRAWN = numpy.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
GRAY = DRAWN[..., 0]
ORIENTED = {  # how the shown pixels are stored under each orientation tag
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: numpy.rot90(shown),
    7: lambda shown: numpy.rot90(shown, 2).swapaxes(0, 1),
    8: lambda shown: numpy.rot90(shown, -1),
}


def saved(path: Path, stored: numpy.ndarray, **options: object) -> Path:
    Image.fromarray(numpy.ascontiguousarray(stored)).save(path, **options)
    return path


def oriented(path: Path, tag: int) -> Path:
    exif = Image.Exif()
    exif[274] = tag
    options = {"tiffinfo": {274: tag}} if path.suffix == ".tif" else {"exif": exif}
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    return saved(path, ORIENTED[tag](DRAWN), **options, **lossless)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("tag", ORIENTED)
def test_the_orientation_tag_is_applied_once(suffix: str, tag: int, tmp_path: Path) -> None:
    path = oriented(tmp_path / f"x.{suffix}", tag)
    assert numpy.array_equal(open_image(path), DRAWN)
    assert inspect(path) == Inspection("", (7, 5), ("turned by their orientation tag",) if tag > 1 else ())
    assert inspect(path, decode=False).size == (7, 5)


def test_a_camera_s_jpeg_is_upright(tmp_path: Path) -> None:
    """Red on the left; stored turned to the left, as the tag 6 says."""
    shown = numpy.zeros((16, 32, 3), numpy.uint8)
    shown[:, :16, 0] = 255
    exif = Image.Exif()
    exif[274] = 6
    path = saved(tmp_path / "x.jpg", numpy.rot90(shown), exif=exif, quality=95, subsampling=0)
    assert image_size(path) == open_image(path).size == (32, 16)
    assert numpy.abs(numpy.asarray(open_image(path)).astype(int) - shown).max() < 60


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_unknown_orientations_turn_nothing(tag: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = tag
    assert numpy.array_equal(open_image(saved(tmp_path / "x.png", DRAWN, exif=exif)), DRAWN)


def test_damaged_tags_turn_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", DRAWN, exif=b"Exif\0\0no tags")
    assert numpy.array_equal(open_image(path), DRAWN)
    assert inspect(path).fault == ""


def tiff(path: Path, mode: str, raw: bytes, bits: int, photometric: int = 1, sample_format: int = 1) -> Path:
    """A TIFF of one strip, written by hand: Pillow writes neither 12 bits nor white as zero."""
    values = {
        256: GRAY.shape[1], 257: GRAY.shape[0], 258: bits, 259: 1, 262: photometric, 277: 1, 278: GRAY.shape[0],
        279: len(raw), 339: sample_format,
    }  # fmt: skip
    tags = ImageFileDirectory_v2()
    for number, value in values.items():
        tags[number] = value
        tags.tagtype[number] = 4 if number in (256, 257, 273, 278, 279) else 3
    tags[273], tags.tagtype[273] = 0, 4  # to which Pillow adds where the tags end
    path.write_bytes(b"II*\0\x08\0\0\0" + tags.tobytes(8) + raw)
    with Image.open(path) as image:
        assert image.mode == mode
    return path


def twelve_bits(values: numpy.ndarray) -> bytes:
    """Rows of 12-bit values, each row from a byte on."""
    rows = ("".join(f"{value:012b}" for value in row) for row in values)
    padded = (row + "0" * (-len(row) % 8) for row in rows)
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in padded)


WIDE = GRAY.astype(numpy.uint16)
DEEP: dict[str, Callable[[Path], Path]] = {
    "png": lambda to: saved(to / "x.png", WIDE * 257),
    "tiff": lambda to: saved(to / "x.tif", WIDE * 257),
    "big-endian tiff": lambda to: saved(to / "x.tif", (WIDE * 257).astype(">u2")),
    "deflated tiff": lambda to: saved(to / "x.tif", WIDE * 257, compression="tiff_adobe_deflate"),
    "tiff, white is zero": lambda to: tiff(to / "x.tif", "I;16", (~(WIDE * 257)).tobytes(), 16, photometric=0),
    "tiff of 12 bits": lambda to: tiff(to / "x.tif", "I;16", twelve_bits(WIDE * 16 + WIDE // 16), 12),
}


@pytest.mark.parametrize("write", DEEP.values(), ids=DEEP.keys())
def test_high_bit_depths_are_scaled(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    assert numpy.array_equal(open_image(path), numpy.repeat(GRAY[..., None], 3, 2))
    assert "of more than 8 bits, scaled to 8" in inspect(path).converted


def test_sixteen_bits_round_and_a_transparent_gray_is_white(tmp_path: Path) -> None:
    values = numpy.array([[0, 128, 129, 32768, 65535]], numpy.uint16)
    assert numpy.asarray(open_image(saved(tmp_path / "x.png", values)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    path = saved(tmp_path / "y.png", values, transparency=128)
    assert numpy.asarray(open_image(path))[0, :, 0].tolist() == [0, 255, 1, 128, 255]


ALPHA = numpy.linspace(0, 255, GRAY.size).astype(numpy.uint8).reshape(GRAY.shape)


def on_white(colors: numpy.ndarray, alpha: numpy.ndarray) -> numpy.ndarray:
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def keyed(to: Path, stored: Image.Image, key: object, **options: object) -> Path:
    stored.save(to, transparency=key, **options)
    return to


CLEAR: dict[str, tuple[Callable[[Path], object], numpy.ndarray, numpy.ndarray]] = {
    "RGBA png": (lambda to: saved(to / "x", numpy.dstack([DRAWN, ALPHA]), format="PNG"), DRAWN, ALPHA),
    "LA png": (lambda to: saved(to / "x", numpy.dstack([GRAY, ALPHA]), format="PNG"), GRAY, ALPHA),
    "RGBA tiff": (lambda to: saved(to / "x", numpy.dstack([DRAWN, ALPHA]), format="TIFF"), DRAWN, ALPHA),
    "LA tiff": (lambda to: saved(to / "x", numpy.dstack([GRAY, ALPHA]), format="TIFF"), GRAY, ALPHA),
    "webp": (
        lambda to: saved(to / "x", numpy.dstack([DRAWN, ALPHA]), format="WEBP", lossless=True, exact=True), DRAWN, ALPHA
    ),
    "color key": (
        lambda to: keyed(to / "x", Image.fromarray(DRAWN), tuple(DRAWN[2, 3].tolist()), format="PNG"),
        DRAWN, 255 - 255 * (DRAWN[2, 3] == DRAWN).all(-1),
    ),
    "gray key": (
        lambda to: keyed(to / "x", Image.fromarray(GRAY), int(GRAY[0, 0]), format="PNG"),
        GRAY, 255 - 255 * (GRAY[0, 0] == GRAY),
    ),
    "palette": (
        lambda to: keyed(to / "x", Image.fromarray(GRAY).convert("P"), bytes(range(256)), format="PNG"), GRAY, GRAY
    ),
    "palette, one entry": (
        lambda to: keyed(to / "x", Image.fromarray(GRAY).convert("P"), int(GRAY[4, 4]), format="PNG"),
        GRAY, 255 - 255 * (GRAY[4, 4] == GRAY),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("write", "colors", "alpha"), CLEAR.values(), ids=CLEAR.keys())
def test_transparency_is_put_on_white(write: Callable, colors: numpy.ndarray, alpha: numpy.ndarray, tmp_path: Path):
    write(tmp_path)
    colors = colors if colors.ndim == 3 else numpy.repeat(colors[..., None], 3, 2)
    shown = numpy.asarray(open_image(tmp_path / "x"))
    assert numpy.abs(shown - on_white(colors, alpha)).max() <= 1
    assert inspect(tmp_path / "x").converted == ("with transparency, put on white",)


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    colors = numpy.stack(numpy.meshgrid(*[numpy.arange(0, 256, 5, dtype=numpy.uint8)] * 3), -1).reshape(52, -1, 3)
    alpha = numpy.full(colors.shape[:2], 255, numpy.uint8)
    assert numpy.array_equal(open_image(saved(tmp_path / "x.png", numpy.dstack([colors, alpha]))), colors)


PLAIN: dict[str, Callable[[Path], object]] = {
    "png": lambda to: Image.fromarray(DRAWN).save(to, "PNG"),
    "bmp": lambda to: Image.fromarray(DRAWN).save(to, "BMP"),
    "tiff": lambda to: Image.fromarray(DRAWN).save(to, "TIFF"),
    "gray": lambda to: Image.fromarray(GRAY).save(to, "PNG"),
    "palette": lambda to: Image.fromarray(DRAWN).quantize(9).save(to, "PNG"),
    "one bit": lambda to: Image.fromarray(GRAY > 127).save(to, "PNG"),
}


@pytest.mark.parametrize("write", PLAIN.values(), ids=PLAIN.keys())
def test_plain_images_are_what_pillow_has(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "x")
    with Image.open(tmp_path / "x") as image:
        assert numpy.array_equal(open_image(tmp_path / "x"), image.convert("RGB"))
    assert inspect(tmp_path / "x").converted == ()


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


NOISE = numpy.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "float tiff": (lambda to: saved(to, GRAY.astype(numpy.float32) / 255, format="TIFF"), "floating-point pixels"),
    "int32 tiff": (lambda to: saved(to, GRAY.astype(numpy.int32), format="TIFF"), "of which no value is black"),
    "signed tiff": (lambda to: tiff(to, "I", WIDE.tobytes(), 16, sample_format=2), "signed pixels"),
    "signed bytes": (lambda to: tiff(to, "L", GRAY.tobytes(), 8, sample_format=2), "signed pixels"),
    "nothing visible": (
        lambda to: saved(to, numpy.dstack([DRAWN, 0 * GRAY]), format="PNG"), "every pixel is transparent"
    ),
    "cut jpeg": (lambda to: cut(saved(to, NOISE, format="JPEG"), 0.6), "truncated"),
    "cut png": (lambda to: cut(saved(to, NOISE, format="PNG"), 0.6), ""),
    "cut bmp": (lambda to: cut(saved(to, NOISE, format="BMP"), 0.6), "truncated"),
    "cut tiff": (lambda to: cut(saved(to, NOISE, format="TIFF"), 0.6), ""),
    "cut webp": (lambda to: cut(saved(to, NOISE, format="WEBP", lossless=True), 0.6), ""),
    "cut gif": (lambda to: cut(saved(to, NOISE, format="GIF"), 0.6), "truncated"),
    "another format": (lambda to: saved(to, DRAWN, format="PPM"), "cannot identify image file"),
    "empty": (lambda to: to.write_bytes(b""), "cannot identify image file"),
    "one byte": (lambda to: to.write_bytes(b"\xff"), "cannot identify image file"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_shown_is_refused_everywhere(write: Callable, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    write(path)
    for decode in (True, False):
        assert inspect(path, decode).fault.startswith("broken (")
        assert reason in inspect(path, decode).fault
    for read in (open_image, for_web, pixels, lambda path: picture(path, "x", "")):
        with pytest.raises(UserError, match=r"x\.png cannot be read: .*"):
            read(path)


def test_a_jpeg_with_bytes_behind_its_end_is_fine(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", NOISE)
    path.write_bytes(path.read_bytes() + b"\0\0made by a camera")
    assert inspect(path, decode=False).fault == ""


def test_the_first_frame_is_read_and_counted(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    assert open_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)
    assert inspect(tmp_path / "x.gif").converted == ("of several frames, of which the first is read",)


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """Green above blue, stored on its side, on 16 x 32 pixels."""
    shown = numpy.zeros((32, 16, 3), numpy.uint8)
    shown[:16, :, 1], shown[16:, :, 2] = 255, 255
    exif = Image.Exif()
    exif[274] = 6
    return saved(tmp_path / "turned.png", numpy.rot90(shown), exif=exif)


def test_all_who_read_images_see_the_same(turned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone, SEED-X, the scorer of targets, the report and the judge."""
    seen = [pixels(turned).numpy(), whole(open_image(turned)).permute(1, 2, 0).numpy()]
    sample = Sample("x", (Turn("paint it"),), turned, turned)
    seen.append(numpy.asarray(images._image_target(sample)))
    seen.append(numpy.asarray(Image.open(io.BytesIO(picture(turned, "x", "").data))))
    case = Case(0, "t", 0, "0", "text", "what?", "green", "red", None, turned, None, "other")
    url = Prompts().messages(case)[1]["content"][1]["image_url"]["url"]
    seen.append(numpy.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))))
    for one in seen:
        assert one[0, 0].tolist() == one[0, -1].tolist() == [0, 255, 0]
        assert one[-1, 0].tolist() == one[-1, -1].tolist() == [0, 0, 255]


@pytest.mark.parametrize("suffix", ["tif", "bmp", "png", "jpg", "gif", "webp"])
def test_a_model_server_gets_what_it_can_read(suffix: str, tmp_path: Path) -> None:
    """A plain PNG, JPEG, GIF or WebP as it is, everything else as a PNG."""
    path = saved(tmp_path / f"x.{suffix}", DRAWN)
    kind, content = for_web(path)
    kept = suffix not in ("tif", "bmp")
    assert kind == ({"jpg": "jpeg"}.get(suffix, suffix) if kept else "png")
    assert (content == path.read_bytes()) == kept
    assert numpy.array_equal(Image.open(io.BytesIO(content)).convert("RGB"), open_image(path))


@pytest.mark.parametrize("write", [DEEP["png"], lambda to: oriented(to / "x.png", 6), CLEAR["RGBA png"][0]])
def test_a_model_server_gets_what_the_model_saw(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    with Image.open(io.BytesIO(for_web(path)[1])) as sent:
        assert (sent.mode, sent.getexif().get(274)) == ("RGB", None)
        assert numpy.array_equal(sent, open_image(path))


SIDED = numpy.repeat(numpy.repeat([[255, 0]], 5, 0), [3, 4], 1).astype(numpy.uint8)
MODES = ("L", "P", "RGB", "RGBA", "CMYK", "I;16")


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_on_its_side_is_upright_in_every_mode(mode: str, tag: int, compression: str | None, tmp_path: Path):
    stored = numpy.ascontiguousarray(ORIENTED[tag](SIDED))
    image = Image.fromarray(stored.astype(numpy.uint16) * 257) if mode == "I;16" else Image.fromarray(stored)
    image.convert(mode).save(tmp_path / "x.tif", tiffinfo={274: tag}, compression=compression)
    shown = open_image(tmp_path / "x.tif")
    assert numpy.array_equal(numpy.asarray(shown)[..., 0] > 127, SIDED > 127)
    assert image_size(tmp_path / "x.tif") == inspect(tmp_path / "x.tif", decode=False).size == shown.size == (7, 5)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(bits: int, row: bytes, width: int, *before: bytes, after: bytes = b"", end: bool = True) -> bytes:
    """A gray PNG of one row, written by hand: Pillow writes neither 2 nor 4 bits, and tags before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + after + chunk(b"IEND", b"") * end


@pytest.mark.parametrize(
    ("bits", "row", "key", "shown"),
    [
        (1, b"\x40", 0, [255, 255]),
        (1, b"\x40", 1, [0, 255]),
        (2, b"\x1b", 0, [255, 85, 170, 255]),
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x0a\x5f", 10, [0, 255, 85, 255]),
        (4, b"\x0a\x5f", 5, [0, 170, 255, 255]),
        (8, b"\x05\x0a", 10, [5, 255]),
    ],
)
def test_the_transparent_gray_of_few_bits(bits: int, row: bytes, key: int, shown: list[int], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(bits, row, len(shown), chunk(b"tRNS", struct.pack(">H", key))))
    assert numpy.asarray(open_image(tmp_path / "x.png"))[0, :, 0].tolist() == shown


CLEAR_ONE = chunk(b"tRNS", b"\0\0")
UNFINISHED = {
    "no end": png(8, b"\x05\x0a", 2, end=False),
    "no end, transparent": png(8, b"\x05\x0a", 2, CLEAR_ONE, end=False),
    "wrong checksum": png(8, b"\x05\x0a", 2).replace(chunk(b"IDAT", zlib.compress(b"\0\x05\x0a"))[-4:], b"oops"),
    "wrong checksum behind": png(8, b"\x05\x0a", 2, after=chunk(b"tEXt", b"a\0b")[:-1] + b"x"),
}


@pytest.mark.parametrize("content", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_both_checks_find_the_same_faults(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    decoded, verified = inspect(path), inspect(path, decode=False)
    assert decoded == verified
    assert decoded.fault.startswith("broken (")


def test_an_animated_png_with_transparency_is_complete(tmp_path: Path) -> None:
    first, second = Image.new("RGBA", (4, 4), (9, 9, 9, 99)), Image.new("RGBA", (4, 4), "blue")
    first.save(tmp_path / "x.png", save_all=True, append_images=[second])
    assert inspect(tmp_path / "x.png", decode=False).fault == inspect(tmp_path / "x.png").fault == ""


def sideways() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return exif.tobytes()


RAW = b"\nexif\n%8d\n%b\n" % (len(sideways()), sideways().hex().encode())
XMP = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
TAGGED = {
    "before": png(8, b"\x05\x0a", 2, chunk(b"eXIf", sideways()[6:])),
    "behind": png(8, b"\x05\x0a", 2, after=chunk(b"eXIf", sideways()[6:])),
    "raw profile": png(8, b"\x05\x0a", 2, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW))),
    "raw profile behind": png(8, b"\x05\x0a", 2, after=chunk(b"tEXt", b"Raw profile type exif\0" + RAW)),
    "xmp behind": png(8, b"\x05\x0a", 2, after=chunk(b"iTXt", XMP)),
}


@pytest.mark.parametrize("content", TAGGED.values(), ids=TAGGED.keys())
def test_the_size_of_a_png_with_tags_anywhere(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    sizes = {image_size(path), open_image(path).size, inspect(path).size, inspect(path, decode=False).size}
    assert sizes == {(1, 2)}


def test_the_size_of_a_webp_with_xmp(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.webp", DRAWN, xmp=b'<x tiff:Orientation="6"/>')
    assert image_size(path) == open_image(path).size == inspect(path, decode=False).size == (5, 7)


def test_pixels_that_pillow_does_not_read_say_what_to_do(tmp_path: Path) -> None:
    content = ImageFileDirectory_v2()
    for number, value in {256: 2, 257: 1, 258: (32, 32, 32), 259: 1, 262: 2, 277: 3, 279: 24, 339: (3, 3, 3)}.items():
        content[number] = value
        content.tagtype[number] = 3
    content[273], content.tagtype[273] = 0, 4
    (tmp_path / "x.tif").write_bytes(b"II*\0\x08\0\0\0" + content.tobytes(8) + bytes(24))
    assert "save it as an 8-bit PNG" in inspect(tmp_path / "x.tif").fault
