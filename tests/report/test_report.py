"""Reports of finished, unfinished and damaged runs: their HTML is parsed and compared with results.json."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import itertools
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from analysis.small_runs import write_checkpoint
from PIL import Image
from report.fake_run import HOSTILE, ORDER, write_fake_run
from training.toy import change

from cnext.analysis.run import Run, points
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.report import plots, write_report, write_reports
from cnext.report.samples import answers, images, picture
from cnext.runs import command_line
from cnext.scoring.matrix import FORMULAS
from cnext.studies.flags import configs, parse

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, its tables as rows of text, and whether tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, *head: str) -> dict[str, list[str]]:
        """The rows of the table whose head begins like that, by their first cell."""
        [table] = [table for table in self.tables if table[0][: len(head)] == list(head)]
        return {row[0]: row[1:] for row in table[1:]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_fake_run(tmp_path_factory.mktemp("finished"))
    write_report(folder)
    return folder


def report(folder: Path) -> Page:
    return Page(write_report(folder)[0].read_text())


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    """The run's page."""
    return (run / "report.html").read_text()


def titles(text: str) -> list[str]:
    return re.findall(r"<h2 id=[^>]*>(.*?)</h2>", text)


def offline(text: str, kind: str, more_than: int) -> Page:
    """The page, with all its pictures of some kind within it."""
    page = Page(text)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) > more_than
    assert all(image["src"].startswith(f"data:image/{kind}") and image["alt"] for image in images)
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:|//|file:)""", text)
    return page


def svgs(text: str) -> list[str]:
    """The SVG pictures of a page."""
    images = [attributes["src"] for tag, attributes in Page(text).elements if tag == "img"]
    return [unquote(source.partition(",")[2]) for source in images if source.startswith("data:image/svg+xml,")]


def test_page_is_one_offline_file(text: str) -> None:
    page = offline(text, "", 30)
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object"}
    [script] = re.findall("<script>(.*?)</script>", text, re.S)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert policy.endswith(f"script-src 'sha256-{known}'"), "nothing else may run, whatever a model has answered"
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    assert "prefers-color-scheme:dark" in text


def test_every_section_is_there(run: Path, text: str) -> None:
    assert titles(text) == [
        "Score matrix",
        "Accuracy over stages",
        "Forgetting by error type",
        "Transfer between tasks",
        "Forgotten samples",
        "Generated images over stages",
        "Answers over stages",
        "Adapter updates",
        "Training",
        "Metrics",
        "Cost",
        "Reproduction",
    ]
    assert re.findall(r"^## (.*)", (run / "report.md").read_text(), re.M) == titles(text)


def test_tables_hold_the_results(run: Path, text: str) -> None:
    page, found = Page(text), results(run)
    matrix = page.table("after stage")
    for stage, row in enumerate(found["score_matrix"], 1):
        cells = matrix[f"{stage} {ORDER[stage - 1]}"]
        assert cells[:-1] == [points(value) for value in row]
        assert cells[-1] == points(sum(row[:stage]) / stage)
    shown = page.table("metric")
    paper = found["profiles"]["paper"]["metrics"]
    assert found["metrics"].keys() - shown.keys() == {"bwt"}, "forgetting with the other sign"
    for name, (strict, other, _, formula) in shown.items():
        assert (strict, other, formula) == (points(found["metrics"][name]), points(paper[name]), FORMULAS[name])
    assert shown["avg_acc"][2] == points(paper["avg_acc"] - found["metrics"]["avg_acc"], signed=True)
    mean = page.table("change since learnt")["mean"]
    assert mean[-1] == points(found["metrics"]["forgetting"], signed=True)


def test_scores_per_task_under_both_profiles(run: Path, text: str) -> None:
    found, row = results(run), Page(text).table("task", "zero-shot, strict")["ImageNet"]
    matrices = [found["score_matrix"], found["profiles"]["paper"]["score_matrix"]]
    learnt, end = ([matrix[stage][1] for matrix in matrices] for stage in (1, 5))
    assert row[3:5] == [points(value) for value in learnt]
    assert row[6:8] == [points(value) for value in end]
    assert row[8] == points(end[1] - end[0], signed=True)


