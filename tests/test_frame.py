"""A frame's wire form, and what becomes of images and entries that are none."""

import io
import struct
import time
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import new_frame, texture, wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from producers.errors import FrameError, MalformedEntry, UnreadableImage
from producers.frame import CODECS, Frame, Picture, check_camera, check_product, header_size

IMAGE = texture(7, 40, 60)


def png(array: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", array)
    assert done
    return data.tobytes()


def bomb(side: int = 10_000) -> bytes:
    """A PNG whose header promises side x side pixels; it has hardly any data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# --- the wire


@pytest.mark.parametrize("codec", CODECS)
def test_a_frame_survives_the_wire(codec):
    frame = Frame("bolt", "Cam_1.left-2", 1_795_400_914 << 20, time.time_ns(), Picture.encode(IMAGE, codec))
    again = Frame.from_fields("bolt", wire(frame))
    assert again == frame
    assert again.frame_id == f"bolt/Cam_1.left-2/{frame.seq}"
    decoded = again.picture.decode()
    assert (decoded.shape, decoded.dtype) == (IMAGE.shape, np.uint8)
    np.testing.assert_allclose(decoded.astype(int), IMAGE, atol=12 if codec == "jpeg" else 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", None),
        ("v", b"2"),
        ("v", b"1.0"),
        ("camera", None),
        ("camera", b""),
        ("camera", b"-front"),
        ("camera", b"a/b"),
        ("camera", b"a:b"),
        ("camera", b"cam\n"),
        ("camera", b"cam\xff"),
        ("camera", b"c" * 64),
        ("seq", None),
        ("seq", b""),
        ("seq", b"-1"),
        ("seq", b"1.5"),
        ("seq", b" 1"),
        ("seq", b"9223372036854775808"),
        ("seq", b"1" * 4000),
        ("seq", "²".encode()),
        ("captured_at_ns", None),
        ("captured_at_ns", b"now"),
        ("captured_at_ns", b"9" * 19),
    ],
)
def test_an_entry_without_origin_is_malformed(field, value):
    fields = wire(new_frame())
    fields.pop(field.encode())
    if value is not None:
        fields[field.encode()] = value
    with pytest.raises(MalformedEntry, match=r"^.{1,250}$") as caught:
        Frame.from_fields("bolt", fields)
    assert field in str(caught.value) or field == "v"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codec", None),
        ("codec", b"tiff"),
        ("codec", b"\xff" * 5000),
        ("shape", None),
        ("shape", b"48,64"),
        ("shape", b"48,64,x"),
        ("shape", b"-48,64,3"),
        ("shape", b"9999999999,64,3"),
        ("shape", b"48,64,4"),
        ("shape", b"0,64,3"),
        ("shape", b"60000,60000,3"),
    ],
)
def test_an_entry_that_declares_what_no_camera_sends_is_malformed(field, value):
    fields = wire(new_frame())
    fields.pop(field.encode())
    if value is not None:
        fields[field.encode()] = value
    with pytest.raises(MalformedEntry, match=rf"^field {field} is .{{1,250}}$"):
        Frame.from_fields("bolt", fields)


def test_an_entry_of_a_product_that_cannot_be_is_malformed():
    with pytest.raises(MalformedEntry, match="product 'Bolt M8' is not a valid name"):
        Frame.from_fields("Bolt M8", wire(new_frame()))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("shape", b"0,0,3", "declared as shape 0,0,3, its data holds 48,64,3"),
        ("shape", b"64,48,3", "declared as shape 64,48,3, its data holds 48,64,3"),
        ("data", None, r"empty \(0 bytes\)"),
        ("data", b"", r"empty \(0 bytes\)"),
        ("data", b"not an image", "12 bytes of corrupt or unknown data"),
    ],
)
def test_an_entry_with_an_origin_is_attributed_and_only_its_image_is_unreadable(field, value, reason):
    fields = wire(new_frame(seq=5))
    fields.pop(field.encode())
    if value is not None:
        fields[field.encode()] = value
    frame = Frame.from_fields("bolt", fields)
    assert frame.frame_id == "bolt/cam-1/5"
    with pytest.raises(UnreadableImage, match=reason):
        frame.picture.decode()


@pytest.mark.parametrize("name", ["bolt", "0", "a-b_c", "a" * 63])
def test_products_that_can_be(name):
    assert check_product(name) == name


@pytest.mark.parametrize("name", ["", "Bolt", "-a", "_a", "a b", "a" * 64, "a\n", "bölt", "a/b", "{a}"])
def test_products_that_cannot_be(name):
    with pytest.raises(FrameError, match=r"is not a valid name: 1 to 63 of a-z"):
        check_product(name)


@pytest.mark.parametrize("name", ["cam", "CAM.1", "0-left_right", "a" * 63])
def test_cameras_that_can_be(name):
    assert check_camera(name) == name


@pytest.mark.parametrize("name", ["", ".a", "a:b", "a/b", "a b", "a" * 64, "a\n", "é", "?"])
def test_cameras_that_cannot_be(name):
    with pytest.raises(FrameError, match=r"is not a valid name: 1 to 63 letters"):
        check_camera(name)


@pytest.mark.parametrize("change", [{"seq": -1}, {"seq": 2**63}, {"captured_at_ns": -1}, {"captured_at_ns": 2**63}])
def test_numbers_that_no_int64_holds_are_refused(change):
    with pytest.raises(FrameError, match="not a positive int64"):
        replace(new_frame(), **change)


# --- encoding


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["grey", "four channels", "16 bit", "empty"],
)
def test_what_is_no_rgb_image_is_not_encoded(array):
    with pytest.raises(FrameError, match=r"expected an image \(H, W, 3\) uint8 RGB"):
        Picture.encode(array)


def test_an_unknown_codec_and_an_image_too_long_for_jpeg_are_refused():
    with pytest.raises(FrameError, match="codec 'webp' is unknown; use one of jpeg, png, raw"):
        Picture.encode(IMAGE, "webp")
    line_scan = np.zeros((70_000, 4, 3), np.uint8)
    with pytest.raises(FrameError, match="4x70000 could not be encoded as jpeg"):
        Picture.encode(line_scan)
    assert Picture.encode(line_scan, "png").decode().shape == line_scan.shape


def test_red_stays_red_and_thin_coloured_lines_stay_sharp():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 15] = (255, 0, 0)
    decoded = Picture.encode(image).decode()
    assert decoded[16, 15].tolist() == pytest.approx([255, 0, 0], abs=12)
    assert decoded[16, 13, 0] < 40


# --- decoding


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (IMAGE[:, :, 0], np.repeat(IMAGE[:, :, :1], 3, axis=2)),
        (IMAGE[:, :, 0].astype(np.uint16) * 256 + 255, np.repeat(IMAGE[:, :, :1], 3, axis=2)),
        (np.dstack([IMAGE[:, :, ::-1], np.full(IMAGE.shape[:2], 9, np.uint8)]), IMAGE),
        (IMAGE[:, :, ::-1].astype(np.uint16) * 256 + 255, IMAGE),
    ],
    ids=["grey", "grey 16 bit", "RGBA", "RGB 16 bit"],
)
def test_every_png_becomes_rgb_uint8(array, expected):
    decoded = Picture("png", (40, 60, 3), png(array)).decode()
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


def test_grey_pictures_may_be_declared_as_such():
    grey = np.ascontiguousarray(IMAGE[:, :, 0])
    expected = np.repeat(IMAGE[:, :, :1], 3, axis=2)
    np.testing.assert_array_equal(Picture("raw", (40, 60, 1), grey.tobytes()).decode(), expected)
    np.testing.assert_array_equal(Picture("png", (40, 60, 1), png(grey)).decode(), expected)


def test_the_orientation_tag_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG", exif=exif)
    assert Picture("jpeg", (40, 60, 3), file.getvalue()).decode().shape == (40, 60, 3)


def test_a_jpeg_in_a_padded_buffer_is_whole_and_one_with_a_thumbnail_may_be_cut_off():
    padded = Picture("jpeg", (40, 60, 3), Picture.encode(IMAGE).data + bytes(5000))
    np.testing.assert_array_equal(padded.decode(), Picture.encode(IMAGE).decode())
    exif = Image.Exif()
    exif[0x927C] = Picture.encode(texture(1, 16, 16)).data  # as a maker's note
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG", exif=exif)
    assert Picture("jpeg", (40, 60, 3), file.getvalue()).decode().shape == (40, 60, 3)
    with pytest.raises(UnreadableImage, match="corrupt jpeg data"):
        Picture("jpeg", (40, 60, 3), file.getvalue()[:-300]).decode()


JPEG, PNG = Picture.encode(IMAGE), Picture.encode(IMAGE, "png")
FLIPPED = bytearray(PNG.data)
FLIPPED[len(FLIPPED) // 2] ^= 0xFF


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (replace(JPEG, data=b""), "the image is empty"),
        (replace(JPEG, data=JPEG.data[:2]), "2 bytes of corrupt or unknown data"),
        (replace(JPEG, data=JPEG.data[: len(JPEG.data) // 2]), "corrupt jpeg data"),
        (replace(JPEG, data=JPEG.data[:-2]), "corrupt jpeg data"),
        (replace(JPEG, data=bytes(5000)), "5000 bytes of corrupt or unknown data"),
        (replace(PNG, data=PNG.data[:30]), "corrupt"),
        (replace(PNG, data=PNG.data[: len(PNG.data) // 2]), "corrupt png data"),
        (replace(PNG, data=PNG.data[:-40]), "corrupt png data"),
        (replace(PNG, data=bytes(FLIPPED)), "corrupt png data"),
        (replace(JPEG, shape=(60, 40, 3)), "declared as shape 60,40,3, its data holds 40,60,3"),
        (replace(JPEG, shape=(40, 60, 2)), "declared as shape 40,60,2"),
        (replace(JPEG, codec="bmp"), "codec 'bmp' is unknown"),
        (Picture("png", (10_000, 10_000, 3), bomb()), "10000x10000 = 100 megapixels, more than the 64 allowed"),
        (Picture("png", (20_000, 20_000, 3), bomb(20_000)), "more than 178 megapixels"),
        (Picture("raw", (40, 60, 3), bytes(40 * 60 * 3 - 1)), "raw data of 7199 bytes does not fill the shape"),
        (Picture("raw", (40, 60, 3), bytes(40 * 60 * 3 + 1)), "raw data of 7201 bytes does not fill the shape"),
        (Picture("raw", (40, 60, 4), bytes(40 * 60 * 4)), "raw shape 40,60,4 is not"),
        (Picture("raw", (0, 60, 3), b"x"), "raw shape 0,60,3 is not"),
        (Picture("raw", (10_000, 10_000, 3), b"x"), "100 megapixels"),
    ],
)
def test_an_unreadable_image_is_one_clear_line(picture, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        picture.decode()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_bomb_is_refused_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="megapixels"):
        Picture("png", (10_000, 10_000, 3), bomb()).decode()
    with pytest.raises(UnreadableImage, match="more than the 0 allowed"):
        JPEG.decode(max_pixels=100)


@pytest.mark.parametrize(
    ("at_least", "shape"),
    [
        (301, (601, 900, 3)),
        (300, (301, 450, 3)),
        (151, (301, 450, 3)),
        (150, (151, 225, 3)),
        (75, (76, 113, 3)),
        (10, (76, 113, 3)),
        (700, (601, 900, 3)),
    ],
)
def test_a_jpeg_is_reduced_while_its_shorter_side_keeps_as_many_pixels(at_least, shape):
    assert Picture.encode(texture(3, 601, 900)).decode(at_least=at_least).shape == shape


def test_a_reduced_jpeg_has_the_means_of_its_blocks():
    image = texture(3, 640, 960) // 2 + 50
    image[::37, ::41] = 255  # spots of a pixel
    picture = Picture.encode(image)
    means = cv2.resize(picture.decode(), (120, 80), interpolation=cv2.INTER_AREA)
    difference = np.abs(picture.decode(at_least=80).astype(int) - means)
    assert difference.max() <= 2  # roundings, and what the whole image clips
    assert difference.mean() < 0.5


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_what_is_no_jpeg_is_never_reduced(codec):
    image = texture(3, 640, 960)
    np.testing.assert_array_equal(Picture.encode(image, codec).decode(at_least=32), image)


def test_a_jpeg_that_calls_itself_png_is_reduced_as_in_training():
    picture = Picture("png", (640, 960, 3), Picture.encode(texture(3, 640, 960)).data)
    assert picture.decode(at_least=32).shape == (80, 120, 3)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_jpeg_that_is_cut_off_is_unreadable_at_any_size(keep):
    whole = Picture.encode(texture(3, 640, 960))
    cut = Picture("jpeg", whole.shape, whole.data[: int(len(whole.data) * keep)])
    with pytest.raises(UnreadableImage, match="corrupt jpeg data"):
        cut.decode(at_least=32)


def test_the_limit_of_pixels_is_that_of_the_whole_jpeg():
    with pytest.raises(UnreadableImage, match="more than the 0 allowed"):
        Picture.encode(texture(3, 640, 960)).decode(max_pixels=10_000, at_least=32)


def test_the_header_tells_the_size():
    assert header_size(JPEG.data) == header_size(PNG.data) == (40, 60)


# --- anything at all

GOOD = wire(new_frame())
VALUES = st.one_of(
    st.binary(max_size=40),
    st.integers(-(2**70), 2**70).map(lambda n: str(n).encode()),
    st.sampled_from([b"1", b"cam", b"jpeg", b"png", b"raw", b"2,2,3", b"2,2,1", JPEG.data, PNG.data[:100], bytes(12)]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.dictionaries(st.sampled_from(sorted(GOOD)), st.none() | VALUES),
    extra=st.dictionaries(st.binary(max_size=8), VALUES, max_size=3),
)
def test_no_entry_raises_anything_else(changes, extra):
    fields = {name: value for name, value in (extra | GOOD | changes).items() if value is not None}
    line = ""
    try:
        frame = Frame.from_fields("bolt", fields)
        assert Frame.from_fields("bolt", wire(frame)).frame_id == frame.frame_id
        image = frame.picture.decode()
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
    except (MalformedEntry, UnreadableImage) as error:
        line = str(error)
    assert "\n" not in line


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    picture=st.sampled_from([JPEG, PNG]),
    at=st.floats(0, 1),
    garbage=st.binary(min_size=1, max_size=64),
    cut=st.booleans(),
)
def test_no_damage_to_an_image_raises_anything_else(picture, at, garbage, cut):
    start = int(at * len(picture.data))
    data = picture.data[:start] + garbage + (b"" if cut else picture.data[start + len(garbage) :])
    line = ""
    try:
        assert replace(picture, data=data).decode().shape == IMAGE.shape
    except UnreadableImage as error:
        line = str(error)
    assert "\n" not in line
