"""The pages in a real browser: at the width of a phone, sorted, copied, and printed."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from report import accessibility
from report.browser import CHROMIUM, WIDTH, chromium, work
from report.fake_run import ORDER, write_fake_run, write_reported_run

from cnext.report import write_reports

SEE = """
const cells = row => [...row.cells].map(cell => cell.textContent.trim());
const tables = () => [...page.querySelectorAll("table.data")].map(table => [...table.rows].map(cells));
const copied = [...page.querySelectorAll(".copy")].map(bar => [...bar.querySelectorAll("button")].map(button => {
  button.click();
  return bar.querySelector("textarea").value;
}));
const wide = element => element.closest(".wide") || element.closest("details:not([open])");
const before = tables();
const out = [...page.body.querySelectorAll("*")].filter(
  element => !wide(element) && element.getBoundingClientRect().right > view.innerWidth + 0.5);
const sorted = [];
for (const table of page.querySelectorAll("table.data")) for (const head of table.tHead.rows[0].cells) {
  const column = head.cellIndex, clicks = [];
  for (const _ of head.querySelector("button") ? [1, 2] : []) {
    head.querySelector("button").click();
    clicks.push([head.ariaSort, [...table.tBodies[0].rows].map(row => row.cells[column].textContent.trim())]);
  }
  sorted.push([head.classList.contains("words"), clicks]);
}
const blocks = [...page.querySelectorAll(".wide")].filter(block => !block.closest("details:not([open])"));
const hinted = block => block.previousElementSibling.getClientRects().length > 0;
const seen = blocks.map(block => [block.scrollWidth > block.clientWidth + 1, hinted(block), block.tabIndex === 0]);
return { tables: before, wide: seen, copied, sorted, out: out.map(element => element.outerHTML.slice(0, 200)),
         width: view.innerWidth, scrolls: page.documentElement.scrollWidth,
         blank: [...page.images].filter(image => !image.naturalWidth).map(image => image.alt) };
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reported_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for method in ("mage", "lora", "a-method-with-a-rather-long-name"):
        for seed in (0, 1):
            write_fake_run(folder / method / str(seed), samples=4, method=method, seed=seed)
    write_fake_run(folder / "turned", ORDER[::-1], samples=4, order=",".join(ORDER[::-1]))
    write_reports([folder])
    return folder / "study.html"


@pytest.fixture(scope="module", params=["run", "study"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the browser made of a page."""
    return work(request.getfixturevalue(request.param), SEE, tmp_path_factory.mktemp("browser"))


def test_a_phone_shows_it_without_scrolling_sideways(seen: dict[str, Any]) -> None:
    assert seen["width"] == WIDTH
    assert seen["out"] == []
    assert seen["scrolls"] <= WIDTH


def test_what_scrolls_has_a_hint_and_is_reached_by_keyboard(seen: dict[str, Any]) -> None:
    """And what does not scroll has neither."""
    assert any(scrolls for scrolls, _, _ in seen["wide"])
    for scrolls, hint, focus in seen["wide"]:
        assert (hint, focus) == (scrolls, scrolls)


def test_every_picture_is_drawn(seen: dict[str, Any]) -> None:
    assert seen["blank"] == []


def test_tables_are_copied_as_csv(seen: dict[str, Any]) -> None:
    assert len(seen["copied"]) == len(seen["tables"]) > 8
    for table, (text, _) in zip(seen["tables"], seen["copied"], strict=True):
        assert [*csv.reader(io.StringIO(text))] == table


def test_tables_are_copied_as_latex(seen: dict[str, Any]) -> None:
    for table, (_, text) in zip(seen["tables"], seen["copied"], strict=True):
        first, *rows, last = text.splitlines()
        columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", first)
        assert columns, first
        assert len(columns[1]) == len(table[0])
        assert columns[1][0] == "l"
        assert [rows[0], rows[2], rows[-1], last] == [r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]
        assert text.isascii() or not re.search("[\u2212\u00b1\u2013\u03a3\u2192<>]", text)
        for row, cells in zip([rows[1], *rows[3:-1]], table, strict=True):
            assert row.endswith(r" \\")
            assert len(re.split(r"(?<!\\)&", row)) == len(cells)
            assert not re.search(r"(?<!\\)[%#_]", row)


def test_heads_sort_both_ways(seen: dict[str, Any]) -> None:
    """Figures the greatest first, then the least; words from a on, then from z; what is no figure stays last."""
    clicked = [(words, clicks) for words, clicks in seen["sorted"] if clicks]
    assert {words for words, _ in clicked} == {True, False}
    for words, clicks in clicked:
        assert [turn for turn, _ in clicks] == (["ascending", "descending"] if words else ["descending", "ascending"])
        for turn, cells in clicks:
            if words:
                plain = [cell.casefold() for cell in cells if cell.isalnum() and cell.isascii()]
                assert plain == sorted(plain, key=_collated, reverse=turn == "descending")
                continue
            known = [value for cell in cells if (value := _figure(cell)) is not None]
            assert known == sorted(known, reverse=turn == "descending")
            assert all(_figure(cell) is None for cell in cells[len(known) :])


def _figure(cell: str) -> float | None:
    found = re.match(r"[+-]?\d*\.?\d+", cell.replace("\N{MINUS SIGN}", "-").replace(",", ""))
    return float(found[0]) if found else None


def _collated(cell: str) -> list[Any]:
    """As a browser orders letters and digits: numbers by their value, and before letters."""
    return [(1, int(part), "") if part.isdigit() else (2, 0, part) for part in re.findall(r"\d+|\D", cell)]


def test_it_prints(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.pdf"
    chromium(
        f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer", f"--print-to-pdf={file}", run.as_uri()
    )
    text = file.read_bytes()
    assert text.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", text)) <= 20


AXE = """
const dark = () => String(matchMedia("(prefers-color-scheme: dark)").matches);
const folds = () => String(document.querySelectorAll("details[open]").length);
window.axe = { run: async () => ({ violations: [{ id: dark(), impact: "minor", nodes: [{ html: folds() }] }] }) };
"""


@pytest.mark.parametrize("colours", accessibility.COLOURS)
def test_the_accessibility_check_reports_what_axe_finds(run: Path, colours: str) -> None:
    """With a small stand-in for axe: it is called in the page, with all folds open, in the colours asked for."""
    assert CHROMIUM is not None
    found = accessibility.check(run, AXE, CHROMIUM, WIDTH, colours)
    folds = str(run.read_text().count("<details>"))
    assert found == {"width": WIDTH, "violations": [[str(colours == "dark").lower(), "minor", 1, folds]]}
