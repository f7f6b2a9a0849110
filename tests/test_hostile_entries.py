"""Whatever a stream can hold: each entry gets MalformedEntry or UnreadableImage, soon and in little memory."""

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import redis
from conftest import new_frame, texture, wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from producers import keys
from producers.errors import MalformedEntry, UnreadableImage
from producers.frame import Frame, Picture
from workers.ledger import read_ledger
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings

IMAGE = texture(3, 40, 60)
JPEG, PNG = Picture.encode(IMAGE), Picture.encode(IMAGE, "png")
MANY = 4 * 2**20


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int, *extra: bytes, body: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int, data: bytes = JPEG.data) -> bytes:
    """A JPEG whose header promises another size than its data has."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def progressive(scans: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + b"\xff\xd9"


def saved(form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, form)
    return file.getvalue()


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that Python and NumPy, so OpenCV's images too, took for `work`."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- images


@pytest.mark.parametrize(
    ("data", "shape", "reason"),
    [
        (png_of(60_000, 60_000), (60_000, 60_000, 3), "more than 178 megapixels"),
        (png_of(2**31 - 1, 2**31 - 1), (40, 60, 3), "more than 178 megapixels"),
        (png_of(12_000, 12_000), (12_000, 12_000, 3), "144 megapixels, more than the 64 allowed"),
        (png_of(8_000, 8_000), (8_000, 8_000, 3), "corrupt"),
        (png_of(0, 0), (0, 0, 3), "corrupt or unknown"),
        (jpeg_of(60_000, 60_000), (60_000, 60_000, 3), "more than 178 megapixels"),
        (jpeg_of(8_000, 8_000), (8_000, 8_000, 3), "8000x8000 pixels are declared, more than .* bytes can hold"),
        (jpeg_of(65_000, 40), (40, 65_000, 3), "65000x40 pixels are declared, more than"),
        (
            png_of(60, 40, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
            (40, 60, 3),
            "corrupt or unknown",
        ),
        (
            png_of(60, 40, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
            (40, 60, 3),
            "corrupt or unknown",
        ),
        (progressive(300), (40, 60, 3), r"the jpeg has \d+ scans, more than the 200 allowed"),
        (PNG.data[:8] + JPEG.data, (40, 60, 3), "corrupt or unknown"),
        (JPEG.data[:2] + PNG.data, (40, 60, 3), "corrupt"),
    ],
    ids=[
        *("huge png", "hugest png", "large png", "hollow png", "empty png", "huge jpeg", "hollow jpeg", "long jpeg"),
        *("text bomb", "profile bomb", "scans", "two heads", "two other heads"),
    ],
)
def test_a_bomb_is_refused_soon_and_in_little_memory(data, shape, reason):
    assert len(data) < 200_000
    picture = Picture("jpeg", shape, data)

    def refused() -> None:
        with pytest.raises(UnreadableImage, match=reason) as caught:
            picture.decode()
        assert len(str(caught.value)) < 200

    started = time.process_time()
    assert peak_bytes(refused) < MANY
    assert time.process_time() - started < 2.0


def test_a_progressive_image_as_encoders_make_it_is_read():
    assert Picture("jpeg", (40, 60, 3), progressive(0)).decode().shape == (40, 60, 3)
    grey = io.BytesIO()
    Image.new("L", (4000, 3000), 128).save(grey, "JPEG", optimize=True, progressive=True, quality=1)
    assert Picture("jpeg", (3000, 4000, 3), grey.getvalue()).decode().shape == (3000, 4000, 3)
    flat = io.BytesIO()
    Image.new("L", (4000, 3000), 128).save(flat, "JPEG", optimize=True, quality=1)
    assert Picture("jpeg", (3000, 4000, 1), flat.getvalue()).decode().shape == (3000, 4000, 3)


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000", "ICO", "PCX", "SGI", "DDS"])
@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_what_is_neither_jpeg_nor_png_meets_no_other_parser(form, codec):
    with pytest.raises(UnreadableImage, match="corrupt or unknown data"):
        Picture(codec, (40, 60, 3), saved(form)).decode()


@pytest.mark.parametrize("shape", [(10**9, 10**9, 3), (1, 10**9, 3), (8000, 8001, 3), (0, 0, 3), (1, 1, 10**9)])
def test_a_huge_raw_shape_allocates_nothing(shape):
    def refused() -> None:
        with pytest.raises(UnreadableImage):
            Picture("raw", shape, b"x" * 100).decode()

    assert peak_bytes(refused) < MANY


# --- entries


@pytest.mark.parametrize("name", ["v", "camera", "seq", "captured_at_ns", "codec", "shape"])
@pytest.mark.parametrize(
    "value", [b",", b"1", b"\xff", b"1,", b"-"], ids=["commas", "digits", "no text", "mixed", "minus"]
)
def test_a_field_of_many_megabytes_costs_nothing_more(name, value):
    fields = wire(new_frame()) | {name.encode(): value * (32 * 2**20 // len(value))}

    def refused() -> None:
        with pytest.raises((MalformedEntry, UnreadableImage), match=r"^.{1,250}$"):
            Frame.from_fields("bolt", fields).picture.decode()

    assert peak_bytes(refused) < MANY


def test_thousands_of_fields_are_ignored():
    fields = wire(new_frame(seq=5)) | {f"field {n}".encode(): b"x" * n for n in range(5000)}
    assert Frame.from_fields("bolt", fields).frame_id == "bolt/cam-1/5"


NUMBERS = st.one_of(
    st.integers(-(2**80), 2**80).map(lambda n: str(n).encode()),
    st.floats().map(lambda x: str(x).encode()),
    st.sampled_from([b"0x10", b"1e9", b"+1", b"1_000", b" 1", b"1 ", b"\xd9\xa1", b"00000000000000000001", b"NaN"]),
)
SHAPES = st.lists(NUMBERS, max_size=5).map(b",".join)
TEXTS = st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
IMAGES = st.sampled_from([JPEG.data, PNG.data, bytes(12), png_of(60, 40), jpeg_of(600, 400), saved("GIF")])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.booleans(),
    fields=st.fixed_dictionaries(
        {},
        optional={
            b"v": st.sampled_from([b"1", b"2", b"01", b"1.0", b""]) | TEXTS,
            b"camera": TEXTS,
            b"seq": NUMBERS,
            b"captured_at_ns": NUMBERS,
            b"codec": st.sampled_from([b"jpeg", b"png", b"raw", b"JPEG", b"pickle"]) | TEXTS,
            b"shape": SHAPES,
            b"data": st.binary(max_size=200) | IMAGES,
        },
    ),
    extra=st.dictionaries(TEXTS, TEXTS, max_size=5),
)
def test_no_fields_raise_anything_else(base, fields, extra):
    entry = extra | (wire(new_frame()) if base else {}) | fields
    line = ""
    try:
        frame = Frame.from_fields("bolt", entry)
        image = frame.picture.decode()
        assert image.shape == (*frame.picture.shape[:2], 3)
        assert image.dtype == np.uint8
    except (MalformedEntry, UnreadableImage) as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) <= 250


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    picture=st.sampled_from([JPEG, PNG, Picture("jpeg", (40, 60, 3), progressive(0))]),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=6),
)
def test_no_flipped_bytes_raise_anything_else(picture, flips):
    data = bytearray(picture.data)
    for at, change in flips:
        data[int(at * len(data))] ^= change
    shape, line = IMAGE.shape, ""
    try:
        shape = replace(picture, data=bytes(data)).decode().shape
    except UnreadableImage as error:
        line = str(error)
    assert shape == IMAGE.shape
    assert "\n" not in line


# --- on a real stream


def test_a_stream_full_of_them_ends_in_dead_letters_and_balances(server: redis.Redis):
    server.sadd(keys.PRODUCTS, "bolt")
    good = wire(new_frame())
    hostile = [
        {b"x": b"y"},
        good | {b"v": b"9"},
        good | {b"seq": b"-1"},
        good | {b"seq": b"1" * 5000},
        good | {b"captured_at_ns": b"\xff\xfe"},
        good | {b"camera": b"a/b:c\n"},
        good | {b"camera": b"\xc3\x28"},
        {f"field {n}".encode(): b"x" for n in range(5000)},
        {b"\xff": b"\xff" * 100_000},
        good | {b"reason": b"forged", b"camera": b""},
    ]
    for entry in hostile:
        server.xadd(keys.frames("bolt"), entry)
    stream = RedisStream(server, "me", WorkerSettings())
    entries = stream.read(100, 1)
    assert len(entries) == len(hostile)
    for entry in entries:
        with pytest.raises(MalformedEntry) as caught:
            Frame.from_fields(entry.product, entry.fields)
        stream.dead_letter(entry, "?", str(caught.value))
    (ledger,) = read_ledger(server)
    assert ledger.balanced
    assert sum(camera.dead for camera in ledger.cameras) == len(hostile)
    assert server.xlen(keys.frames("bolt")) == 0