def test_headline_in_large_figures(run: Path, text: str) -> None:
    found = results(run)
    large = re.findall(r"<dd><b>(.*?)</b>", text)
    metrics = [found["metrics"][name] for name in ("avg_acc", "forgetting", "new_acc")]
    assert large == [points(value) for value in [*metrics, sum(found["zero_shot"]) / 6]]
    assert 'class="banner"' not in text


def test_untrusted_text_stays_text(run: Path, text: str) -> None:
    marked = (run / "report.md").read_text()
    assert HOSTILE not in text
    assert HOSTILE in html.unescape(text)
    assert "<script>" not in marked
    assert r"\<script\>alert('x')\</script\> \| \*\*red\*\* \& \`blue\`" in marked


def test_untrusted_names_stay_text(tmp_path: Path) -> None:
    page = report(write_fake_run(tmp_path, ("a&b<i>", 'c"d$x_1$'), method="<b>m</b>"))
    assert "i" not in {tag for tag, _ in page.elements}
    assert "1 a&b<i>" in page.table("after stage")


def test_markdown_pictures_exist_and_parse(run: Path) -> None:
    """And those of an earlier report are gone."""
    (run / "report_files" / "earlier.svg").touch()
    write_report(run)
    names = re.findall(r"!\[[^\n]*?\]\(report_files/([\w.]+)\)", (run / "report.md").read_text())
    files = {file.name for file in (run / "report_files").iterdir()}
    assert set(names) == files
    for name in names:
        if name.endswith(".svg"):
            ElementTree.parse(run / "report_files" / name)


def test_report_is_deterministic(run: Path) -> None:
    before = [(run / name).read_bytes() for name in ("report.html", "report.md")]
    assert [path.read_bytes() for path in write_report(run)] == before


@pytest.mark.parametrize("stages", [0, 1, 3])
def test_unfinished_run(tmp_path: Path, stages: int) -> None:
    folder = write_fake_run(tmp_path, stages=stages, samples=8)
    page, text = report(folder), (folder / "report.html").read_text()
    assert f"Unfinished: evaluated up to stage {stages} of 6;" in text
    assert page.table("after stage")["6 HQEdit"] == [points(None)] * 7
    assert ("Forgetting by error type" in text) == (stages > 0)
    assert (folder / "report_files" / "loss_3.svg").is_file() == (stages == 3)


def test_unfinished_matrix_may_have_empty_rows(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path, stages=2, samples=8)
    change(folder / "results.json", score_matrix=[*results(folder)["score_matrix"], None, [None] * 6])
    assert Run.read(folder).last == 2


def test_results_alone_are_enough(tmp_path: Path, run: Path) -> None:
    (tmp_path / "results.json").write_bytes((run / "results.json").read_bytes())
    assert report(tmp_path).table("after stage")
    text = html.unescape((tmp_path / "report.html").read_text())
    assert text.count(f"Not shown: {tmp_path}: the answers in predictions/ are needed and missing") == 2
    assert f"Not shown: {tmp_path}: drift needs the checkpoint of every stage, checkpoints/ lacks 1_VQAv2" in text


def test_what_was_not_trained_has_nothing_to_forget(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path, samples=4, method="zero-shot", averaging=False)
    change(folder / "results.json", cost={"optimizer_steps": 0})
    found = results(folder)
    (folder / "judge").mkdir()
    table = {"judge": "openai", "model": "m", "complete": True, "unjudged": 0, "metrics": found["metrics"]}
    (folder / "judge" / "vlm.json").write_text(json.dumps(table))
    tables = report(folder).tables
    text = (folder / "report.html").read_text()
    assert "Errors by type" in titles(text)
    learnt = {"Forgetting by error type", "Accuracy over stages", "Transfer between tasks", "Forgotten samples"}
    assert not learnt & {*titles(text)}
    assert re.findall(r"<dd><b>(.*?)</b>", text) == [points(found["metrics"]["avg_acc"])]
    assert not {"change since learnt", "judge"} & {table[0][0] for table in tables}
    study = write_reports([tmp_path], tmp_path / "study")[4].read_text()
    assert titles(study) == ["Results", "Scores by task", "Benchmark validity", "Metrics", "Reproduction"]
    assert "Not shown" not in study


