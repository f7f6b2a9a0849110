"""JPEGs in one call: a picture that cannot be read takes none of its neighbours down."""

import numpy as np
import pytest
import torch
from conftest import texture

from producers.errors import UnreadableImage
from producers.frame import Picture
from workers.gpu_decoding import decode_pictures

CPU = torch.device("cpu")


class Decoder:
    """Decodes as the GPU would, as strictly: all or nothing."""

    def __init__(self, refused: bytes = b"") -> None:
        self.calls: list[int] = []
        self._refused = refused

    def __call__(self, encoded):
        self.calls.append(len(encoded))
        data = [each.numpy().tobytes() for each in encoded]
        if self._refused and self._refused in data:
            raise RuntimeError("nvjpegDecode failed: 4")
        return [
            torch.from_numpy(Picture("jpeg", Picture.encode(texture(0)).shape, each).decode()).permute(2, 0, 1)
            for each in data
        ]


def pictures(count: int) -> list[Picture]:
    return [Picture.encode(texture(seed)) for seed in range(count)]


def assert_decoded(picture, image):
    assert (image.shape, image.dtype) == ((48, 64, 3), torch.uint8)
    assert np.array_equal(image.numpy(), picture.decode())


def test_sound_jpegs_are_one_call():
    batch, decoder = pictures(5), Decoder()
    for picture, image in zip(batch, decode_pictures(batch, CPU, decoder=decoder), strict=True):
        assert_decoded(picture, image)
    assert decoder.calls == [5]


def test_what_the_gpu_refuses_goes_to_the_cpu_alone():
    batch = pictures(4)
    decoder = Decoder(refused=batch[2].data)
    for picture, image in zip(batch, decode_pictures(batch, CPU, decoder=decoder), strict=True):
        assert_decoded(picture, image)
    assert decoder.calls == [4, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda picture: Picture("jpeg", picture.shape, picture.data[: len(picture.data) // 2]),
        lambda picture: Picture("jpeg", (4, 4, 3), picture.data),
        lambda picture: Picture("jpeg", picture.shape, b""),
        lambda picture: Picture("jpeg", picture.shape, b"\xff\xd8no picture\xff\xd9"),
        lambda picture: Picture("unheard-of", picture.shape, picture.data),
    ],
    ids=["cut off", "another shape", "empty", "noise", "codec"],
)
def test_an_unreadable_picture_says_why_and_touches_no_neighbour(spoil):
    batch, decoder = pictures(3), Decoder()
    batch[1] = spoil(batch[1])
    first, bad, last = decode_pictures(batch, CPU, decoder=decoder)
    assert isinstance(bad, UnreadableImage)
    assert_decoded(batch[0], first)
    assert_decoded(batch[2], last)
    assert decoder.calls == [2]


def test_other_codecs_are_decoded_too():
    batch = [Picture.encode(texture(seed), codec) for seed, codec in enumerate(("png", "raw"))]
    for picture, image in zip(batch, decode_pictures(batch, CPU, decoder=Decoder()), strict=True):
        assert_decoded(picture, image)


def test_too_many_pixels_are_refused():
    (refused,) = decode_pictures(pictures(1), CPU, max_pixels=100, decoder=Decoder())
    assert isinstance(refused, UnreadableImage)
    assert decode_pictures([], CPU, decoder=Decoder()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: nvJPEG")
@pytest.mark.filterwarnings("ignore")
def test_the_gpu_reads_what_the_cpu_reads():
    batch = pictures(4)
    batch[1] = Picture("jpeg", batch[1].shape, batch[1].data[:200])
    device = torch.device("cuda")
    for picture, image in zip(batch, decode_pictures(batch, device), strict=True):
        if picture is batch[1]:
            assert isinstance(image, UnreadableImage)
        else:
            # two decoders may round a pixel's colours differently
            assert np.abs(image.cpu().numpy().astype(int) - picture.decode()).max() <= 4
