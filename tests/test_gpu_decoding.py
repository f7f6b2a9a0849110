"""JPEGs in one call: a picture that cannot be read takes none of its neighbours down, and none is left waiting."""

import threading

import numpy as np
import pytest
import torch
from conftest import texture

from producers.errors import UnreadableImage
from producers.frame import MAX_PIXELS, Picture
from workers import gpu_decoding
from workers.decoding import CpuDecoders, make_decoders
from workers.gpu_decoding import GpuDecoders, decoders_beside, nvjpeg
from workers.graphs import capturing
from workers.settings import WorkerSettings

CPU = torch.device("cpu")


class Decoder:
    """Decodes as the GPU would, as strictly: all or nothing. It waits where it is told to."""

    def __init__(self, refused: bytes = b"", error: type[Exception] = RuntimeError) -> None:
        self.calls: list[int] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()
        self._refused, self._error = refused, error

    def __call__(self, encoded):
        self.entered.set()
        self.go.wait()
        self.calls.append(len(encoded))
        data = [each.numpy().tobytes() for each in encoded]
        if self._refused in data:
            raise self._error("nvjpegDecode failed: 4")
        return [
            torch.from_numpy(Picture("jpeg", Picture.encode(texture(0)).shape, each).decode()).permute(2, 0, 1)
            for each in data
        ]


@pytest.fixture
def make():
    """Make decoders around a decoder that plays the GPU's."""
    made = []

    def one(decoder, max_batch=8, max_pixels=MAX_PIXELS):
        made.append(GpuDecoders(CpuDecoders(1, max_pixels), CPU, max_batch, max_pixels, decoder))
        return made[-1]

    yield one
    for each in made:
        each.shutdown()


def pictures(count: int) -> list[Picture]:
    return [Picture.encode(texture(seed)) for seed in range(count)]


def submit_all(decoders, decoder, batch, size=None):
    """Submit while the decoder is held with the first, so that all others wait together."""
    decoder.go.clear()
    futures = [decoders.submit(batch[0], size)]
    assert decoder.entered.wait(10)
    futures += [decoders.submit(picture, size) for picture in batch[1:]]
    decoder.go.set()
    return futures


def assert_on_device(future, picture):
    image = future.result(10).image
    assert (type(image), image.dtype) == (torch.Tensor, torch.uint8)
    np.testing.assert_array_equal(image.numpy(), picture.decode())


def assert_on_host(future, picture, size=None):
    decoded = future.result(10)
    np.testing.assert_array_equal(decoded.image, picture.decode())
    assert isinstance(decoded.image, np.ndarray)
    assert (None if decoded.fitted is None else len(decoded.fitted)) == size


def test_what_waits_is_decoded_in_one_call(make):
    batch, decoder = pictures(10), Decoder()
    for future, picture in zip(submit_all(make(decoder), decoder, batch), batch, strict=True):
        assert_on_device(future, picture)
    assert decoder.calls == [1, 8, 1]


def test_what_the_gpu_refuses_is_decoded_on_the_cpu_and_its_neighbours_are_not(make):
    batch = pictures(4)
    decoder = Decoder(refused=batch[2].data)
    futures = submit_all(make(decoder), decoder, batch, size=32)
    assert_on_host(futures[2], batch[2], size=32)
    for number in (0, 1, 3):
        assert_on_device(futures[number], batch[number])


def test_what_has_no_room_on_the_gpu_is_decoded_on_the_cpu(make):
    batch = pictures(4)
    decoder = Decoder(refused=batch[2].data, error=torch.OutOfMemoryError)
    futures = submit_all(make(decoder), decoder, batch, size=32)
    assert_on_device(futures[0], batch[0])
    for future, picture in zip(futures[1:], batch[1:], strict=True):
        assert_on_host(future, picture, size=32)


def test_an_error_of_the_decoders_own_reaches_the_frame_and_the_next_one_is_decoded(make, monkeypatch):
    decoder = Decoder()
    decoders, (picture,) = make(decoder), pictures(1)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_decoding, "is_sound_jpeg", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoders.submit(picture, None).result(10)
    assert_on_device(decoders.submit(picture, None), picture)


