"""Folders, videos and the pace of a camera."""

import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import texture
from PIL import Image

from producers import camera as camera_module
from producers.camera import Camera
from producers.errors import FrameError, SourceError, UnreadableImage
from producers.frame import Picture
from producers.sequence import Sequence
from producers.settings import PublisherSettings
from producers.sources import FolderSource, VideoSource, open_source

SETTINGS = PublisherSettings()
LOSSLESS = PublisherSettings(codec="png")


@pytest.fixture
def folder(tmp_path):
    """b.jpg, a.PNG, d.bmp and c.jpeg, and what is no image of the camera's."""
    (tmp_path / "b.jpg").write_bytes(Picture.encode(texture(1)).data)
    (tmp_path / "a.PNG").write_bytes(Picture.encode(texture(2), "png").data)
    (tmp_path / "c.jpeg").write_bytes(b"\xff\xd8 no picture")
    Image.fromarray(texture(3)).save(tmp_path / "d.bmp")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "e.png").mkdir()
    return tmp_path


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    source = FolderSource(folder, LOSSLESS)
    assert [path.name for path in source.paths] == ["a.PNG", "b.jpg", "c.jpeg", "d.bmp"]
    assert len(source) == 4
    pictures = list(source)
    assert [picture.codec for picture in pictures] == ["png", "jpeg", "jpeg", "png"]
    assert list(source) == pictures  # every pass is the same


def test_jpeg_and_png_travel_as_they_are(folder):
    png, jpeg = list(FolderSource(folder, SETTINGS))[:2]
    assert (png.data, png.shape) == ((folder / "a.PNG").read_bytes(), (48, 64, 3))
    assert (jpeg.data, jpeg.shape) == ((folder / "b.jpg").read_bytes(), (48, 64, 3))
    np.testing.assert_array_equal(png.decode(), texture(2))


def test_a_corrupt_file_is_a_frame_that_gets_its_verdict(folder):
    (folder / "z.png").touch()
    (folder / "zz.tif").write_bytes(b"II*\0 no picture")
    corrupt = [FolderSource(folder, SETTINGS).read(folder / name) for name in ("c.jpeg", "z.png", "zz.tif")]
    for picture in corrupt:
        with pytest.raises(UnreadableImage):
            picture.decode()
    assert [picture.shape for picture in corrupt] == [(0, 0, 3)] * 3


@pytest.mark.parametrize("name", ["x.bmp", "x.tif", "x.tiff", "x.webp", "x.ppm", "x.PPM"])
def test_other_formats_are_encoded(tmp_path, name):
    Image.fromarray(texture(3)).save(tmp_path / name, **({"lossless": True} if name == "x.webp" else {}))
    (picture,) = FolderSource(tmp_path, LOSSLESS)
    assert picture.codec == "png"
    np.testing.assert_array_equal(picture.decode(), texture(3))


def test_sixteen_bit_images_keep_their_upper_bits(tmp_path):
    assert cv2.imwrite(str(tmp_path / "x.tif"), texture(3)[:, :, 0].astype(np.uint16) * 256 + 7)
    (picture,) = FolderSource(tmp_path, LOSSLESS)
    np.testing.assert_array_equal(picture.decode()[:, :, 1], texture(3)[:, :, 0])


