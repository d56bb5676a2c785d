"""The reference results: the tables are made from the results.json files, and the README says what the tables say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from cnext import methods
from cnext.config.plan import ADDED
from cnext.tables import aggregate, formats
from cnext.tables.aggregate import SeedsRow

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "next-tiny"
STUDY = aggregate.of_folders(sorted(aggregate.find([RESULTS])), "lora")
PAPER = [row for row in STUDY.rows if row.order == "paper"]
ORDERS = ("paper", "reverse", "alphabet", "interleaved")


@pytest.mark.parametrize("kind", ["markdown", "csv", "latex", "json"])
def test_the_tables_are_of_these_runs(kind: str) -> None:
    file = RESULTS / f"study.{ {'markdown': 'md', 'latex': 'tex'}.get(kind, kind) }"
    assert file.read_text(encoding="utf-8") == formats.FORMATS[kind](STUDY)


def test_every_run_is_there_with_three_seeds() -> None:
    assert STUDY.rows
    assert all(row.seeds == [0, 1, 2] for row in STUDY.rows)


def test_the_runs_have_the_methods_present_defaults() -> None:
    for folder in aggregate.find([RESULTS]):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        defaults = json.loads(json.dumps(dataclasses.asdict(methods.load(results["method"])())))
        # Runs of an earlier version lack what acts as that version did.
        added = {name: value for name, value in ADDED.items() if name in defaults}
        assert added | results["hyperparameters"] == defaults, folder


def figures(row: SeedsRow) -> list[str]:
    cells = (row.avg_acc, row.forgetting, row.new_acc)
    return [formats.NOTHING if c.mean is None else f"{c.mean:.1f} ± {c.sd:.1f}" for c in cells]


def shown(file: Path) -> dict[str, list[str]]:
    """The last three cells of every row whose first cell is a name and whose last one is a mean, by that name."""
    lines = file.read_text(encoding="utf-8").splitlines()
    is_row = re.compile(rf"\| `[a-z-]+` \|.* (± [\d.]+|\| {formats.NOTHING}) \|$")
    rows = [line.strip("| ").split(" | ") for line in lines if is_row.match(line)]
    return {row[0].strip("`"): row[-3:] for row in rows}


def test_the_readme_says_what_the_tables_say() -> None:
    rows = shown(ROOT / "README.md")
    assert rows == {row.method: figures(row) for row in PAPER if row.method in ("lora", "mage", *rows)}


def test_the_other_readme_says_what_the_rules_hold() -> None:
    (mage,) = (row for row in PAPER if row.method == "mage-paper")
    expected = {"pema": figures(mage)}
    for row in aggregate.of_folders(sorted(aggregate.find([RESULTS.with_name("next-tiny-averaging")]))).rows:
        assert row.seeds == [0, 1, 2]
        expected[re.search(r"average=([a-z-]+)", row.method)[1]] = figures(row)  # type: ignore[index]
    assert shown(RESULTS / "README.md") == expected


def orders_table() -> list[str]:
    """Avg.ACC / Forgetting of the methods that were run in four orders, best first, by order and in the mean."""
    means: dict[str, list[tuple[float, float | None]]] = {}
    for order in ORDERS:
        for row in STUDY.rows:
            if row.order == order:
                means.setdefault(row.method, []).append((row.avg_acc.mean, row.forgetting.mean))
    every = {name: cells for name, cells in means.items() if len(cells) == len(ORDERS)}
    lines = []
    for name in sorted(every, key=lambda name: -fmean(avg for avg, _ in every[name])):
        cells = [*every[name], tuple(None if None in part else fmean(part) for part in zip(*every[name], strict=True))]
        shown = (" / ".join(formats.NOTHING if v is None else f"{v:.1f}" for v in cell) for cell in cells)
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return lines


def test_the_other_readme_says_what_the_four_orders_hold() -> None:
    """A row for every method that was run in all of them; `mage` and `ewc` by order, and paired, with the sign test."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert len(orders_table()) == 10
    assert "\n".join(orders_table()) in text
    study = aggregate.of_folders(sorted(aggregate.find([RESULTS / "mage", RESULTS / "ewc"])), "ewc")
    (found,) = study.differences
    rows = {(row.method, row.order): " / ".join(figures(row)) for row in study.rows}
    for order in ORDERS:
        assert f"| {order} | {rows['mage', order]} | {rows['ewc', order]} |" in text
    every = {row.method: " / ".join(f"{getattr(row, m).mean:.1f}" for m in aggregate.METRICS) for row in study.orders}
    assert f"| all | {every['mage']} | {every['ewc']} |" in text
    assert found.n == 12
    difference = f"{found.avg_acc.mean:+.1f} points of Avg.ACC over `ewc`, in {found.avg_acc.above} of 12 pairs"
    assert f"{difference} (sign test: p = {found.avg_acc.p:.4f})" in " ".join(text.split())


def test_the_other_readme_says_what_the_papers_parts_hold() -> None:
    """Means of Avg.ACC / Forgetting / New.ACC in the paper's order and in reverse, and what the averaging brings."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    means = {(row.method, row.order): [getattr(row, m).mean for m in aggregate.METRICS] for row in STUDY.rows}
    for method in ("lora", "ew", "ew-ga", "mage-paper"):
        cells = (" / ".join(f"{mean:.1f}" for mean in means[method, order]) for order in ("paper", "reverse"))
        assert f"| `{method}` | {' | '.join(cells)} |" in text
    gains = [means["mage-paper", order][0] - means["ew-ga", order][0] for order in ("paper", "reverse")]
    assert f"The averaging brings {gains[0]:.1f} points, and {gains[1]:.1f} in reverse." in " ".join(text.split())
