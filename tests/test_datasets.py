import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.datasets import InspectionSet, LabelledImage, find_sets, read_mask
from models.errors import TrainingDataError
from models.holdout import split_by_name
from models.images import read_image

HEIGHT, WIDTH = 6, 8


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(folder / name)


def write_mask(path: Path, mask: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8) if mask is None else mask).save(path)


def write_rows(path: Path, *rows: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def names(found: InspectionSet) -> tuple[list[str], list[tuple[str, str]]]:
    return [path.name for path in found.train], [(image.path.name, image.kind) for image in found.test]


def the_line(folder: Path) -> str:
    """What a folder is refused with, which is one line that begins with the place."""
    with pytest.raises(TrainingDataError) as caught:
        find_sets(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(folder))
    return line


# --- MVTec AD


def write_mvtec(root: Path, kinds: tuple[str, ...] = ("good", "scratch")) -> Path:
    for folder in ("train/good", *(f"test/{kind}" for kind in kinds)):
        write_images(root / folder, "0.png")
    return root


def test_mvtec(tmp_path):
    write_mask(write_mvtec(tmp_path / "nut") / "ground_truth/scratch/0_mask.png")
    write_mvtec(tmp_path / "bolt")
    bolt, nut = find_sets(tmp_path)
    assert (bolt.name, nut.name) == ("bolt", "nut")
    assert names(nut) == (["0.png"], [("0.png", "good"), ("0.png", "scratch")])
    assert [image.is_defect for image in nut.test] == [False, True]
    assert nut.has_masks
    assert not bolt.has_masks
    assert bolt.without_mask == [bolt.test[1]]
    assert [each.name for each in find_sets(tmp_path / "nut")] == ["nut"]


def test_mvtec_masks_may_carry_the_images_name(tmp_path):
    write_mask(write_mvtec(tmp_path) / "ground_truth/scratch/0.png")
    write_mask(tmp_path / "ground_truth/good/0.png")
    (found,) = find_sets(tmp_path)
    assert [image.mask for image in found.test] == [None, tmp_path / "ground_truth/scratch/0.png"]


def test_normal_test_images_are_no_defect_whatever_their_folder_is_called(tmp_path):
    (found,) = find_sets(write_mvtec(tmp_path, ("OK", "scratch")))
    assert [image.kind for image in found.test] == ["good", "scratch"]


def test_the_name_is_the_folders_also_from_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(write_mvtec(tmp_path / "nut"))
    assert [each.name for each in find_sets(".")] == ["nut"]


def test_incomplete_mvtec(tmp_path):
    (tmp_path / "train").mkdir()
    assert "train: expected a folder good or ok or normal, found nothing; add or rename it" in the_line(tmp_path)
    (tmp_path / "train/good").mkdir()
    assert "train/good: holds no images" in the_line(tmp_path)
    write_images(tmp_path / "train/good", "0.png")
    assert "test: no such folder; expected test/good and test/DEFECT beside train, found train/" in the_line(tmp_path)
    write_images(tmp_path / "test", "0.png")
    assert "test: expected a folder for each defect, and 'good', found 0.png" in the_line(tmp_path)
    (tmp_path / "test/scratch").mkdir()
    assert "test/scratch: holds no images" in the_line(tmp_path)


# --- VisA


def write_visa(root: Path, name: str = "candle", normals: int = 10) -> Path:
    images = root / name / "Data/Images"
    write_images(images / "Normal", *(f"{index:03}.JPG" for index in range(normals)))
    write_images(images / "Anomaly", "000.JPG", "001.JPG")
    write_mask(root / name / "Data/Masks/Anomaly/000.png")
    write_mask(root / name / "Data/Masks/Anomaly/001.png")
    return root / name


def split_rows(name: str, train: str = "000 001", normal: str = "002", anomaly: str = "000 001") -> list[tuple]:
    images, masks = f"{name}/Data/Images", f"{name}/Data/Masks"
    return [
        *((name, "train", "normal", f"{images}/Normal/{stem}.JPG", "") for stem in train.split()),
        *((name, "test", "normal", f"{images}/Normal/{stem}.JPG", "") for stem in normal.split()),
        *(
            (name, "test", "anomaly", f"{images}/Anomaly/{stem}.JPG", f"{masks}/Anomaly/{stem}.png")
            for stem in anomaly.split()
        ),
    ]


SPLIT_HEADER = ("object", "split", "label", "image", "mask")


def test_visa_with_its_official_split(tmp_path):
    write_visa(tmp_path, "candle")
    write_visa(tmp_path, "pcb1")
    # As published it lists sets that need not be unpacked, and leaves out nothing; here it leaves out images too.
    rows = [*split_rows("candle"), *split_rows("pcb1", train="005"), *split_rows("fryum")]
    write_rows(tmp_path / "split_csv/1cls.csv", SPLIT_HEADER, *rows)
    candle, pcb = find_sets(tmp_path)
    assert (candle.name, pcb.name) == ("candle", "pcb1")
    defects = [("000.JPG", "anomaly"), ("001.JPG", "anomaly")]
    assert names(candle) == (["000.JPG", "001.JPG"], [("002.JPG", "good"), *defects])
    assert names(pcb) == (["005.JPG"], [("002.JPG", "good"), *defects])
    assert candle.has_masks
    assert candle.test[1].mask == tmp_path / "candle/Data/Masks/Anomaly/000.png"
    assert find_sets(tmp_path / "candle") == [candle]


def test_visa_without_a_split_file_is_split_by_name(tmp_path):
    (found,) = find_sets(write_visa(tmp_path, normals=200))
    good = [image for image in found.test if not image.is_defect]
    assert len(found.train) + len(good) == 200
    assert 25 <= len(good) <= 55
    assert not set(found.train) & {image.path for image in good}
    assert [image.kind for image in found.test if image.is_defect] == ["anomaly", "anomaly"]
    assert found.has_masks


@pytest.mark.parametrize("with_split", [True, False])
def test_visa_defects_are_named_by_their_annotations(tmp_path, with_split):
    folder = write_visa(tmp_path)
    if with_split:
        write_rows(tmp_path / "split_csv/1cls.csv", SPLIT_HEADER, *split_rows("candle"))
    write_rows(
        folder / "image_anno.csv",
        ("image", "label", "mask"),
        ("candle/Data/Images/Normal/001.JPG", "normal", ""),
        ("candle/Data/Images/Anomaly/000.JPG", "weird wick, missing wax", "candle/Data/Masks/Anomaly/000.png"),
        ("candle/Data/Images/Anomaly/001.JPG", "normal", "candle/Data/Masks/Anomaly/001.png"),
    )
    (found,) = find_sets(folder)
    kinds = {image.path.name: image.kind for image in found.test if image.is_defect}
    # One that is among the defects is one, whatever its annotation says.
    assert kinds == {"000.JPG": "missing wax, weird wick", "001.JPG": "anomaly"}


def test_a_visa_defect_without_a_mask(tmp_path):
    folder = write_visa(tmp_path)
    (folder / "Data/Masks/Anomaly/001.png").unlink()
    (found,) = find_sets(folder)
    assert not found.has_masks
    assert [image.path.name for image in found.without_mask] == ["001.JPG"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("object", "image")], "expected the columns object, split, label, image, mask, found object, image"),
        ([SPLIT_HEADER], "expected images of 'candle' to train on and to test, found those of nothing"),
        ([SPLIT_HEADER, *split_rows("pcb1")], "found those of pcb1; give the folder its published name"),
        ([SPLIT_HEADER, *split_rows("candle", train="")], "expected images of 'candle' to train on and to test"),
        ([SPLIT_HEADER, ("candle", "train")], "found 'train' of '' for ; use VisA's own"),
        ([SPLIT_HEADER, *split_rows("candle", normal="777")], "777.JPG: no such file, but"),
        ([SPLIT_HEADER, ("candle", "val", *split_rows("candle")[0][2:])], "found 'val' of 'normal'"),
        ([SPLIT_HEADER, ("candle", "train", *split_rows("candle")[-1][2:])], "found 'train' of 'anomaly'"),
    ],
)
def test_wrong_visa_splits(tmp_path, rows, message):
    write_visa(tmp_path)
    write_rows(tmp_path / "split_csv/1cls.csv", *rows)
    assert message in the_line(tmp_path)