def test_smoke_banner(tmp_path: Path) -> None:
    page, _ = write_report(write_fake_run(tmp_path, samples=4, budget="smoke"))
    assert "its scores mean nothing" in page.read_text()


@pytest.mark.parametrize(
    "tasks",
    [("VQAv2",), ("VQAv2", "OCRVQA"), ("HQEdit",), tuple(f"a rather long task {n}" for n in range(11))],
    ids=["one", "text-only", "image-only", "eleven"],
)
def test_any_number_of_tasks(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    folder = write_fake_run(tmp_path, tasks, samples=6, averaging=False)
    page, text = report(folder), (folder / "report.html").read_text()
    assert len(page.table("after stage")) == len(tasks) + 1
    assert ("Generated images over stages" in text) == ("HQEdit" in tasks)
    assert "Moving average" not in text


def test_contact_sheet(run: Path) -> None:
    first, edit = images(Run.read(run)).blocks[1:]
    assert [frame.label for frame in first.frames] == ["target", *map(Run.read(run).stage, (0, 3, 4, 5, 6))]
    assert [frame.content is None for frame in first.frames] == [False, False, False, True, False, False]
    assert first.frames[3].empty == "no image, but text: a picture"
    assert [frame.label for frame in edit.frames] == ["input", "target", "0 zero-shot", "6 HQEdit"]
    rows = {row.id: row for row in Run.read(run).predictions(5, "Flickr30k")}
    assert first.frames[4].verdict in {points(row.strict) for row in rows.values()}


def test_lost_answers(run: Path) -> None:
    record = Run.read(run)
    learnt, end = ({row.id: row for row in record.predictions(stage, "VQAv2")} for stage in (1, 6))
    right = [sample for sample, row in learnt.items() if row.strict == 100]
    lost = [sample for sample in right if end[sample].strict == 0]
    title, *strips = answers(record).blocks[1:5]
    assert title.text == f"VQAv2: of {len(right)} answers correct when learnt, {len(lost)} are wrong at the end"
    assert len(lost) > 3
    for strip in strips:
        verdicts = {frame.label: frame.verdict for frame in strip.frames}
        assert verdicts["1 VQAv2"] == "✓"
        assert verdicts["6 HQEdit"].startswith("✗ ")
    assert len({strip.frames[-1].content for strip in strips}) == 3


def test_data_left_on_another_machine(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path, ("VQAv2", "HQEdit"), samples=12)
    for file in (folder / "data").iterdir():
        file.unlink()
    assert "file not found" in write_report(folder)[0].read_text()


def test_small_pictures_are_enlarged_by_whole_pixels_and_large_ones_shrunk(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    Image.new("L", (1024, 512)).save(tmp_path / "large.png")
    files = [tmp_path / "small.png", tmp_path / "large.png"]
    small, large = (Image.open(io.BytesIO(picture(file, "shown.png", "").data)) for file in files)
    assert np.array_equal(np.asarray(small), pixels.repeat(5, 0).repeat(5, 1))
    assert large.size == (256, 128)


def test_loss_of_a_step_run_twice_counts_once(run: Path, tmp_path: Path) -> None:
    rows = [{"stage": 1, "step": step, "loss": float(loss)} for step, loss in ((1, 9), (2, 8), (1, 7), (2, 6), (3, 5))]
    (tmp_path / "results.json").write_bytes((run / "results.json").read_bytes())
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": 1, "st')
    assert Run.read(tmp_path).losses[1].tolist() == [7, 6, 5]


def shown_command(page: Path) -> list[str]:
    """The words of the command that a page shows, as a shell splits what is copied from it."""
    [command] = re.findall("<pre>(.*?)</pre>", page.read_text(), re.S)
    return shlex.split(html.unescape(re.sub("<.*?>", "", command)))


def test_the_command_gives_the_configuration_back(run: Path, tmp_path: Path, toy_suite: Path) -> None:
    """Copied from the page and parsed as cnext-run parses it, it resolves to config.json and options.json."""
    flags = ["--suite", str(toy_suite), "--data", "a folder/it's", "--out", str(tmp_path / "out"), "--workers", "2"]
    [given] = configs(parse([*flags, "--mage.c", "2.5", "--seeds", "3", "--split", "validation", "--order", "reverse"]))
    planned = plan(given)
    folder = shutil.copytree(run, planned.config.folder)
    (folder / "config.json").write_text(json.dumps(planned.as_dict()))
    command_line.write(planned.config)
    program, *words = shown_command(write_report(folder)[0])
    [again] = configs(parse(words))
    assert program == "cnext-run"
    assert plan(again).as_dict() == planned.as_dict()
    # These decide no numbers, and are no part of config.json.
    assert dataclasses.replace(planned.config, device=again.device, hyperparameters=again.hyperparameters) == again
    (folder / "options.json").write_text("[]")
    with pytest.raises(UserError, match=r"options\.json"):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", None, "no such file; give a folder in which cnext-run has evaluated a stage"),
        ("results.json", "{", "expected JSON, could not read it"),
        ("results.json", "[]", "Expected `object`, got `array`"),
        ("results.json", '{"method": "mage"}', "Object missing required field `suite`"),
        ("cost.json", "{", "expected JSON, could not read it"),
        ("left_out.json", '{"a": {"train": {"malformed": {}}}}', "Object missing required field `count`"),
        ("train.jsonl", "{}}\n", r"train.jsonl:1: expected a JSON object"),
        ("predictions/6_HQEdit/HQEdit/HQEdit-2.png", "no picture", "expected an image"),
    ],
    ids=["missing", "broken", "list", "keys", "cost", "left out", "row", "image"],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder = write_fake_run(tmp_path, samples=4)
    broken = folder / name
    targets = list(broken.parent.glob("*.png")) if name.endswith("png") else [broken]
    for target in targets:
        target.unlink() if content is None else target.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(folder)
    assert str(broken.parent) in str(caught.value)


def linear_rgb(colour: str) -> np.ndarray:
    parts = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.1."""
    darker, lighter = sorted(float(linear_rgb(name) @ (0.2126, 0.7152, 0.0722)) + 0.05 for name in (first, second))
    return lighter / darker


@pytest.mark.parametrize("paper", [plots.PAPER, plots.DARK[plots.PAPER]], ids=["light", "dark"])
def test_contrast(paper: str) -> None:
    texts = [plots.INK, plots.MUTED] if paper == plots.PAPER else [plots.DARK[plots.INK], plots.DARK[plots.MUTED]]
    assert min(contrast(paper, colour) for colour in texts) >= 4.5
    assert min(contrast(paper, colour) for colour in plots.TASK_COLOURS) >= 3
    assert min(contrast(plots.ERROR_COLOURS[error], ink) for error, ink in plots.ON_ERROR_COLOURS.items()) >= 4.5


def test_ink_on_the_deepest_heat() -> None:
    for paper, ink in ((plots.PAPER, plots.INK), (plots.DARK[plots.PAPER], plots.DARK[plots.INK])):
        for colour in (plots.MORE, plots.LESS):
            pairs = zip(*(bytes.fromhex(name[1:]) for name in (colour, paper)), strict=True)
            mixed = bytes(round(plots.DEEPEST * a + (1 - plots.DEEPEST) * b) for a, b in pairs)
            assert contrast(f"#{mixed.hex()}", ink) >= 4.5


SEEN = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""Linear RGB as it is seen with a kind of cone missing: Machado, Oliveira and Fernandes 2009."""


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIELAB of a colour, under D65."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    x, y, z = np.cbrt(np.array(to_xyz) @ np.clip(np.array(seen) @ linear_rgb(colour), 0, 1) / (0.95047, 1, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", SEEN)
def test_colours_stay_apart_for_every_kind_of_colour_vision(cones: str) -> None:
    """A difference of 2 is just seen; neighbours in a bar, and both sides of a heat map, are ten times that apart."""
    pairs = [*itertools.combinations(plots.ERROR_COLOURS.values(), 2), (plots.MORE, plots.LESS)]
    for one, other in pairs:
        assert np.linalg.norm(lab(one, SEEN[cones]) - lab(other, SEEN[cones])) >= 20, (one, other)