def test_while_graphs_are_captured_the_cpu_decodes(make):
    (picture,), decoder = pictures(1), Decoder()
    decoders = make(decoder)
    with capturing:
        assert_on_host(decoders.submit(picture, None), picture)
    assert decoder.calls == []
    assert_on_device(decoders.submit(picture, None), picture)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda picture: Picture("jpeg", picture.shape, picture.data[: len(picture.data) // 2]),
        lambda picture: Picture("jpeg", (4, 4, 3), picture.data),
        lambda picture: Picture("jpeg", (*picture.shape[:2], 4), picture.data),
        lambda picture: Picture("jpeg", picture.shape, b""),
        lambda picture: Picture("jpeg", picture.shape, b"\xff\xd8no picture\xff\xd9"),
        lambda picture: Picture("unheard-of", picture.shape, picture.data),
    ],
    ids=["cut off", "another shape", "four channels", "empty", "noise", "codec"],
)
def test_an_unreadable_picture_says_why_and_the_gpu_never_sees_it(make, spoil):
    batch, decoder = pictures(3), Decoder()
    batch[1] = spoil(batch[1])
    first, bad, last = submit_all(make(decoder), decoder, batch)
    with pytest.raises(UnreadableImage):
        bad.result(10)
    assert_on_device(first, batch[0])
    assert_on_device(last, batch[2])
    assert sum(decoder.calls) == 2


def test_other_codecs_are_decoded_on_the_cpu(make):
    decoder = Decoder()
    decoders = make(decoder)
    for seed, codec in enumerate(("png", "raw")):
        picture = Picture.encode(texture(seed), codec)
        assert_on_host(decoders.submit(picture, 32), picture, size=32)
    assert decoder.calls == []


def test_too_many_pixels_are_refused(make):
    with pytest.raises(UnreadableImage):
        make(Decoder(), max_pixels=100).submit(pictures(1)[0], None).result(10)


def test_an_image_of_another_size_than_declared_is_not_the_pictures(make):
    (picture,) = pictures(1)
    assert_on_host(make(lambda encoded: [torch.zeros(3, 4, 4).byte()]).submit(picture, None), picture)


def test_what_was_submitted_is_done_at_the_end(make):
    batch, decoder = pictures(5), Decoder()
    decoders = GpuDecoders(CpuDecoders(1, MAX_PIXELS), CPU, 2, MAX_PIXELS, decoder)
    futures = submit_all(decoders, decoder, batch)
    decoders.shutdown()
    assert all(future.done() for future in futures)


def test_a_host_without_a_gpu_decodes_on_the_cpu():
    decoders = make_decoders(WorkerSettings(gpu_decode=True), CPU)
    assert isinstance(decoders, CpuDecoders)
    (picture,) = pictures(1)
    assert_on_host(decoders.submit(picture, 32), picture, size=32)
    decoders.shutdown()


def test_a_gpu_that_decodes_nothing_is_said_once_and_the_cpu_decodes(caplog):
    def refuse(encoded):
        raise RuntimeError("Failed to initialize nvjpeg with hardware backend\nmore")

    on_cpu = CpuDecoders(1, MAX_PIXELS)
    assert decoders_beside(on_cpu, CPU, 8, MAX_PIXELS, refuse) is on_cpu
    assert caplog.messages == [
        "[worker] gpu_decode: cpu decodes no JPEG, so the CPU does: Failed to initialize nvjpeg with hardware backend"
    ]
    able = decoders_beside(on_cpu, CPU, 8, MAX_PIXELS, lambda _: [torch.zeros(3, 16, 16).byte()])
    assert isinstance(able, GpuDecoders)
    able.shutdown()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: nvJPEG")
@pytest.mark.filterwarnings("ignore")
def test_the_gpu_reads_what_the_cpu_reads():
    batch, device = pictures(4), torch.device("cuda")
    decoders = GpuDecoders(CpuDecoders(1, MAX_PIXELS), device, 8, MAX_PIXELS, nvjpeg(device))
    for picture, future in [(picture, decoders.submit(picture, None)) for picture in batch]:
        # two decoders may round a pixel's colours differently
        assert np.abs(future.result(60).image.cpu().numpy().astype(int) - picture.decode()).max() <= 4
    decoders.shutdown()
