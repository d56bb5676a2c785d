"""What every page promises its readers: main figures first, plain words, bounded size, accessible markup."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from report.fake_run import ORDER, write_fake_run, write_reported_run
from report.test_report import Page, contrast, results, svgs, titles

from cnext.analysis.run import points
from cnext.report import blocks, page, plots, write_report, write_reports
from cnext.report.compact import compact
from cnext.report.samples import picture

LIMIT = 1_000_000
"""Bytes of a page."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every section, adapter updates included."""
    return write_reported_run(tmp_path_factory.mktemp("run")).parent


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds, and one of them in another order."""
    folder = tmp_path_factory.mktemp("study")
    for method, seed in itertools.product(("mage", "lora"), (0, 1)):
        write_fake_run(folder / method / str(seed), samples=4, method=method, seed=seed)
    change(folder / "lora" / "0" / "results.json", 5.0)
    write_fake_run(folder / "turned", ORDER[::-1], samples=4, order="reverse")
    write_reports([folder])
    return folder


def change(file: Path, more: float) -> None:
    """Raises every score of a run by so many points, and the metrics with them."""
    found = json.loads(file.read_text())
    found["score_matrix"] = [[None if v is None else v + more for v in row] for row in found["score_matrix"]]
    for name in ("avg_acc", "new_acc"):
        found["metrics"][name] += more
    file.write_text(json.dumps(found))


@pytest.fixture(params=["report", "study"])
def text(request: pytest.FixtureRequest, run: Path, study: Path) -> str:
    """Each kind of page."""
    folder = {"report": run, "study": study}[request.param]
    return (folder / f"{request.param}.html").read_text()


def shown(text: str) -> str:
    """The words of a page, without its pictures."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)
    return " ".join(re.sub("<[^>]+>", " ", body).split())


def test_main_figures_come_first(run: Path) -> None:
    words, metrics = shown((run / "report.html").read_text()), results(run)["metrics"]
    known = [points(metrics[name]) for name in ("avg_acc", "forgetting", "new_acc")]
    places = [
        words.index(f"{name} {value}") for name, value in zip(("Avg.ACC", "Forgetting", "New.ACC"), known, strict=True)
    ]
    assert places == sorted(places)
    sentence = (
        f"After learning 6 tasks one after another, the model reaches a mean score of {known[0]} percent on them. "
        f"Right after learning each of them it reached {known[2]}; the tasks before the last one have lost {known[1]} "
        "points each since then, on average."
    )
    assert places[-1] < words.index(sentence)
    assert titles((run / "report.html").read_text())[:2] == ["Score matrix", "Accuracy over stages"]
    marked = (run / "report.md").read_text()
    assert marked.index("| Avg.ACC |") < marked.index(sentence) < marked.index("## Score matrix")


def test_a_gain_is_not_called_a_loss(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path, samples=4)
    found = results(folder)
    found["metrics"]["forgetting"] = -2.5
    (folder / "results.json").write_text(json.dumps(found))
    assert "have gained 2.5 points each since then" in shown(write_report(folder)[0].read_text())


def test_a_study_names_the_best_of_each_metric(study: Path) -> None:
    """Of the order that most methods have run on, with what each figure means."""
    words = shown((study / "study.html").read_text())
    means = {m: np.mean([results(study / m / str(s))["metrics"]["avg_acc"] for s in (0, 1)]) for m in ("mage", "lora")}
    assert means["lora"] > means["mage"]
    assert (
        f"Avg.ACC {points(means['lora'])} highest, by lora: mean score over all tasks at the end, in percent" in words
    )
    assert "Of 2 methods that learn the tasks one after another in the order paper, lora has the highest score" in words
    assert titles((study / "study.html").read_text())[:3] == [
        "Results",
        "Scores by task",
        "Accuracy and forgetting over stages",
    ]


def test_scores_by_task_are_the_last_rows_of_the_matrices(study: Path) -> None:
    [table] = [
        t for t in Page((study / "study.html").read_text()).tables if t[0] == ["method", "order", *ORDER, "average"]
    ]
    last = np.mean([results(study / "lora" / str(s))["score_matrix"][-1] for s in (0, 1)], axis=0)
    [row] = [row for row in table if row[:2] == ["lora", "paper"]]
    assert row[2:-1] == [points(value) for value in last]
    turned = results(study / "turned")
    [row] = [row for row in table if row[:2] == ["mage", "reverse"]]
    assert row[2:-1] == [points(turned["score_matrix"][-1][turned["tasks"].index(task)]) for task in ORDER]


def test_words_stand_in_place_of_formulas(text: str) -> None:
    """Above the sections that define the metrics exactly."""
    above = shown(text.partition(">Metrics</h2>")[0])
    assert not re.findall(r"Σ|\bR\[|\w_\{|\bT-1\b|max\(0", above)
    assert shown(text).count("bootstrap") <= 1


def test_norms_are_a_heat_map_alone(run: Path) -> None:
    """The report shows where updates are large, and how they are shared out; `analyze` lists the norms."""
    marked = (run / "report.md").read_text()
    assert "report_files/drift.svg" in marked
    assert "| branch | VQAv2 |" in marked
    assert not re.search(r"\| (branch \| task|branch \| layer|from stage)", marked)
    assert f"cnext analyze {run} --what drift" in marked
    rows = [line for line in marked.splitlines() if line.startswith(("| a ", "| b "))]
    assert len(rows) == 2


def test_markdown_folds_what_the_page_folds(run: Path) -> None:
    marked = (run / "report.md").read_text()
    page = Page((run / "report.html").read_text())
    assert marked.count("<details>") == marked.count("</details>") == [tag for tag, _ in page.elements].count("details")