@pytest.fixture(scope="module")
def study_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two methods, one of them with two seeds, made from the folder that holds them."""
    folder = tmp_path_factory.mktemp("study")
    write_fake_run(folder / "mage" / "0", samples=4)
    write_fake_run(folder / "mage" / "1", samples=4, seed=1)
    write_fake_run(folder / "<b>lora</b>" / "0", samples=4, method="<b>lora</b>")
    write_fake_run(folder / "slow" / "0", samples=4, stages=2, method="slow")
    write_reports([folder])
    return folder / "study.html"


def test_study_is_one_offline_page(study_page: Path) -> None:
    text = study_page.read_text()
    page = offline(text, "svg+xml", 5)
    assert "<b>lora" not in text
    anchors = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    assert anchors == {attributes["id"] for tag, attributes in page.elements if tag == "h2"}
    assert f"Unfinished and left out: {study_page.parent / 'slow' / '0'}" in html.unescape(text)
    assert "drift needs the checkpoint of every stage" in text
    assert text.startswith("<!doctype html>")
    assert "<title>2 methods on next-tiny</title>" in text


def test_long_names_stand_whole_on_several_lines(tmp_path: Path) -> None:
    """An order may be a list of tasks, and a method's name holds the hyperparameters that differ."""
    turned, long = ",".join(ORDER[::-1]), "mage-of-a-name-longer-than-any-line-of-a-plot-may-be"
    write_fake_run(tmp_path / "0", samples=2, method=long)
    write_fake_run(tmp_path / "1", ORDER[::-1], samples=2, method=long, order=turned)
    text = write_reports([tmp_path])[4].read_text()
    drawn = svgs(text)
    assert len(drawn) == 10, "five of each order"
    for number, plot in enumerate(drawn):
        root = ElementTree.fromstring(plot)
        assert float(root.attrib["viewBox"].split()[2]) < 400
        written = [line for part in root.findall(".//{*}text") for line in part.itertext()]
        assert max(map(len, written)) <= plots.TITLE, number
        words = re.sub(r"\s", "", "".join(written))
        assert long in words
        assert turned in words or "paper" in words, number