def test_split_file_that_is_no_table(tmp_path):
    write_visa(tmp_path)
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"\xff\xfe\x00")
    assert "1cls.csv: unreadable" in the_line(tmp_path)


def test_incomplete_visa(tmp_path):
    images = tmp_path / "Data/Images"
    write_images(images / "Normal", "000.JPG")
    assert "Normal: expected an image to train on and one to test at least, found one; add more" in the_line(tmp_path)
    write_images(images / "Normal", "001.JPG")
    assert "Images: expected a folder anomaly, found Normal/; add or rename it" in the_line(tmp_path)


# --- good/bad


def write_plain(root: Path, good: str = "good", bad: str = "bad", count: int = 20) -> Path:
    write_images(root / good, *(f"{index:03}.png" for index in range(count)))
    write_images(root / bad, "000.png", "x.png")
    return root


@pytest.mark.parametrize(
    ("good", "bad"),
    [("good", "bad"), ("OK", "NG"), ("normal", "defect"), ("Normal", "Defects"), ("normal", "anomaly")],
)
def test_good_and_bad(tmp_path, good, bad):
    (found,) = find_sets(write_plain(tmp_path / "nut", good, bad))
    assert found.name == "nut"
    held = [image.path for image in found.test if not image.is_defect]
    assert sorted([*found.train, *held]) == sorted((tmp_path / "nut" / good).iterdir())
    assert {image.kind for image in found.test} == {"good", bad.lower()}
    assert not found.has_masks
    assert len(found.without_mask) == 2