def test_an_image_too_large_for_opencv_is_a_frame_too(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise cv2.error("the image is too large")

    Image.fromarray(texture(3)).save(tmp_path / "x.bmp")
    monkeypatch.setattr(cv2, "imdecode", refuse)
    (picture,) = FolderSource(tmp_path, SETTINGS)
    assert picture.data == (tmp_path / "x.bmp").read_bytes()


def test_real_pictures_travel_unchanged(solar_cells):
    source = FolderSource(solar_cells / "train" / "good", SETTINGS)
    assert len(source) == 441
    first = next(iter(source))
    assert (first.codec, first.data) == ("jpeg", source.paths[0].read_bytes())
    assert first.decode().shape == first.shape == (256, 256, 3)


def test_folders_without_pictures_are_one_line(tmp_path):
    with pytest.raises(SourceError, match=f"no image in {tmp_path}: looked for .jpg, .jpeg, .png"):
        FolderSource(tmp_path, SETTINGS)
    with pytest.raises(SourceError, match=f"cannot read the folder {tmp_path}/absent: No such file"):
        FolderSource(tmp_path / "absent", SETTINGS)


def test_a_file_that_vanishes_is_one_line(folder):
    source = FolderSource(folder, SETTINGS)
    (folder / "b.jpg").unlink()
    with pytest.raises(SourceError, match=r"cannot read .*b\.jpg: No such file or directory$"):
        list(source)


# --- video


@pytest.fixture
def video(tmp_path):
    """Five frames, each of another grey; the third is the brightest."""
    path = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (64, 48))
    assert writer.isOpened()
    for level in (20, 60, 200, 100, 140):
        writer.write(np.full((48, 64, 3), (level // 2, level // 2, level), np.uint8))  # BGR: reddish
    writer.release()
    return path


def test_a_video_gives_its_frames_in_order(video):
    source = VideoSource(video, LOSSLESS)
    assert (len(source), source.fps) == (5, 12.0)
    for _ in range(2):  # every pass begins anew
        images = [picture.decode() for picture in source]
        assert [image.shape for image in images] == [(48, 64, 3)] * 5
        assert [float(image[:, :, 0].mean()) for image in images] == pytest.approx([20, 60, 200, 100, 140], abs=6)
        assert images[2][:, :, 2].mean() == pytest.approx(100, abs=6)


def test_what_is_no_video_is_one_line(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(SourceError, match=r"cannot decode .*x\.mp4 as a video"):
        VideoSource(tmp_path / "x.mp4", SETTINGS)
    with pytest.raises(SourceError, match=r"no such video: .*y\.mp4"):
        VideoSource(tmp_path / "y.mp4", SETTINGS)


def test_a_location_says_which_source_it_is(folder, video):
    assert isinstance(open_source(str(folder), SETTINGS), FolderSource)
    assert isinstance(open_source(str(video), SETTINGS), VideoSource)
    with pytest.raises(SourceError, match="no such folder or video: /nowhere"):
        open_source("/nowhere", SETTINGS)
    with pytest.raises(SourceError, match=r"notes\.txt is neither a folder of images nor a video \(\.mp4"):
        open_source(str(folder / "notes.txt"), SETTINGS)


# --- the camera


class Clock:
    """A clock that only waiting and working move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(
            camera_module, "time", SimpleNamespace(monotonic=lambda: self.now_s, time_ns=lambda: int(self.now_s * 1e9))
        )

    def is_set(self) -> bool:
        return False

    def wait(self, timeout: float) -> bool:
        self.now_s += timeout
        return False


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def pictures(count: int) -> list[Picture]:
    return [Picture("raw", (1, 1, 3), bytes([n, n, n])) for n in range(count)]


def test_a_camera_keeps_its_pace(clock):
    frames = list(Camera("bolt", "cam", pictures(4), fps=10.0).frames(Sequence(), clock))
    assert [frame.captured_at_ns / 1e9 for frame in frames] == pytest.approx([100.0, 100.1, 100.2, 100.3])
    assert [frame.seq - frames[0].seq for frame in frames] == [0, 1, 2, 3]
    assert [frame.picture for frame in frames] == pictures(4)


def test_a_slow_consumer_slows_the_camera_down_and_no_burst_follows(clock):
    taken = []
    for number, frame in enumerate(Camera("bolt", "cam", pictures(5), fps=10.0).frames(Sequence(), clock)):
        taken.append(frame.captured_at_ns / 1e9)
        clock.now_s += 1.0 if number == 1 else 0.01
    assert taken == pytest.approx([100.0, 100.1, 101.1, 101.2, 101.3])


def test_a_camera_without_pace_never_waits(clock):
    assert len(list(Camera("bolt", "cam", pictures(50)).frames(Sequence(), clock))) == 50
    assert clock.now_s == 100.0


def test_a_loop_starts_over_with_new_numbers(clock):
    frames = Camera("bolt", "cam", pictures(2), loop=True).frames(Sequence(), clock)
    seen = [next(frames) for _ in range(5)]
    assert [frame.picture.data[0] for frame in seen] == [0, 1, 0, 1, 0]
    assert len({frame.frame_id for frame in seen}) == 5


def test_a_source_that_turned_empty_ends_the_loop(clock):
    assert list(Camera("bolt", "cam", [], loop=True).frames(Sequence(), clock)) == []


def test_stop_ends_a_camera_even_while_it_waits():
    stop, seen = threading.Event(), []
    frames = Camera("bolt", "cam", pictures(2), fps=1e-3, loop=True).frames(Sequence(), stop)
    seen.append(next(frames))
    waiting = threading.Thread(target=lambda: seen.extend(frames))
    waiting.start()
    stop.set()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert len(seen) == 1


def test_frames_are_stamped_when_they_are_taken():
    before = time.time_ns()
    (frame,) = Camera("bolt", "cam", pictures(1)).frames(Sequence(), threading.Event())
    assert before <= frame.captured_at_ns <= time.time_ns()


def test_a_camera_has_valid_names():
    with pytest.raises(FrameError, match="product 'Bolt'"):
        Camera("Bolt", "cam", [])
    with pytest.raises(FrameError, match="camera 'a b'"):
        Camera("bolt", "a b", [])