def test_a_study_says_how_to_make_it_again(study_page: Path, tmp_path: Path) -> None:
    """It names the folder that holds the runs, or the runs where that folder holds others as well."""
    assert shown_command(study_page) == ["cnext", "report", str(study_page.parent)]
    one, lora = (study_page.parent / name / "0" for name in ("mage", "<b>lora</b>"))
    write_reports([one, lora], tmp_path, baseline="mage", mix=True)
    options = ["--baseline", "mage", "--mix-environments"]
    assert shown_command(tmp_path / "study.html") == ["cnext", "report", str(one), str(lora), *options]


def test_study_tables_hold_the_results(study_page: Path) -> None:
    page = Page(study_page.read_text())
    runs = [results(study_page.parent / "mage" / str(seed)) for seed in (0, 1)]
    mean = sum(found["metrics"]["avg_acc"] for found in runs) / 2
    first = next(table for table in page.tables if table[0][:3] == ["method", "n", "Avg.ACC"])
    assert ["mage", "2", f"{mean:.2f} ± 0.00"] in [row[:3] for row in first]
    broken = page.table("method", "correct when learnt")
    forgetting = results(study_page.parent / "mage" / "0")["metrics"]["forgetting"]
    assert broken["mage"][-1] == f"{forgetting:.1f} ± 0.0"
    assert page.table("metric", "formula and divisor")["Forgetting"] == [FORMULAS["forgetting"]]


def test_study_files(study_page: Path, tmp_path: Path) -> None:
    names = {"study.html", "study.md", "study.csv", "study.tex", "study.json", "analysis.md"}
    assert {file.name for file in study_page.parent.iterdir() if file.is_file()} == names
    before = study_page.read_bytes()
    written = write_reports([study_page.parent], tmp_path / "out")
    assert {file.name for file in written} == {file.name for file in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "study.html").read_bytes() == before
    assert "Left out:" in (tmp_path / "out" / "analysis.md").read_text()


