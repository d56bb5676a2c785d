"""Tables of a study against figures worked out by hand or by brute force."""

from __future__ import annotations

import csv
import html as markup
import io
import itertools
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import convert
from msgspec.structs import asdict
from training.toy import change

from cnext.cli import main
from cnext.errors import UserError
from cnext.tables import aggregate, formats
from cnext.tables.aggregate import StudyTables, Summary

PAPER, REVERSE = ("a", "b"), ("b", "a")
SCORES = {
    ("lora", "paper"): [40.0, 42.0, 47.0],
    ("lora", "reverse"): [38.0, 39.0, 43.0],
    ("mage", "paper"): [45.0, 46.0, 52.0],
    ("mage", "reverse"): [41.0, 45.0, 46.0],
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the two files of a run that tables read."""

    def make(method: str, order: str, seed: int, acc: float, forgetting: float | None = 5.0, **changes: object) -> Path:
        folder = tmp_path / str(changes.pop("out", "runs")) / method / order / f"seed-{seed}"
        recipe = {"steps": {"a": 4, "b": 8}, "learning_rate": changes.pop("learning_rate", 0.1)}
        setting = {"suite": "toy", "backbone": "tiny", "split": "test", "budget": "default"}
        results = {
            "method": method, "order": order, "tasks": PAPER if order == "paper" else REVERSE, "seed": seed,
            "hyperparameters": {"rank": 8}, "finished": True, "cost": {"optimizer_steps": 12},
            "metrics": {"avg_acc": acc, "forgetting": forgetting, "new_acc": None if forgetting is None else acc + 1},
            **setting,
        } | changes  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "config.json").write_text(json.dumps(setting | {"recipe": recipe}))
        return folder

    return make


@pytest.fixture
def runs(write: Write) -> Path:
    """A study of two methods, two orders and three seeds."""
    for (method, order), scores in SCORES.items():
        for seed, score in enumerate(scores):
            folder = write(method, order, seed, score, forgetting=60 - score)
    return folder.parents[2]


def study(*paths: Path, baseline: str | None = None) -> StudyTables:
    return aggregate.of_folders(aggregate.find(paths), baseline)


def test_a_row_is_mean_and_sample_deviation_of_its_seeds(runs: Path) -> None:
    rows = {(row.method, row.order): row for row in study(runs).rows}
    assert set(rows) == set(SCORES)
    for key, scores in SCORES.items():
        assert rows[key].n == 3
        assert rows[key].seeds == [0, 1, 2]
        assert rows[key].avg_acc.mean == pytest.approx(sum(scores) / 3)
        assert rows[key].avg_acc.sd == pytest.approx((sum((x - sum(scores) / 3) ** 2 for x in scores) / 2) ** 0.5)


def test_over_orders_the_mean_is_of_runs_and_the_range_of_orders(runs: Path) -> None:
    shutil.rmtree(runs / "lora/reverse/seed-2")
    found = {row.method: row.avg_acc for row in study(runs).orders}
    assert (found["lora"].n, found["lora"].sd) == (5, None)
    assert found["lora"].mean == pytest.approx((40 + 42 + 47 + 38 + 39) / 5)
    assert found["lora"].ends == pytest.approx((38.5, 43.0))
    assert found["mage"].n == 6


def test_a_method_with_one_order_has_no_range_over_orders(runs: Path) -> None:
    assert [row.method for row in study(runs / "lora/paper", runs / "mage").orders] == ["mage"]


def test_a_difference_of_nothing_has_no_sign() -> None:
    assert formats.cell(Summary(3, -0.004, 0.0, -0.006, 0.004), "+") == ("0.00 ± 0.00 [\N{MINUS SIGN}0.01, 0.00]")


def test_differences_are_paired_by_order_and_seed(runs: Path) -> None:
    shutil.rmtree(runs / "lora/paper/seed-1")
    (row,) = study(runs).differences
    pairs = [45 - 40, 52 - 47, 41 - 38, 45 - 39, 46 - 43]
    assert row.method == "mage"
    assert row.n == row.avg_acc.n == 5
    assert row.avg_acc.mean == pytest.approx(statistics.mean(pairs))
    assert row.avg_acc.sd == pytest.approx(statistics.stdev(pairs))
    assert row.forgetting.mean == pytest.approx(-statistics.mean(pairs))
    assert row.avg_acc.low < row.avg_acc.mean < row.avg_acc.high
    assert row.forgetting.low == pytest.approx(-row.avg_acc.high), "the same resamples for every metric"


def test_a_difference_has_the_sign_test_of_its_pairs(runs: Path) -> None:
    (row,) = study(runs).differences
    assert (row.avg_acc.above, row.forgetting.above, row.n) == (6, 0, 6)
    assert row.avg_acc.p == row.forgetting.p == 2 / 2**6
    (line,) = [line for line in formats.markdown(study(runs)).splitlines() if " of 6 " in line]
    assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["6 of 6", "0.031"]
    assert "with 6 it is at least 0.031" in formats.markdown(study(runs))


@pytest.mark.parametrize("n", range(1, 14))
def test_the_sign_test_is_the_share_of_sign_patterns_at_least_as_uneven(n: int) -> None:
    """Under the null hypothesis all 2^n patterns of signs are as probable."""
    patterns = [sum(pattern) for pattern in itertools.product((0, 1), repeat=n)]
    for above in range(n + 1):
        uneven = sum(abs(2 * other - n) >= abs(2 * above - n) for other in patterns)
        values = [0.1] * above + [0.0] + [-7.0] * (n - above)
        assert aggregate.sign_test(values) == (above, pytest.approx(uneven / 2**n))


def test_pairs_that_are_level_have_no_sign() -> None:
    assert aggregate.sign_test([0.0, 0.0]) == aggregate.sign_test([]) == (0, None)


def test_the_baseline_can_be_named(runs: Path) -> None:
    assert study(runs).baseline == "lora"
    found = study(runs, baseline="mage")
    assert [row.method for row in found.differences] == ["lora"]
    assert study(runs / "mage").baseline == "mage"
    assert study(runs / "mage").differences == []
    with pytest.raises(UserError, match="unknown baseline 'ewc'; valid: lora, mage"):
        study(runs, baseline="ewc")


def test_the_interval_of_three_is_their_range() -> None:
    """All three draws are the least one with probability 1/27, which is more than 2.5%."""
    assert aggregate.interval([3.0, -1.0, 4.0]) == (-1.0, 4.0)


def test_the_interval_of_five_is_that_of_all_resamples() -> None:
    values = [0.3, 1.1, 2.0, 4.2, 8.9]
    means = sorted(sum(drawn) / 5 for drawn in itertools.product(values, repeat=5))
    low, high = aggregate.interval(values)
    for found, share in ((low, 0.025), (high, 0.975)):
        # 10,000 draws: the quantile found lies between the exact ones of nearby shares (three standard errors).
        assert means[int((share - 0.005) * len(means))] <= found <= means[int((share + 0.005) * len(means))]


def test_the_interval_is_the_same_each_time() -> None:
    values = [random.Random(1).gauss(0, 1) for _ in range(9)]
    first = aggregate.interval(values)
    random.seed(5)
    aggregate._resamples.cache_clear()
    assert aggregate.interval(values) == first


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_pairs_have_no_interval(n: int) -> None:
    assert aggregate.interval([1.0, 2.0][:n]) == (None, None)


def test_a_note_says_why_there_is_no_interval(runs: Path) -> None:
    for path in runs.glob("*/*/seed-2"):
        shutil.rmtree(path)
    two = study(runs / "lora/paper", runs / "mage/paper")
    assert "No interval with fewer than 3 pairs." in formats.markdown(two)
    assert "[95%" not in formats.markdown(two)
    assert "with three, as of three seeds, it is their range" in formats.markdown(study(runs))


def test_one_seed_has_no_deviation(write: Write) -> None:
    found = study(write("mage", "paper", 0, 50.0))
    assert found.rows[0].avg_acc == Summary(1, 50.0, None)
    assert "±" not in formats.markdown(found).split("\n\n")[1]


def test_what_a_method_has_not_is_a_dash(write: Write) -> None:
    write("joint", "paper", 0, 70.0, forgetting=None)
    write("lora", "paper", 0, 44.0)
    folder = write("zero-shot", "paper", 0, 38.0, forgetting=0.0, cost={"optimizer_steps": 0})
    found = study(folder.parents[2])
    cells = {row.split("|")[1].strip(): row.split("|")[4:7] for row in formats.markdown(found).splitlines()[4:7]}
    for method, score in (("joint", "70.00"), ("zero-shot", "38.00")):
        assert [cell.strip() for cell in cells[method]] == [score, "\N{EN DASH}", "\N{EN DASH}"]
    assert [row.forgetting.mean for row in found.differences] == [None, None]
    assert found.differences[0].avg_acc.mean == pytest.approx(26.0)


def test_runs_of_one_method_are_labelled_by_hyperparameters(write: Write) -> None:
    one = write("mage", "paper", 0, 50.0, hyperparameters={"average": "pema", "rank": 8}, out="one")
    other = write("mage", "paper", 0, 46.0, hyperparameters={"average": "none", "rank": 8}, out="other")
    found = study(one, other, baseline="mage (average=none)")
    assert [row.method for row in found.rows] == ["mage (average=pema)", "mage (average=none)"]
    assert found.differences[0].avg_acc.mean == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.2}, r"are not comparable, .*\n  recipe.learning_rate: 0.1 and 0.2"),
        ({}, "are the same run; name one of them"),
    ],
    ids=["recipe", "twice"],
)
def test_runs_that_do_not_go_together_are_refused(changes: dict, message: str, write: Write) -> None:
    with pytest.raises(UserError, match=message):
        study(write("mage", "paper", 0, 50.0), write("mage", "paper", 0, 50.0, out="other", **changes))


@pytest.mark.parametrize("key", ["suite", "backbone", "split", "budget"])
def test_another_setting_is_refused(key: str, write: Write) -> None:
    one, other = write("mage", "paper", 0, 50.0), write("lora", "paper", 0, 50.0)
    change(other / "config.json", **{key: "another"})
    with pytest.raises(UserError, match=f'{key}: ".*" and "another"'):
        study(one, other)


def test_unfinished_runs_are_left_out_and_named(write: Write) -> None:
    done = write("lora", "paper", 0, 50.0)
    begun = write("lora", "paper", 1, 10.0, finished=False)
    empty = write("lora", "paper", 2, 10.0)
    (empty / "results.json").unlink()
    found = study(done.parents[2])
    assert found.rows[0].seeds == [0]
    names = ", ".join(formats.mark(str(folder)) for folder in (begun, empty))
    assert f"Not finished and left out: {names}." in formats.markdown(found)
    with pytest.raises(UserError, match="no finished run"):
        study(begun)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", "{", r"results\.json: expected JSON, could not read it"),
        ("results.json", "{}", r"results\.json: Object missing required field `finished`; run cnext-run again"),
        ("config.json", "{}", r"config\.json: Object missing required field `suite`; run cnext-run again"),
    ],
    ids=["cut", "empty", "no setting"],
)
def test_damaged_files_are_named(file: str, text: str, message: str, write: Write) -> None:
    folder = write("lora", "paper", 0, 50.0)
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        study(folder)


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no run folder and holds none"):
            aggregate.find([path])
        assert main(["table", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path} is no run folder")


def test_a_run_named_twice_counts_once(runs: Path) -> None:
    assert study(runs, runs / "lora/paper/seed-0", runs / "lora") == study(runs)


def test_markdown_columns_line_up(runs: Path) -> None:
    for block in formats.markdown(study(runs)).split("\n\n")[1::2]:
        lines = block.strip().splitlines()
        assert len({len(line) for line in lines}) == 1
        assert all(re.fullmatch(r"-{3,}|-{2,}:", cell.strip()) for cell in lines[1].split("|")[1:-1])
    assert "| mage   | paper   |   3 | 47.67 ± 3.79 |" in formats.markdown(study(runs))


def test_csv_holds_every_figure_unrounded(runs: Path) -> None:
    found = study(runs)
    rows = list(csv.DictReader(io.StringIO(formats.comma_separated(found))))
    assert len(rows) == 3 * (4 + 2 + 1)
    (row,) = [row for row in rows if row["table"] == "differences" and row["metric"] == "new_acc"]
    expected = asdict(found.differences[0].new_acc)
    assert {key: float(row[key]) for key in expected} == expected
    assert expected.keys() == {"n", "mean", "sd", "low", "high", "above", "p"}


def test_json_is_the_study(runs: Path) -> None:
    assert convert(json.loads(formats.as_json(study(runs))), StudyTables) == study(runs)


def test_latex_is_well_formed_whatever_the_names(write: Write) -> None:
    """Every row has the columns declared, environments and braces close, and no special character stands bare."""
    write("a_b%c&d#$e~^\\{}<", "paper", 0, 50.0)
    write("lora", "paper", 0, 51.0)
    write("lora", "reverse", 0, 52.0)
    text = formats.latex(study(write("lora", "paper", 1, 53.0).parents[2]))
    body = text.replace("% \\usepackage{booktabs}\n", "")
    assert body.count(r"\begin{table}") == body.count(r"\end{table}") == 3
    assert r"a\_b\%c\&d\#\$e\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}$<$" in body
    bare = re.sub(r"\\[{}]", "", body)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"(?<!\\)[%#_]", body)
    assert len(re.findall(r"(?<!\\)\$", body)) % 2 == 0
    for block in body.split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{([lr]+)\}", block)[1]
        rows = [line for line in block.split(r"\bottomrule")[0].splitlines() if line.endswith(r" \\")]
        assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert r"$-$1.00" in body


def test_the_verb_table_needs_no_torch(runs: Path) -> None:
    heavy = "sys.modules.keys() & {'torch', 'numpy', 'rich'}"
    code = f"import sys; from cnext.cli import main; assert main(['table', {str(runs)!r}]) == 0; assert not ({heavy})"
    shown = subprocess.run([sys.executable, "-c", code], cwd=runs, check=True, capture_output=True, text=True).stdout
    assert shown == formats.markdown(study(runs))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_the_verb_table_has_formats(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(runs), "--format", name, "--baseline", "mage"]) == 0
    assert capsys.readouterr().out == formats.FORMATS[name](study(runs, baseline="mage"))


def test_linked_runs_are_found_once_and_loops_end(write: Write, tmp_path: Path) -> None:
    run, elsewhere = write("lora", "paper", 0, 40.0), write("mage", "paper", 0, 45.0, out="elsewhere")
    runs = tmp_path / "runs"
    for name, target in {"again": run, "linked": elsewhere, "loop": runs, "dead": runs / "no", "self": "self"}.items():
        (runs / name).symlink_to(target)
    (runs / "lora" / "above").symlink_to("..")
    assert aggregate.find([runs]) == [run, runs / "linked"]
    with pytest.raises(UserError, match="self is no run folder and holds none"):
        aggregate.find([runs / "self"])


NAME = "a|b `c` <i>d</i> *e* _f_\\g & 50% {h} $i$ #j ~k ^l\n\n[m](n) ÿ"
"""A name with what means something in Markdown, LaTeX, HTML or CSV."""


def test_names_are_text_in_every_format(write: Write, tmp_path: Path) -> None:
    change(write("mage", "paper", 0, 40.0) / "results.json", order=NAME, method=NAME)
    change(write("lora", "paper", 0, 41.0) / "results.json", order=NAME)
    study = aggregate.of_folders(aggregate.find([tmp_path / "runs"]), "lora")
    one = " ".join(NAME.split())
    shown = formats.WRITERS["markdown"](study)
    bare = re.sub(r"\\.", "", shown)  # without what is escaped
    for line in bare.splitlines():
        assert not re.search(r"[`<]", line)
        assert line.count("|") in (0, 7, 8), "the columns of the two tables"
    assert one in re.sub(r"\\(.)", r"\1", shown)
    tex = formats.WRITERS["latex"](study)
    assert r"a$|$b `c` $<$i$>$d$<$/i$>$ *e* \_f\_\textbackslash{}g \& 50\% \{h\} \$i\$ \#j" in tex
    assert "\n\n[m]" not in tex
    assert markup.unescape(formats.WRITERS["html"](study)).count(f">{NAME}<") == 4
    assert "<i>" not in formats.WRITERS["html"](study)
    rows = list(csv.DictReader(io.StringIO(formats.WRITERS["csv"](study))))
    assert {row["method"] for row in rows} == {NAME, "lora"}
    assert json.loads(formats.WRITERS["json"](study))["rows"][0]["order"] == NAME


@pytest.mark.parametrize("name", ["[x] y", "*"])
def test_a_latex_row_does_not_begin_as_an_argument_of_the_one_before(name: str) -> None:
    table = formats.Table("", ["method", "n"], [["a", "1"], [name, "2"]])
    assert f"\n{{}}{name} & 2" in formats.as_latex([table])


def test_long_names_are_cut(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(write("mage", "paper", 0, 40.0) / "results.json", order="x" * 200_000)
    for kind in ("markdown", "latex", "html"):
        assert main(["table", str(tmp_path / "runs"), "--format", kind]) == 0
        assert len(capsys.readouterr().out) < 10_000
    assert main(["table", "y" * 200_000]) == 2
    assert len(capsys.readouterr().err) < 5_000