def test_masks_of_bad(tmp_path):
    write_mask(write_plain(tmp_path) / "Masks/000.png")
    write_mask(tmp_path / "Masks/x_mask.png")
    (found,) = find_sets(tmp_path)
    # A good image of the same name has none of it.
    assert [image.mask.name for image in found.test if image.mask] == ["000.png", "x_mask.png"]
    assert found.has_masks


def test_files_that_are_added_move_none(tmp_path):
    (before,) = find_sets(write_plain(tmp_path, count=20))
    (after,) = find_sets(write_plain(tmp_path, count=400))
    assert set(before.train) <= set(after.train)
    assert set(before.test) <= set(after.test)
    assert 90 <= sum(not image.is_defect for image in after.test) <= 150


def test_a_split_by_name_leaves_no_side_empty():
    for count in range(2, 6):
        for start in range(50):
            paths = [Path(f"{start}-{index}.png") for index in range(count)]
            for share in (0.01, 0.99):
                train, held = split_by_name(paths, share)
                assert train
                assert held
                assert sorted([*train, *held]) == sorted(paths)
    assert split_by_name([Path("a.png")], 0.5) == ([Path("a.png")], [])
    # Only the name counts, not where the file lies.
    assert [len(side) for side in split_by_name([Path(f"{index}/a.png") for index in range(3)], 0.5)] == [3, 0]


def test_incomplete_good_and_bad(tmp_path):
    write_images(tmp_path / "good", "0.png")
    assert "good: expected an image to train on and one to test at least, found one" in the_line(tmp_path)
    write_images(tmp_path / "good", "1.png")
    wanted = "expected a folder bad or ng or defect or defects or anomaly, found good/; add or rename it"
    assert wanted in the_line(tmp_path)
    (tmp_path / "bad").mkdir()
    assert "bad: holds no images" in the_line(tmp_path)
    write_images(tmp_path / "bad", "0.png")
    assert find_sets(tmp_path)
    (tmp_path / "ok").mkdir()
    assert "expected one folder of good, ok, normal, found good, ok; join them" in the_line(tmp_path)


# --- all layouts


def test_a_folder_of_sets_of_all_layouts(tmp_path):
    write_plain(tmp_path / "a")
    write_visa(tmp_path, "b")
    write_mvtec(tmp_path / "c")
    (tmp_path / "notes").mkdir()
    assert [each.name for each in find_sets(tmp_path)] == ["a", "b", "c"]
    (tmp_path / "c/train/good/0.png").unlink()
    assert "c/train/good: holds no images" in the_line(tmp_path)


def test_no_set(tmp_path):
    assert "no such folder" in the_line(tmp_path / "absent")
    assert "expected train/good and test/DEFECT (MVTec AD), Data/Images" in the_line(tmp_path)
    write_images(tmp_path, *(f"{index}.png" for index in range(8)))
    assert "found 0.png, 1.png, 2.png, 3.png, 4.png, 5.png and 2 more; sort the images" in the_line(tmp_path)
    assert "is a file, not a folder" in the_line(tmp_path / "0.png")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "Permission denied" in the_line(tmp_path)


