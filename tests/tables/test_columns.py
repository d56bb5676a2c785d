"""Tables of chosen columns against figures worked out by hand: values, the best, the test, and every format."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cnext.cli import main
from cnext.errors import UserError
from cnext.scoring.matrix import FORMULAS
from cnext.tables import aggregate, columns, columns_formats, formats
from cnext.tables.columns import COLUMNS, GROUPS, HIGHER, LOWER, Chosen, choose, holm

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
MATRICES = {
    ("lora", 0): [[60.0, None], [40.0, 80.0]],
    ("lora", 1): [[62.0, None], [44.0, 80.0]],
    ("mage", 0): [[55.0, None], [50.0, 70.0]],
    ("mage", 1): [[56.0, None], [54.0, 74.0]],
    ("ewc", 0): [[50.0, None], [51.0, 60.0]],
    ("ewc", 1): [[50.0, None], [53.0, 64.0]],
    ("upper", 0): [[None, None], [90.0, 91.0]],
    ("upper", 1): [[None, None], [92.0, 93.0]],
    ("zero", 0): [[99.0, None], [99.0, 99.0]],
    ("zero", 1): [[99.0, None], [99.0, 99.0]],
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the two files of a run that tables read."""

    def make(method: str, seed: int, matrix: list, order: str = "paper", **changes: Any) -> Path:
        folder = tmp_path / "runs" / method.replace("/", "") / order / f"seed-{seed}"
        final, learnt = matrix[-1], [matrix[i][i] for i in range(len(matrix))]
        joint = learnt[0] is None
        metrics = {
            "avg_acc": sum(final) / len(final),
            "new_acc": None if joint else sum(learnt) / len(learnt),
            "forgetting": None if joint else sum(a - b for a, b in zip(learnt[:-1], final, strict=False)),
        }
        setting = {"suite": "toy", "backbone": "tiny", "split": "test", "budget": "default"}
        results = {
            "method": method, "order": order, "tasks": ["a", "b"] if order == "paper" else ["b", "a"], "seed": seed,
            "hyperparameters": {}, "finished": True, "metrics": metrics, "joint": joint, "score_matrix": matrix,
            "cost": {"optimizer_steps": 0 if method == "zero" else 12}, "profile": "strict",
            "zero_shot": [5.0, 7.0], **setting,
        } | changes  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "config.json").write_text(json.dumps(setting | {"recipe": {}}))
        return folder

    return make


@pytest.fixture
def runs(write: Write) -> Path:
    """A study of five methods, two of them references, and two seeds."""
    for (method, seed), matrix in MATRICES.items():
        folder = write(method, seed, matrix)
    return folder.parents[2]


def table(place: Path, *names: str, baseline: str | None = None) -> Chosen:
    return choose(aggregate.group(aggregate.finished(aggregate.find([place])), baseline), names)


def means(chosen: Chosen, key: str) -> dict[str, Any]:
    values = {row.method: row.values[key] for row in chosen.rows}
    return {method: getattr(value, "mean", value) for method, value in values.items()}


def best(chosen: Chosen, key: str) -> list[str]:
    return [row.method for row in chosen.rows if key in row.best]


def test_scores_of_each_task_at_the_end_and_when_learnt(runs: Path) -> None:
    found = table(runs, "final", "learnt", "drop", "zero_shot")
    assert [head.key for head in found.heads] == [
        f"{name}:{task}" for name in ("final", "learnt", "drop", "zero_shot") for task in "ab"
    ]
    assert means(found, "final:a") == {"ewc": 52, "lora": 42, "mage": 52, "upper": 91, "zero": 99}
    assert means(found, "learnt:a") == {"ewc": 50, "lora": 61, "mage": 55.5, "upper": None, "zero": None}
    assert means(found, "drop:a") == {"ewc": -2, "lora": 19, "mage": 3.5, "upper": None, "zero": None}
    assert set(means(found, "drop:b").values()) == {None}, "nothing follows the last task"
    assert means(found, "zero_shot:b")["mage"] == 7
    lora = next(row.values["final:a"] for row in found.rows if row.method == "lora")
    assert lora.sd == pytest.approx(8**0.5)


