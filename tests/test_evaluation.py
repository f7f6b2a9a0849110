"""Measuring on labelled sets, through the command that a person types."""

import csv
import json
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from cluster import cli
from cluster.config import ProctorConfig
from cluster.errors import ConfigError
from cluster.evaluation_choice import base_settings, chosen_settings, parse_options
from cluster.evaluation_tables import comparison_table, evaluation_tables
from models.detectors import DETECTORS
from models.errors import TrainingDataError
from models.evaluation import evaluate
from models.figures import Evaluation, Figures
from models.metrics import image_auroc
from models.settings import TrainingSettings, recipe
from models.stfpm import STFPM

QUICK = TrainingSettings(input_size=64, steps=40, device="cpu")
SETS = ["a wide & #1 $et$", "weave"]
NAMES = ["stfpm", "sibling"]


class Sibling(STFPM):
    """Another detector, whatever others there are."""

    name: ClassVar[str] = "sibling"


def texture(generator: np.random.Generator, width: int) -> np.ndarray:
    """A woven pattern at a random phase with sensor noise, (64, width, 3) uint8."""
    y, x = np.mgrid[:64, :width]
    phase = generator.uniform(0, 2 * np.pi, 2)
    weave = np.sin(x / 2 + phase[0]) * np.sin(y / 3 + phase[1])
    grey = 128 + 60 * weave + generator.normal(0, 4, weave.shape)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def write_set(root: Path, test_good: int = 8, test_bad: int = 8, width: int = 64) -> None:
    """A set in MVTec AD's layout: 24 normal images to train on; defects are flat patches, each with its mask."""
    generator = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/patch", "ground_truth/patch"):
        (root / folder).mkdir(parents=True)
    for index in range(24):
        Image.fromarray(texture(generator, width)).save(root / f"train/good/{index:02}.png")
    for index in range(test_good):
        Image.fromarray(texture(generator, width)).save(root / f"test/good/{index:02}.png")
    for index in range(test_bad):
        image, mask = texture(generator, width), np.zeros((64, width), bool)
        top, left = generator.integers(8, 40, 2)
        mask[top : top + 14, left : left + 14] = True
        image[mask] = 128
        Image.fromarray(image).save(root / f"test/patch/{index:02}.png")
        Image.fromarray(mask).save(root / f"ground_truth/patch/{index:02}_mask.png")


@pytest.fixture(autouse=True)
def other_detector(monkeypatch):
    monkeypatch.setitem(DETECTORS, "sibling", Sibling)