# --- masks


@pytest.fixture
def defect(tmp_path):
    write_images(tmp_path, "a.png")
    return LabelledImage(tmp_path / "a.png", "scratch", tmp_path / "a_mask.png")


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(np.eye(HEIGHT, WIDTH) > 0),
        Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8) * 255),
        Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)),
        Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint16)),
        Image.fromarray(np.dstack([np.eye(HEIGHT, WIDTH) * channel for channel in (0, 128, 0)]).astype(np.uint8)),
        Image.fromarray(np.dstack([np.eye(HEIGHT, WIDTH) * channel for channel in (9, 0, 0, 0)]).astype(np.uint8)),
    ],
    ids=["1 bit", "8 bits", "class numbers", "class numbers in 16 bits", "green", "with alpha"],
)
def test_whatever_is_not_black_is_defective(defect, mask):
    mask.save(defect.mask)
    read = read_mask(defect)
    assert read.dtype == bool
    np.testing.assert_array_equal(read, np.eye(HEIGHT, WIDTH) > 0)


def test_a_palette_means_its_colours(defect):
    mask = Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8) * 2).convert("P")
    mask.putpalette([0, 0, 0, 255, 255, 255, 0, 0, 128])
    mask.save(defect.mask)
    np.testing.assert_array_equal(read_mask(defect), np.eye(HEIGHT, WIDTH) > 0)


def test_masks_of_another_size(defect):
    write_mask(defect.mask, np.kron(np.eye(HEIGHT, WIDTH, dtype=np.uint8), np.ones((50, 50), np.uint8)))
    assert read_mask(defect).shape == (300, 400)
    small = read_mask(defect, 4)
    assert (small.shape, small.dtype) == ((4, 4), bool)
    assert small.any()


def test_rounding_is_no_other_aspect_ratio(tmp_path):
    Image.fromarray(np.zeros((1001, 700), np.uint8)).save(tmp_path / "a.png")
    write_mask(tmp_path / "a_mask.png", np.ones((334, 233), np.uint8))
    assert read_mask(LabelledImage(tmp_path / "a.png", "scratch", tmp_path / "a_mask.png")).shape == (334, 233)


@pytest.mark.parametrize("shape", [(WIDTH, HEIGHT), (600, 815), (600, 785)])
def test_another_images_mask_is_refused(defect, shape):
    write_mask(defect.mask, np.ones(shape, np.uint8))
    wanted = rf"a_mask.png: expected the shape of a.png, 8 x 6, found {shape[1]} x {shape[0]}; is it another"
    with pytest.raises(TrainingDataError, match=wanted):
        read_mask(defect)


def test_a_black_mask_of_a_defect_marks_nothing(defect):
    write_mask(defect.mask, np.zeros((HEIGHT, WIDTH), np.uint8))
    assert read_mask(defect).shape == (HEIGHT, WIDTH)
    assert not read_mask(defect).any()
    assert not read_mask(defect, 8).any()


def test_a_good_image_has_nothing_defective(tmp_path):
    write_images(tmp_path, "a.png")
    good = LabelledImage(tmp_path / "a.png", "good", None)
    assert read_mask(good).shape == (HEIGHT, WIDTH)
    assert read_mask(good, 16).shape == (16, 16)
    assert not read_mask(good).any()


def test_a_defect_of_unknown_place_has_no_mask_to_read(tmp_path):
    write_images(tmp_path, "a.png")
    with pytest.raises(TrainingDataError, match=r"a.png: this defect has no mask"):
        read_mask(LabelledImage(tmp_path / "a.png", "scratch", None), 16)


def test_unreadable_masks(defect):
    with pytest.raises(TrainingDataError, match=r"a_mask.png: No such file"):
        read_mask(defect)
    defect.mask.write_bytes(b"hello")
    with pytest.raises(TrainingDataError, match=r"a_mask.png: not an image"):
        read_mask(defect)


def test_a_set_without_defects_has_no_masks(tmp_path):
    (found,) = find_sets(write_mvtec(tmp_path, ("good",)))
    assert not found.has_masks
    assert found.without_mask == []


def test_the_images_are_readable(tmp_path):
    (found,) = find_sets(write_visa(tmp_path))
    assert read_image(found.train[0]).shape == (HEIGHT, WIDTH, 3)