def test_the_best_has_the_direction_of_its_column_and_is_no_reference(runs: Path) -> None:
    """Ties are all the best; upper and zero have the highest scores and are none."""
    found = table(runs, "avg_acc", "forgetting", "final", "learnt", "zero_shot")
    assert best(found, "avg_acc") == ["mage"]
    assert best(found, "forgetting") == ["ewc"]
    assert best(found, "final:a") == ["ewc", "mage"]
    assert best(found, "final:b") == best(found, "learnt:b") == ["lora"]
    assert best(found, "zero_shot:a") == []
    (note,) = [note for note in found.notes if note.startswith("Not candidates")]
    assert note == "Not candidates for the best: upper (joint training), zero (no training)."


def test_the_best_is_decided_before_rounding(write: Write) -> None:
    write("lora", 0, [[60.0, None], [50.01, 80.0]])
    place = write("mage", 0, [[60.0, None], [50.02, 80.0]]).parents[2]
    found = table(place, "final", "avg_acc")
    assert best(found, "final:a") == best(found, "avg_acc") == ["mage"]
    assert best(found, "final:b") == ["lora", "mage"]
    shown = columns_formats.written(found, "markdown")
    assert shown.count("**50.0**") == 1
    assert shown.count(" 50.0 ") == 1


def test_one_method_alone_is_not_the_best(runs: Path) -> None:
    assert not any(row.best for row in table(runs / "mage", "avg_acc", "final").rows)


def test_columns_are_those_chosen_in_that_order(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(runs), "--columns", "new_acc", "final", "avg_acc"]) == 0
    (head,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| method")]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "method", "New.ACC", "a at the end", "b at the end", "Avg.ACC"
    ]  # fmt: skip


def test_a_metric_of_a_later_version_is_computed_from_the_scores(runs: Path) -> None:
    """results.json has three metrics here; zero learnt nothing."""
    found = table(runs, "maa", "worst_acc", "fwt")
    assert means(found, "maa") == {
        "ewc": (50 + 55.5 + 50 + 58.5) / 4, "lora": 61, "mage": (55 + 60 + 56 + 64) / 4, "upper": None, "zero": None
    }  # fmt: skip
    assert means(found, "worst_acc")["zero"] == 99
    assert set(means(found, "fwt").values()) == {None}


def test_the_test_has_its_pairs_and_is_corrected_for_the_methods_tested(write: Write, runs: Path) -> None:
    write("mage", 2, [[50.0, None], [50.0, 50.0]])
    write("moe", 7, [[50.0, None], [50.0, 50.0]])
    found = table(runs, "test")
    assert means(found, "difference") == {
        "ewc": (55.5 + 58.5 - 60 - 62) / 2, "lora": None, "mage": (60 + 64 - 60 - 62) / 2, "moe": None,
        "upper": None, "zero": None,
    }  # fmt: skip
    assert means(found, "pairs") == {"ewc": 2, "lora": None, "mage": 2, "moe": 0, "upper": None, "zero": None}
    assert means(found, "above") == {"ewc": 0, "lora": None, "mage": 1, "moe": 0, "upper": None, "zero": None}
    # The pairs of mage: one level, one above; of one sign p is 1.
    assert means(found, "p") == {"ewc": 0.5, "lora": None, "mage": 1.0, "moe": None, "upper": None, "zero": None}
    assert (means(found, "p_holm")["ewc"], means(found, "p_holm")["mage"]) == (1.0, 1.0)
    assert found.notes[-1] == (
        "Exact two-sided sign test against lora in Avg.ACC, paired by seed (p is at least 0.5 with 2 pairs); p is not "
        "corrected for the number of methods tested, 2; p (Holm) is corrected for the number of methods tested, 2."
    )
    assert "Holm" not in table(runs, "p").notes[-1]
    assert table(runs, "difference").notes[-1] == "Difference to lora in Avg.ACC, paired by seed."
    assert table(runs / "moe", "test", baseline="moe").notes[-1].startswith("No method has a pair to be tested")


def test_another_baseline(runs: Path) -> None:
    found = table(runs, "difference", "p", baseline="ewc")
    assert means(found, "difference")["ewc"] is None
    assert means(found, "difference")["lora"] == 4
    assert any(note.startswith("Exact two-sided sign test against ewc") for note in found.notes)