def run(monkeypatch, *words):
    """The command line in this process."""
    monkeypatch.setattr(sys, "argv", ["proctor", *map(str, words)])
    try:
        cli.main()
    except SystemExit as ending:
        return ending.code or 0
    return 0


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A comparison's folder and its JSON document, from one run of the command."""
    root = tmp_path_factory.mktemp("report")
    write_set(root / "sets" / SETS[0], width=96)
    write_set(root / "sets" / SETS[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "sibling", Sibling)
        patch.setattr("models.judging._TIMED_S", 0.0)
        patch.setattr("cluster.exhibits.MOST_EXHIBITS", 3)
        patch.setattr(sys, "stdout", (root / "stdout").open("w"))
        words = ["--data", root / "sets", "--steps", 40, "--input-size", 64, "--seeds", 2, "--option", "width=0.25"]
        assert run(patch, "evaluate", *words, "--compare", ",".join(NAMES), "--out", root / "out", "--json") == 0
        sys.stdout.close()
    return root / "out", json.loads((root / "stdout").read_text())


@pytest.fixture(scope="module")
def evaluations(report):
    return [Evaluation.model_validate(each) for each in report[1]["evaluations"]]


def test_the_document_holds_every_figure(report, evaluations):
    out, document = report
    assert json.loads((out / "evaluation.json").read_text()) == document
    assert [each.detector for each in evaluations] == NAMES
    for each in evaluations:
        assert each.teacher == "efficientnet_lite0"
        assert each.detector_options["width"] == 0.25
        assert set(each.detector_options) == set(STFPM.model_fields)
        assert [(one.name, one.seed) for one in each.results] == [(name, seed) for name in SETS for seed in (0, 1)]
        for one in each.results:
            assert (one.train_images, one.test_good, one.test_defects) == (24, 8, 8)
            assert [(kind.kind, kind.images) for kind in one.kinds] == [("good", 8), ("patch", 8)]
            assert one.kinds[1].image_auroc == one.image_auroc
            assert one.kinds[0].rejected / 8 == one.false_reject_rate
            assert 0.8 <= one.image_auroc <= 1
            assert 0.8 <= one.average_precision <= 1
            assert 0.7 <= one.pixel_auroc <= 1
            assert 0 < one.aupro_5 <= one.aupro_30 <= 1
            assert min(one.threshold, one.frames_per_s, one.frames_per_s_single, one.train_seconds) > 0


def test_means_and_spreads_are_over_seeds(evaluations):
    for each in evaluations:
        assert [summary.name for summary in (*each.sets, each.mean)] == [*SETS, "mean"]
        by_set = [[one for one in each.results if one.name == name] for name in SETS]
        for figure in Figures.model_fields:
            values = [[getattr(one, figure) for one in results] for results in by_set]
            for summary, over_seeds in zip(each.sets, values, strict=True):
                assert getattr(summary.mean, figure) == pytest.approx(statistics.fmean(over_seeds))
                assert getattr(summary.spread, figure) == pytest.approx(statistics.stdev(over_seeds))
            means = [statistics.fmean(over_sets) for over_sets in zip(*values, strict=True)]
            assert getattr(each.mean.mean, figure) == pytest.approx(statistics.fmean(means))
            assert getattr(each.mean.spread, figure) == pytest.approx(statistics.stdev(means))


def test_the_scores_are_those_of_the_figures(report, evaluations):
    for each in evaluations:
        for one in each.results:
            path = report[0] / "scores" / each.detector / f"{one.name}-seed{one.seed}.csv"
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            scores = np.array([float(row["score"]) for row in rows])
            defects = np.array([row["kind"] == "patch" for row in rows])
            assert image_auroc(scores, defects) == one.image_auroc
            assert sum(row["verdict"] == "fail" for row in rows) == sum(kind.rejected for kind in one.kinds)


class Page(HTMLParser):
    """What a page shows and leads to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: dict[str, str] = {}
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag == "img":
            self.pictures[unquote(named["src"])] = named["alt"]
        if tag == "a":
            self.links.append(unquote(named["href"]))
        self.ids |= {named["id"]} if "id" in named else set()

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_everything_and_needs_no_network(report, evaluations):
    out, _ = report
    source = (out / "index.html").read_text(encoding="utf-8")
    assert "http://" not in source
    assert "https://" not in source
    assert "url(" not in source
    page = Page(out / "index.html")
    drawn = {path.relative_to(out).as_posix() for path in out.glob("images/**/*") if path.is_file()}
    assert set(page.pictures) == drawn
    assert all(page.pictures.values())
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (out / link).is_file()
    shown = " ".join(page.text)
    for name in SETS:
        for detector in NAMES:
            folder = f"images/{detector}/{name}"
            assert {f"{folder}/roc.png", f"{folder}/scores.png"} <= drawn
            assert f"{name}, {detector}" in shown
    for each in evaluations:
        first = [one for one in each.results if one.seed == 0]
        rejected = sum(kind.rejected for one in first for kind in one.kinds)
        assert rejected > 3
    assert "more left out" in shown
    hits = {name: alt for name, alt in page.pictures.items() if "/hit-" in name and not name.endswith("-map.jpg")}
    assert hits
    assert all(alt.startswith("patch, ") and alt.endswith(", the defect outlined") for alt in hits.values())


def test_exhibits_come_in_the_order_that_they_promise(report):
    out, _ = report
    alts = Page(out / "index.html").pictures
    for folder in sorted(path for path in out.glob("images/*/*") if path.is_dir()):
        ratios = [
            float(alts[f"{folder.relative_to(out).as_posix()}/{path.name}"].split(": score ")[1].split(" ")[0])
            for path in sorted(folder.glob("hit-??.jpg"))
        ]
        assert ratios == sorted(ratios, reverse=True)
        assert all(ratio >= 1 for ratio in ratios)


def test_an_exhibit_keeps_its_shape_and_shows_its_mask(report):
    path = next((report[0] / "images/stfpm" / SETS[0]).glob("hit-01.jpg"))
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape == (213, 320, 3)  # 64 x 96, as the camera saw it
    red, blue = picture[:, :, 0], picture[:, :, 2]
    assert (blue - red > 80).any()  # the images are grey, the outline is not


def test_every_table_names_every_detector(evaluations):
    *each_detection, comparison = evaluation_tables(evaluations)
    assert [table.title.split(",")[0] for table in each_detection] == NAMES
    assert comparison == comparison_table(evaluations)
    assert [row[0] for row in comparison.rows] == ["detector", *NAMES]
    assert comparison.rows[0][1:3] == [f"{SETS[0]} AUROC %", f"{SETS[0]} AUPRO %"]
    assert comparison.rows[0][-3:] == ["frames/s", "frames/s one by one", "training s"]
    many = [each.model_copy(update={"sets": each.sets * 3}) for each in evaluations]
    turned = comparison_table(many).rows
    assert turned[0] == ["detector", *NAMES]
    assert len(turned) == 1 + 2 * (6 + 1) + 3


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the path to open the page with")
def test_a_browser_shows_the_page(report, tmp_path):
    flags = "headless no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync"
    picture = tmp_path / "page.png"
    command = ["chromium", *(f"--{flag}" for flag in (*flags.split(), "no-first-run", "hide-scrollbars"))]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,2400", f"--screenshot={picture}"]
    subprocess.run([*command, (report[0] / "index.html").as_uri()], check=True, capture_output=True, timeout=120)
    seen = np.asarray(Image.open(picture).convert("RGB"))
    assert seen.shape[:2] == (2400, 1280)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 1000  # pictures, not an empty page


def test_a_mask_that_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("models.judging._TIMED_S", 0.0)
    write_set(tmp_path / "weave", 3, 3)
    next(iter(sorted((tmp_path / "weave/ground_truth").rglob("*.png")))).unlink()
    assert run(monkeypatch, "evaluate", "--data", tmp_path / "weave", "--steps", 2, "--input-size", 64) == 0
    assert "defects lack a mask, so pixels are not measured" in capsys.readouterr().err.replace("\n", " ")


def test_tables_on_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("models.judging._TIMED_S", 0.0)
    write_set(tmp_path / "weave", 3, 3)
    shutil.rmtree(tmp_path / "weave/ground_truth")
    words = ["--data", tmp_path / "weave", "--steps", 2, "--input-size", 64]
    assert run(monkeypatch, "evaluate", *words, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "associative, efficientnet_lite0, 64²" in captured.out
    assert "training and speed" in captured.out
    assert "held-out images where 1.0% false rejects need 99" in captured.err.replace("\n", " ")
    assert str(tmp_path / "out/index.html") in captured.err.replace("\n", "")
    page = (tmp_path / "out/index.html").read_text()
    assert "summary.png" not in page  # one point is no picture
    assert "outlined" not in page


def test_progress_names_every_phase_and_sees_maps(tmp_path):
    write_set(tmp_path / "weave", 3, 3)
    steps, judged = [], []
    result = evaluate(tmp_path, QUICK.model_copy(update={"steps": 20}), None, steps.append, judged.append)
    assert list(dict.fromkeys(step.phase for step in steps)) == ["reading", "training", "judging", "measuring"]
    assert [step.loss is not None for step in steps if step.done == 20] == [True]
    (only,) = judged
    assert only.maps.shape == (6, 64, 64)
    assert only.result == result.results[0]
    assert result.mean.spread is None


def test_a_wrong_mask_is_found_before_the_training(tmp_path):
    write_set(tmp_path / "weave", 2, 2)
    (tmp_path / "weave/ground_truth/patch/01_mask.png").write_bytes(b"no picture")
    steps = []
    with pytest.raises(TrainingDataError, match="01_mask"):
        evaluate(tmp_path, QUICK, None, steps.append)
    assert {step.phase for step in steps} == {"reading"}


def test_a_set_needs_defects(tmp_path):
    write_set(tmp_path / "weave", 2, 0)
    (tmp_path / "weave/test/patch").rmdir()
    with pytest.raises(TrainingDataError, match="good and defective"):
        evaluate(tmp_path, QUICK)


def test_options_are_json_or_text_and_nest():
    options = ["width=0.5", "fusion.kind=sum", "fusion.weights=[1, 2]", 'name="3"', "on=true", "nested.a.b=x=y"]
    assert parse_options(options) == {
        "width": 0.5,
        "fusion": {"kind": "sum", "weights": [1, 2]},
        "name": "3",
        "on": True,
        "nested": {"a": {"b": "x=y"}},
    }
    for wrong in ("width", "=1", "a..b=1"):
        with pytest.raises(ConfigError, match="expected name=value"):
            parse_options([wrong])
    with pytest.raises(ConfigError, match="value of its own"):
        parse_options(["fusion=sum", "fusion.kind=sum"])


def test_a_recipes_options_are_for_its_own_detector_only():
    paper = recipe("paper")
    assert paper.detector_options
    own, other = chosen_settings(paper, ["stfpm", "sibling", "stfpm"], [], {"steps": 7}, {})
    assert (own.detector_options, own.steps) == (paper.detector_options, 7)
    assert (other.detector, other.detector_options, other.steps) == ("sibling", {}, 7)
    (merged,) = chosen_settings(paper, [], ["hardest=0.1"], {}, {})
    assert merged.detector_options == paper.detector_options | {"hardest": 0.1}
    assert recipe("paper").detector_options == paper.detector_options


def test_weights_are_those_of_the_teacher_that_is_used():
    teachers, mine = {"resnet18": "/r.safetensors"}, TrainingSettings(weights="/mine.safetensors")

    def weights(base, **overrides):
        return chosen_settings(base, [], [], overrides, teachers)[0].weights

    assert weights(recipe("paper")) == "/r.safetensors"
    assert weights(recipe("paper"), weights="/given.safetensors") == "/given.safetensors"
    assert weights(recipe("fast")) is None
    assert weights(mine) == "/mine.safetensors"
    assert weights(mine, teacher="resnet18") == "/r.safetensors"


def test_a_products_settings_are_evaluated_as_its_trainings_have_them():
    config = ProctorConfig.model_validate({"training": {"steps": 7}, "products": {"bolt": {"input_size": 96}}})
    settings = base_settings(config, None, "bolt")
    assert (settings.steps, settings.input_size) == (7, 96)
    assert base_settings(config, None, None) == recipe("fast")
    assert base_settings(config, "paper", None) == recipe("paper")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--product", "bolt", "--recipe", "fast"], "leave out --recipe, or --product"),
        (["--detector", "magic"], 'unknown detector: "magic"; Known: associative'),
        (["--compare", "stfpm,,sibling"], 'unknown detector: ""'),
        (["--option", "widht=1"], 'unknown option: "widht"; did you mean "width"? Known: '),
        (["--option", "width"], "--option width: expected name=value"),
        (["--input-size", "65"], "--input-size 65"),
        (["--out", "file"], "--out file: "),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(words, says, tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "weave", 2, 2)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.evaluation.train", lambda *args, **named: pytest.fail("it trained"))
    assert run(monkeypatch, "evaluate", "--data", "weave", *words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("proctor: ")
    assert says in captured.err
    assert captured.err.count("\n") == 1