def test_two_runs_make_a_study_beside_them_and_one_a_report(study_page: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        for name in ("results.json", "config.json"):
            (tmp_path / str(seed) / name).write_bytes((study_page.parent / "mage" / str(seed) / name).read_bytes())
    assert tmp_path / "study.html" in write_reports([tmp_path / "0", tmp_path / "1"])
    assert write_reports([tmp_path / "0"]) == [tmp_path / "0" / "report.html", tmp_path / "0" / "report.md"]


def test_options_of_a_study_are_refused_for_one_run(run: Path) -> None:
    for options in ({"baseline": "lora"}, {"mix": True}, {"mix_data": True}):
        with pytest.raises(UserError, match="is one run, but --baseline, --mix-environments and --mix-data are for"):
            write_reports([run], **options)


def test_runs_that_are_not_comparable_write_nothing(tmp_path: Path) -> None:
    write_fake_run(tmp_path / "one", ("VQAv2",), samples=2)
    write_fake_run(tmp_path / "two", ("VQAv2",), samples=2, budget="smoke")
    with pytest.raises(UserError, match="are not comparable"):
        write_reports([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_judges_and_what_they_have_not_judged(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path, ("VQAv2", "OCRVQA"), samples=4)
    (folder / "judge").mkdir()
    averages = {"avg_hal": 1.0, "avg_iuf": 2.0, "avg_oth": 0.25, "forgetting": 3.25}
    tables = {
        "rules": {"judge": "rules", "complete": True, "unjudged": 0, "metrics": averages},
        "vlm": {"judge": "openai", "model": "m", "complete": False, "unjudged": 7, "metrics": dict.fromkeys(averages)},
    }
    of = {"estimate": 1.5, "low": -1.0, "high": 4.0}
    tables["part"] = tables["vlm"] | {"estimates": dict.fromkeys(("avg_hal", "avg_iuf", "avg_oth"), of)}
    for name, table in tables.items():
        (folder / "judge" / f"{name}.json").write_text(json.dumps(table))
    rows = report(folder).table("judge")
    assert rows["rules"] == ["rules", "+1.0", "+2.0", "+0.2", "+3.2", "complete"]
    assert rows["vlm"] == ["m", *[points(None)] * 4, "incomplete, 7 not judged"]
    assert rows["part"] == ["m", *["+1.5 [\N{MINUS SIGN}1.0, +4.0]"] * 3, points(None), "incomplete, 7 not judged"]
    assert "Incomplete: judge vlm has not judged 7 errors" in (folder / "report.html").read_text()


def test_drift_is_drawn_from_checkpoints(tmp_path: Path) -> None:
    tasks, names = ("VQAv2", "HQEdit"), [f"layers.{n}.up.lora.{half}" for n in (0, 1) for half in "AB"]
    folder = write_fake_run(tmp_path, tasks, samples=2)
    for stage in (1, 2):
        write_checkpoint(folder, stage, {name: torch.full((2, 2), float(stage)) for name in names}, tasks)
    rows = report(folder).table("branch", "VQAv2")
    assert rows["lora"] == ["100.00", "100.00"]
    drawn = ElementTree.parse(folder / "report_files" / "drift.svg")
    assert len(drawn.findall(".//{*}image")) == 2, "a heat map for every task"


def test_points() -> None:
    shown = [points(12.34), points(-0.04), points(-2.0, signed=True), points(2.0, signed=True), points(None)]
    assert shown == ["12.3", "0.0", "\N{MINUS SIGN}2.0", "+2.0", "\N{EN DASH}"]


def test_a_held_out_set_and_forward_transfer(run: Path, tmp_path: Path) -> None:
    """Of a run that measured them, by stage; the fixture's, of an earlier version, has neither, and no such section."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    found = results(folder)
    scores = [[50.0 - stage] for stage in range(len(ORDER) + 1)]
    found["held_out"] = {"tasks": ["General"], "samples": {"General": 9}, "scores": scores, "before": [50.0]}
    found["held_out"]["after"] = scores[-1]
    found["metrics"]["fwt"] = -1.25
    (folder / "results.json").write_text(json.dumps(found))
    text = write_report(folder)[0].read_text()
    assert "General ability and forward transfer" in titles(text)
    page = Page(text)
    assert page.table("held-out set")["General"] == [f"{score:.2f}" for (score,) in scores]
    assert page.table("method", "forward transfer") == {"mage": ["\N{MINUS SIGN}1.25"]}