def test_holm_by_hand() -> None:
    """Holm's example of three tests; ties and order do not matter."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.5, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_orders_are_blocks_with_their_own_best_and_one_over_all(write: Write, runs: Path) -> None:
    for method in ("lora", "mage"):
        for seed in (0, 1):
            # In reverse the columns of the matrix are b, a.
            write(method, seed, [[70.0, None], [30.0 + (method == "lora"), 50.0]], order="reverse")
    found = table(runs, "final", "avg_acc", "test")
    blocks = {order: [row.method for row in found.rows if row.order == order] for order in found.orders}
    assert blocks == {
        "paper": ["ewc", "lora", "mage", "upper", "zero"],
        "reverse": ["lora", "mage"],
        "all orders": ["lora", "mage"],
    }
    rows = {(row.order, row.method): row for row in found.rows}
    assert rows["reverse", "lora"].values["final:b"].mean == 31
    assert "final:b" in rows["reverse", "lora"].best
    assert "avg_acc" in rows["paper", "mage"].best
    over = rows["all orders", "lora"]
    assert over.n == 4
    assert over.values["final:a"].mean == pytest.approx((40 + 44 + 50 + 50) / 4)
    assert over.values["final:a"].ends == pytest.approx((42, 50))
    assert rows["all orders", "mage"].values["pairs"] == 4
    text = columns_formats.as_table(found)
    assert text.head[:2] == ["order", "method"]
    assert text.breaks == {5, 7}


def test_other_numbers_of_seeds_are_shown(write: Write, runs: Path) -> None:
    write("mage", 2, [[50.0, None], [50.0, 50.0]])
    found = table(runs, "avg_acc")
    assert means(found, "n") == {"ewc": 2, "lora": 2, "mage": 3, "upper": 2, "zero": 2}
    assert "over n seeds." in found.notes[1]


def test_a_mean_over_fewer_runs_than_the_others_is_noted(write: Write) -> None:
    write("lora", 0, [[60.0, None], [50.0, 80.0]], zero_shot=[1.0, None])
    place = write("lora", 1, [[60.0, None], [50.0, 80.0]]).parents[2]
    assert "Over fewer runs, as the others have no value: lora zero_shot:b n = 1." in table(place, "zero_shot").notes


def test_unfinished_runs_are_named(write: Write, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = write("lora", 2, [[60.0, None], [50.0, 80.0]], finished=False)
    assert main(["table", str(runs), "--columns", "avg_acc"]) == 0
    assert f"Not finished and left out: {begun}." in capsys.readouterr().out.replace("\\", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns", "avgacc"], "unknown column 'avgacc'; did you mean avg_acc? valid: avg_acc, new_acc,"),
        (["--columns", "Avg.ACC"], "unknown column 'Avg.ACC'; did you mean avg_acc? valid: "),
        (["--columns", "colour"], "unknown column 'colour'; valid: avg_acc"),
        (["--columns", "p", "test"], "column p is named twice; name it once"),
        (["--decimals", "2"], "--decimals is for --columns; name these too"),
        (["--out", "table.xlsx"], "table.xlsx: expected a file that ends in .md, .csv, .tex, .json, .html, .markdown"),
        (["--out", "t.tex", "--format", "csv"], "t.tex is by its ending of the format latex, not csv; leave out"),
        (["--out", "none/t.tex"], "none/t.tex: expected a folder none to write it into, found none"),
        (["--out", "folder.csv"], "folder.csv: expected a file to write, found a folder; name a file in it"),
        (["--columns", "avg_acc", "--baseline", "er"], "unknown baseline 'er'; valid: ewc, lora"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], message: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs.parent)
    Path("folder.csv").mkdir()
    assert main(["table", str(runs), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("value", [None, [], [[1]], [[60, None], [50, "x"]], {"a": 1}, [[60, None], [50, 200]]])
def test_scores_that_are_none_are_refused(value: object, write: Write, runs: Path) -> None:
    write("lora", 2, MATRICES["lora", 0], score_matrix=value)
    assert table(runs, "avg_acc").rows, "it reads no scores"
    with pytest.raises(UserError, match=r"lora/paper/seed-2/results.json.*: expected") as error:
        table(runs, "final")
    assert "\n" not in str(error.value)


def test_every_metric_is_a_column_and_every_column_documented() -> None:
    """A metric that falls when a model gets better is one with "forgetting" or an error type in its name."""
    assert FORMULAS.keys() <= COLUMNS.keys()
    for name in FORMULAS:
        lower = "forgetting" in name or name in ("avg_hal", "avg_iuf", "avg_oth")
        assert COLUMNS[name].better in ((LOWER,) if lower else (HIGHER, columns.NEITHER)), name
    assert all(meaning for _, _, meaning in columns.listing())
    assert all({*of} <= COLUMNS.keys() for of in GROUPS.values())


def test_csv_has_every_figure_unrounded(runs: Path) -> None:
    found = table(runs, "avg_acc", "final", "test")
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(columns_formats.written(found, "csv")))}
    assert list(rows["lora"]) == [
        "method", "order", "n", "avg_acc", "avg_acc sd", "final:a", "final:a sd", "final:b", "final:b sd",
        "difference", "difference sd", "pairs", "above", "p", "p_holm",
    ]  # fmt: skip
    assert float(rows["mage"]["final:a sd"]) == next(r.values["final:a"].sd for r in found.rows if r.method == "mage")
    assert (rows["ewc"]["pairs"], rows["ewc"]["p"], rows["lora"]["p"]) == ("2", "0.5", "")


def test_json_says_which_is_the_best(runs: Path) -> None:
    shown = json.loads(columns_formats.written(table(runs, "forgetting", "final"), "json"))
    assert [column["name"] for column in shown["columns"]] == ["forgetting", "final:a", "final:b"]
    assert [column["best"] for column in shown["columns"]] == ["lower", "higher", "higher"]
    assert [row["method"] for row in shown["rows"] if row["values"]["forgetting"]["best"]] == ["ewc"]
    upper = next(row for row in shown["rows"] if row["method"] == "upper")
    assert upper["reference"] == "joint training"
    assert upper["values"]["forgetting"] == {"n": 0, "mean": None, "sd": None, "best": False}


HOSTILE = "a_b%c&d#$e~^\\{}<x>|*"


def test_latex_is_well_formed_whatever_the_names(write: Write) -> None:
    """Every row has the columns declared, spanning titles cover all, environments and braces close."""
    write("lora", 0, MATRICES["lora", 0])
    write("lora", 0, MATRICES["lora", 1], order="reverse")
    place = write(HOSTILE, 0, MATRICES["mage", 0]).parents[2]
    text = columns_formats.written(table(place, "avg_acc", "drop", "final", "n", "test"), "latex")
    first, body = text.split("\n", 1)
    assert first == r"% \usepackage{booktabs,graphicx}"
    assert body.count(r"\begin{table*}") == body.count(r"\end{table*}") == 1
    assert r"a\_b\%c\&d\#\$e\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}$<$x$>$$|$*" in body
    assert rf"\textbf{{{MINUS}" not in body
    bare = re.sub(r"\\[{}]", "", body)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"(?<!\\)[#_]", body)
    assert not set(body) - {chr(code) for code in range(128)}
    declared = re.search(r"\\begin\{tabular\}\{([lr]+)\}", body)[1]
    assert re.fullmatch(r"ll(r+)", declared)
    lines = [line for line in body.split(r"\toprule")[1].splitlines() if line.endswith(r" \\")]
    for line in lines:
        spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", line)]
        covered = sum(spans) or len(re.findall(r"(?<!\\)&", line)) + 1
        assert covered == len(declared), line
    assert re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", body) == [("4", "5"), ("6", "7")]
    assert body.count(r"\midrule") == 3, "under the head, and between the blocks of two orders and of all"


def test_latex_prints_the_deviation_small_and_the_best_bold(runs: Path) -> None:
    text = columns_formats.written(table(runs, "avg_acc", "final"), "latex", decimals=2)
    assert r"mage & \textbf{62.00}{\scriptsize$\pm$2.83} & " in text
    assert r"zero & 99.00{\scriptsize$\pm$0.00}" in text


class Cells(HTMLParser):
    """The rows of a page's tables, each cell with its tag; <strong> as it stands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, dict, str]]] = []
        self.strong = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append((tag, dict(attributes), ""))
        self.strong |= tag == "strong"

    def handle_endtag(self, tag: str) -> None:
        self.strong &= tag != "strong"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and data.strip():
            tag, attributes, text = self.rows[-1][-1]
            self.rows[-1][-1] = (tag, attributes, text + (f"**{data}**" if self.strong else data))


