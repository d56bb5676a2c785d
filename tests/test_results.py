"""The reference results: the tables are made from the results.json files, and the README says what the tables say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cnext import methods
from cnext.config.run_config import ADDED
from cnext.tables import aggregate, formats
from cnext.tables.aggregate import OrdersRow, SeedsRow

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "next-tiny"
STUDY = aggregate.of_folders(sorted(aggregate.find([RESULTS])), "lora")
PAPER = [row for row in STUDY.rows if row.order == "paper"]


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


def test_the_other_readme_says_what_its_folders_hold() -> None:
    (mage,) = (row for row in PAPER if row.method == "mage")
    expected = {"pema": figures(mage), "branches": figures(mage)}
    for folder, name in (("averaging", ""), ("interleaved", ""), ("connections", "connections")):
        study = aggregate.of_folders(sorted(aggregate.find([RESULTS.with_name(f"next-tiny-{folder}")])))
        for row in study.rows:
            assert row.seeds == [0, 1, 2]
            rule = re.search(r"average=([a-z-]+)", row.method)
            expected[name or (rule[1] if rule else row.method)] = figures(row)
    assert shown(RESULTS / "README.md") == expected


def test_the_readme_says_what_the_four_orders_hold() -> None:
    """A row for every method; `mage` and `ewc` by order, and their paired difference with its sign test."""
    folder = RESULTS.with_name("next-tiny-orders")
    study = aggregate.of_folders(sorted(aggregate.find([folder])), "ewc")
    assert (folder / "study.md").read_text(encoding="utf-8") == formats.markdown(study)
    assert all(row.seeds == [0, 1, 2] for row in study.rows)
    rows = {(row.method, row.order.partition(",")[0]): row for row in study.rows}
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    orders = {"paper": "paper", "reverse": "reverse", "alphabet": "alphabet", "interleaved": "VQAv2"}

    def short(row: SeedsRow | OrdersRow) -> str:
        numbers = (row.avg_acc.mean, row.forgetting.mean)
        return " / ".join(formats.NOTHING if number is None else f"{number:.1f}" for number in numbers)

    lines = []
    for whole in sorted(study.orders, key=lambda row: -row.avg_acc.mean):
        cells = [short(row) for row in (*(rows[whole.method, o] for o in orders.values()), whole)]
        lines.append(f"| `{whole.method.partition(' ')[0]}` | {' | '.join(cells)} |")
    assert len(lines) == 9
    assert "\n".join(lines) in text

    (mage,) = {row.method for row in study.rows if row.method.partition(" ")[0] == "mage"}
    for name, order in orders.items():
        both = (" / ".join(figures(rows[method, order])) for method in (mage, "ewc"))
        assert f"| {name} | {' | '.join(both)} |" in text
    every = {
        row.method: " / ".join(f"{getattr(row, m).mean:.1f}" for m in aggregate.METRICS)
        for row in study.orders
        if row.method in (mage, "ewc")
    }
    assert f"| all | {every[mage]} | {every['ewc']} |" in text
    (found,) = (one for one in study.differences if one.method == mage)
    assert found.n == 12
    difference = f"{found.avg_acc.mean:+.1f} points of Avg.ACC over `ewc`, in {found.avg_acc.above} of 12 pairs"
    assert f"{difference} (sign test: p = {found.avg_acc.p:.4f})" in " ".join(text.split())