def test_markup_is_accessible(text: str) -> None:
    """What axe checks of a page's structure; tests/report/accessibility.py runs axe itself."""
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert next(attributes for tag, attributes in page.elements if tag == "html")["lang"] == "en"
    assert tags.count("title") == tags.count("main") == tags.count("h1") == 1
    assert re.search(r"<title>\S.*</title>", text)
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    alts = [attributes.get("alt", "") for tag, attributes in page.elements if tag == "img"]
    assert all(len(alt.split()) > 1 for alt in alts)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.elements if tag == "th")
    assert all(attributes.get("aria-label") for tag, attributes in page.elements if tag in ("table", "nav"))
    scrolling = [a for _, a in page.elements if "wide" in a.get("class", "").split()]
    assert scrolling
    assert all(a.get("tabindex") == "0" and a.get("role") == "group" and a.get("aria-label") for a in scrolling)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))


def test_every_wide_block_has_a_hint(text: str) -> None:
    for opened in re.findall(r'(<p class="hint"[^>]*>[^<]*</p>)?\s*<div class="wide', text):
        assert "Scroll sideways" in opened


@pytest.mark.parametrize("paper", [plots.PAPER, plots.DARK[plots.PAPER]], ids=["light", "dark"])
def test_ink_stands_out_on_the_coloured_cells_of_a_table(paper: str) -> None:
    style = Path(page.__file__).with_name("templates").joinpath("style.css").read_text()
    [(red, green, blue, depth)] = re.findall(r"background: rgb\((\d+) (\d+) (\d+) / calc\(([\d.]+) \*", style)
    under = bytes.fromhex(paper[1:])
    pairs = zip((int(red), int(green), int(blue)), under, strict=True)
    mixed = bytes(round(float(depth) * over + (1 - float(depth)) * below) for over, below in pairs)
    ink = plots.INK if paper == plots.PAPER else plots.DARK[plots.INK]
    assert contrast(f"#{mixed.hex()}", ink) >= 4.5


def test_a_table_colours_the_cells_that_it_is_told_to() -> None:
    table = blocks.Table(["a", "b", "c"], [["x", "1", "2"]], heat=[[np.nan, 0.25, np.nan]])
    text = page.html([blocks.Section("t", []), blocks.Section("s", [table])])
    assert re.findall(r'<td style="([^"]*)">(\d)</td>', text) == [("--heat:0.25", "1")]
    assert "<td>2</td>" in text


def test_compact_svg_draws_the_same() -> None:
    """Every line of text and every shape stays; what nothing refers to goes."""
    import matplotlib
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(2, 1)), io.BytesIO()
    axes = figure.subplots()
    axes.plot([0, 1, 2], [3, -1.23456, 2], "o-")
    axes.set_title("a < b & 'c' \"d\"")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    before, after = ElementTree.fromstring(buffer.getvalue()), ElementTree.fromstring(compact(buffer.getvalue()))

    def count(root: ElementTree.Element, tag: str) -> int:
        return sum(element.tag.endswith(f"}}{tag}") for element in root.iter())

    for tag in ("use", "clipPath", "text", "image"):
        assert count(before, tag) == count(after, tag), tag
    assert before.get("viewBox") == after.get("viewBox")
    referred = {name for e in after.iter() for v in e.attrib.values() for name in re.findall(r"(?:^|\()#([\w-]+)", v)}
    assert referred <= {e.get("id") for e in after.iter()}
    [line, shorter] = [
        np.array(re.findall(r"-?\d+\.?\d*", max((e.get("d", "") for e in root.iter()), key=len)), float)
        for root in (before, after)
    ]
    assert np.abs(line - shorter).max() <= 0.006
    assert len(compact(buffer.getvalue())) < len(buffer.getvalue()) / 2


def test_svg_of_a_page_are_the_files_beside_the_markdown(run: Path) -> None:
    drawn = {file.read_text() for file in (run / "report_files").glob("*.svg")}
    assert set(svgs((run / "report.html").read_text())) == drawn


def test_a_photograph_is_kept_small(tmp_path: Path) -> None:
    """Noise is the worst case: a page has about thirty pictures, and of anything seen each takes a third of this."""
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    found = picture(tmp_path / "large.png", "shown.png", "")
    assert found.name == "shown.jpg"
    assert found.url.startswith("data:image/jpeg;base64,")
    assert len(found.url) <= 75_000


@pytest.mark.slow
def test_a_study_of_many_methods_orders_and_seeds_stays_small(tmp_path: Path) -> None:
    """25 methods, 4 orders and 3 seeds: 300 runs."""
    base = write_fake_run(tmp_path / "base", samples=2)
    found, config = results(base), json.loads((base / "config.json").read_text())
    noise = np.random.default_rng(0)
    orders = {
        "paper": ORDER,
        "reverse": ORDER[::-1],
        "alphabet": sorted(ORDER),
        "interleaved": ORDER[::2] + ORDER[1::2],
    }
    for method, order, seed in itertools.product(range(25), orders, range(3)):
        folder = tmp_path / "runs" / f"{method}-{order}-{seed}"
        folder.mkdir(parents=True)
        named = {"method": f"a-method-{method}", "order": order, "seed": seed, "tasks": list(orders[order])}
        matrix = noise.uniform(10, 95, (6, 6))
        rows = [[float(v) if i <= t else None for i, v in enumerate(row)] for t, row in enumerate(matrix)]
        (folder / "results.json").write_text(json.dumps(found | named | {"score_matrix": rows}))
        (folder / "config.json").write_text(json.dumps(config | named))
    write_reports([tmp_path / "runs"], tmp_path / "out", baseline="a-method-3")
    assert (tmp_path / "out" / "study.html").stat().st_size <= LIMIT
    assert "Drawn for the order paper" in (tmp_path / "out" / "study.html").read_text()