def test_html_has_heads_with_scopes_and_no_markup_from_names(write: Write, runs: Path) -> None:
    write("<script>alert(1)</script>", 0, MATRICES["ewc", 0])
    text = columns_formats.written(table(runs, "avg_acc", "final"), "html")
    assert "<script" not in text
    above, head, *body = Cells(text).rows
    # method, n and Avg.ACC have no title above.
    assert [(tag, given["colspan"], words) for tag, given, words in above] == [
        ("td", "3", ""),
        ("th", "2", "at the end"),
    ]
    assert len(head) == 5
    assert {given["scope"] for _, given, _ in head} == {"col"}
    assert [(tag, given["scope"]) for tag, given, _ in (row[0] for row in body)] == [("th", "row")] * 6
    assert "<script>alert(1)</script>" in [row[0][2] for row in body]
    mage = next(row for row in body if row[0][2] == "mage")
    assert "**62.0 ± 2.8**" in [cell[2] for cell in mage]


def test_markdown_escapes_names_and_lines_up(write: Write, runs: Path) -> None:
    write(HOSTILE, 0, MATRICES["ewc", 0])
    text = columns_formats.written(table(runs, "avg_acc", "final"), "markdown")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(re.findall(r"(?<!\\)\|", lines[0]))}
    assert any("**62.0 ± 2.8**" in line and line.startswith("| mage ") for line in lines)
    assert any(line.startswith("| upper ") and DASH not in line for line in lines)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("t.md", "markdown"), ("t.csv", "csv"), ("t.TEX", "latex"), ("t.json", "json"), ("t.html", "html")],
)
@pytest.mark.parametrize("chosen", [True, False], ids=["columns", "all tables"])
def test_the_format_is_that_of_the_files_ending(
    name: str, kind: str, chosen: bool, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--columns", "avg_acc", "final", "test"] if chosen else []
    out = tmp_path / name
    assert main(["table", str(runs), *options, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["table", str(runs), *options, "--format", kind]) == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", name}


def test_any_format_may_go_to_a_file_of_any_other_ending(runs: Path, tmp_path: Path) -> None:
    assert main(["table", str(runs), "--format", "latex", "--out", str(tmp_path / "t.txt")]) == 0
    assert (tmp_path / "t.txt").read_text(encoding="utf-8").startswith(r"% \usepackage{booktabs}")
    assert formats.kind_of(None, None) == "markdown"


def test_chosen_columns_need_no_torch(runs: Path) -> None:
    heavy = "sys.modules.keys() & {'torch', 'numpy', 'matplotlib', 'transformers'}"
    words = ["table", str(runs), "--columns", "avg_acc", "final", "test", "--format", "html"]
    code = f"import sys; from cnext.cli import main; assert main({words!r}) == 0; assert not ({heavy}), {heavy}"
    subprocess.run([sys.executable, "-c", code], cwd=runs, check=True, stdout=subprocess.DEVNULL)


PAGE = Path(__file__).parents[2] / "docs" / "tables.md"


def test_the_page_names_every_column() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {*COLUMNS, *GROUPS} <= {*re.findall(r"`([a-z_]+)`", text)}


def test_the_examples_are_what_the_commands_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each format as it comes out."""
    monkeypatch.chdir(PAGE.parents[1])
    formats_shown = set()
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for part in re.split(r"^\$ cnext ", block, flags=re.MULTILINE)[1:]:
            words, shown = part.split("\n", 1)
            assert main(words.split()) == 0
            assert capsys.readouterr().out.rstrip() == shown.rstrip(), words
            formats_shown.add(re.search(r"(?:--format (\w+))?$", words)[1] or "markdown")
    assert formats_shown == formats.WRITERS.keys()
