import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from skimage import data
from torch import nn

from models.backbones import ResNetBackbone
from models.errors import TeacherError
from models.folding import fold_batchnorm
from models.inference import prepare, to_input
from models.preprocess import fit_to_input
from models.teachers import TEACHERS, load_classifier, load_teacher
from models.weights import packaged_lite0, sha256_of


def random_images(count: int = 2, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("picture", "classes"),
    [("cat", range(281, 286)), ("coffee", (504, 967))],
)
def test_lite0_weights_are_wired_right(picture, classes):
    teacher = load_teacher("efficientnet_lite0")
    network = load_classifier("efficientnet_lite0")
    image = torch.from_numpy(fit_to_input(getattr(data, picture)(), 224))[None]
    with torch.inference_mode():
        answer = network(to_input(image, teacher, torch.float32)).argmax().item()
    assert answer in classes


def test_teacher_features_are_those_of_the_classifier():
    teacher = load_teacher("efficientnet_lite0")
    network = load_classifier("efficientnet_lite0")
    taps = {}
    for index in (1, 2, 4):
        network.blocks[index].register_forward_hook(lambda m, i, out, index=index: taps.update({index: out}))
    inputs = to_input(random_images(), teacher, torch.float32)
    with torch.inference_mode():
        network(inputs)
        features = teacher(inputs)
    for feature, tap, channels, stride in zip(features, taps.values(), teacher.channels, (4, 8, 16), strict=True):
        assert feature.shape == (2, channels, 64 // stride, 64 // stride)
        torch.testing.assert_close(feature, tap)


def test_teacher_is_frozen_and_stays_in_evaluation_mode():
    teacher = load_teacher("efficientnet_lite0")
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.weights_sha256 == sha256_of(packaged_lite0())


def test_loading_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    load_teacher("efficientnet_lite0")
    assert torch.equal(before, torch.random.get_rng_state())


def test_input_is_normalised_as_the_teacher_was_trained():
    image = torch.tensor([[[[127, 255, 0]]]], dtype=torch.uint8)
    lite0 = to_input(image, load_teacher("efficientnet_lite0"), torch.float32)
    assert lite0.flatten().tolist() == [0.0, 1.0, -127 / 128]
    assert lite0.shape == (1, 3, 1, 1)
    spec = TEACHERS["resnet18"]
    assert spec.mean[0] / 255 == pytest.approx(0.485)
    assert spec.std[2] / 255 == pytest.approx(0.225)


def test_resnet18_from_a_truncated_file(tmp_path):
    weights = save_resnet18(tmp_path / "conv1-layer3.safetensors")
    teacher = load_teacher("resnet18", weights)
    reference = ResNetBackbone(teacher.channels, width=1.0)
    reference.load_state_dict(safetensors.torch.load_file(weights))
    inputs = to_input(random_images(), teacher, torch.float32)
    with torch.inference_mode():
        for feature, expected in zip(teacher(inputs), reference.eval()(inputs), strict=True):
            torch.testing.assert_close(feature, expected)
    with pytest.raises(TeacherError, match="classification layer"):
        load_classifier("resnet18", weights)


def test_shared_resnet18_weights_load():
    weights = Path(__file__).parents[2] / "shared/weights/resnet18-imagenet-conv1-layer3.safetensors"
    if not weights.is_file():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{weights} is missing")
        pytest.skip(f"{weights} is not on this machine")
    features = load_teacher("resnet18", weights)(torch.zeros(1, 3, 64, 64))
    assert [feature.shape[1] for feature in features] == [64, 128, 256]
    assert all(feature.isfinite().all() for feature in features)


def test_wrong_weights_are_one_clear_error(tmp_path):
    whole = safetensors.torch.load_file(save_resnet18(tmp_path / "whole.safetensors"))
    lacking = {key: value for key, value in whole.items() if key != "layer3.1.conv2.weight"}
    reshaped = whole | {"layer2.0.conv1.weight": torch.zeros(1)}
    cases = {
        "lacks 'conv2.weight'|layer3|1.conv2.weight": lacking,
        "is another network.*torchvision's ImageNet weights of ResNet-18.*efficientnet_lite0": reshaped,
        "weights of another network; use torchvision's": {"something": torch.zeros(1)},
    }
    for index, (message, state) in enumerate(cases.items()):
        path = tmp_path / f"{index}.safetensors"
        safetensors.torch.save_file(state, path)
        with pytest.raises(TeacherError, match=message):
            load_teacher("resnet18", path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04broken"])
def test_unreadable_weights(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TeacherError, match="not a readable weights file") as caught:
        load_teacher("efficientnet_lite0", path)
    assert "\n" not in str(caught.value)


def test_unknown_teacher_and_missing_file(tmp_path):
    with pytest.raises(TeacherError, match=r"resnet34.*did you mean .resnet18.. Known: efficientnet_lite0, resnet18"):
        load_teacher("resnet34")
    with pytest.raises(TeacherError, match="no such file"):
        load_teacher("resnet18", tmp_path / "absent.safetensors")
    with pytest.raises(TeacherError, match="247"):
        load_teacher("efficientnet_lite0", save_resnet18(tmp_path / "resnet.safetensors"))


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(TeacherError, match=r"https://download\.pytorch\.org.*pass the file as weights"):
        load_teacher("resnet18")


def test_preparing_folds_normalisation_without_changing_the_features():
    teacher = load_teacher("efficientnet_lite0")
    ready = prepare(teacher, torch.device("cpu"), torch.float32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    inputs = to_input(random_images(), teacher, torch.float32)
    with torch.inference_mode():
        for folded, plain in zip(ready(inputs), teacher(inputs), strict=True):
            torch.testing.assert_close(folded, plain, rtol=1e-3, atol=1e-4)


def test_folding_keeps_out_of_a_network_that_computes_in_another_order():
    class PreNormalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)
            self.norm.running_mean.fill_(0.5)
            self.norm.running_var.fill_(4.0)

        def forward(self, images):
            return (self.conv(self.norm(images)),)

    network = PreNormalised().eval()
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(fold_batchnorm(network, (images,))(images), network(images))


def save_resnet18(path: Path) -> Path:
    """Random weights in the names and shapes of ResNet-18 up to layer3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = ResNetBackbone((64, 128, 256), width=1.0).state_dict()
    safetensors.torch.save_file(state, path)
    return path
