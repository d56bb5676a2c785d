"""Analyses of runs against small matrices and answers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from analysis import small_runs
from analysis.small_runs import TASKS, answer, write, write_answers
from msgspec.structs import asdict
from training.toy import change

from cnext.analysis import ANALYSES, analyze, formats
from cnext.analysis.breaks import right_but_for_format
from cnext.analysis.groups import RunGroups, means
from cnext.analysis.overall import averages, forgettings
from cnext.analysis.result import ResultTable, Unavailable
from cnext.analysis.run import Run
from cnext.analysis.transfer import changes, flows
from cnext.cli import main
from cnext.errors import UserError
from cnext.tables import aggregate
from cnext.tables.aggregate import Summary
from cnext.tables.formats import MINUS, NOTHING

REVERSED = {"tasks": TASKS[::-1], "matrix": ((70.0, None, None), (60.0, 50.0, None), (20.0, 60.0, 30.0))}


def study(*folders: Path) -> RunGroups:
    return RunGroups.read(aggregate.find(folders))


def rows(result: ResultTable, *head: str) -> dict:
    """The cells under some heads, by the row's words."""
    places = [result.head.index(name) for name in head]
    return {tuple(row[: result.words]): tuple(row[place] for place in places) for row in result.rows}


def value(cell: Summary) -> float:
    return cell.mean


def test_changes_and_flows_by_hand() -> None:
    run = small_runs.run()
    found = changes(run)
    assert {place: found[place] for place in zip(*np.nonzero(np.isfinite(found)), strict=True)} == {
        (1, 0): -10.0,
        (2, 0): 5.0,
        (2, 1): -10.0,
    }
    flow = flows(run)
    expected = {"within": 5.0, "across": -10.0, "regained": 5.0, "lost": -20.0}
    expected |= {"text > text": 5.0, "text > image": -10.0, "image > text": -10.0}
    assert math.isnan(flow.pop("image > image"))
    assert flow == expected
    metrics = run.results.metrics
    assert (flow["across"], flow["within"]) == (-metrics["forgetting_intermodal"], -metrics["forgetting_intramodal"])
    assert flow["regained"] == metrics["recovery"]


def test_stages_by_hand() -> None:
    run = small_runs.run()
    assert averages(run) == pytest.approx([50, 60, 175 / 3])
    assert forgettings(run) == pytest.approx([math.nan, 10, 7.5], nan_ok=True)
    assert forgettings(run)[-1] == run.results.metrics["forgetting"]
    accuracy, forgetting, tasks = ANALYSES["stages"](RunGroups.of(run))
    assert [value(cell) for cell in accuracy.rows[0][2:]] == pytest.approx([50, 60, 175 / 3])
    assert [value(cell) for cell in forgetting.rows[0][2:]] == [None, 10, 7.5]
    assert [value(cell) for cell in rows(tasks, "1", "2", "3")["lora", "paper", "draw"]] == [None, 80, 70]


def test_means_leave_out_what_is_not_there() -> None:
    first, second = means([[1.0, math.nan], [3.0, None]])
    assert first == Summary(2, 2.0, math.sqrt(2))
    assert second == Summary(0, None, None)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Two methods of the ablation and one outside it, two orders, two seeds."""
    for method, gain in (("ew", 0), ("mage-paper", 6), ("lora", 2)):
        for seed in (0, 1):
            matrix = [[v and v + gain + seed for v in row] for row in small_runs.MATRIX]
            write(tmp_path / method / "paper" / str(seed), method=method, seed=seed, matrix=matrix)
            matrix = [[v and v + gain for v in row] for row in REVERSED["matrix"]]
            more = {"tasks": REVERSED["tasks"], "matrix": matrix}
            write(tmp_path / method / "reverse" / str(seed), method=method, order="reverse", seed=seed, **more)
    return tmp_path


def test_orders_with_means_of_text_and_image(several: Path) -> None:
    by_order, over = ANALYSES["orders"](study(several))
    cells = rows(by_order, "text", "image", "Avg.ACC")["mage-paper", "paper"]
    assert [value(cell) for cell in cells] == pytest.approx([(45 + 60) / 2 + 6.5, 70 + 6.5, 175 / 3 + 6.5])
    text, image, _ = rows(by_order, "text", "image", "Avg.ACC")["lora", "reverse"]
    assert (value(text), value(image)) == pytest.approx(((20 + 30) / 2 + 2, 60 + 2))
    (cell,) = rows(over, "Avg.ACC")["ew",]
    assert cell.ends == pytest.approx((110 / 3, 175 / 3 + 0.5))


def test_ablation_has_the_ladder_alone_and_steps_paired_by_seed(several: Path) -> None:
    scores, steps = ANALYSES["ablations"](study(several))
    assert [row[:2] for row in scores.rows] == [
        ["ew", "paper"],
        ["mage-paper", "paper"],
        ["ew", "reverse"],
        ["mage-paper", "reverse"],
    ]
    assert value(rows(scores, "draw")["mage-paper", "paper"][0]) == 76.5
    found = rows(steps, "pairs", "Avg.ACC", "Forgetting")["ew → mage-paper", "paper"]
    assert found[0] == 2
    assert (found[1].n, found[1].mean, found[1].sd) == pytest.approx((2, 6, 0))
    assert value(found[2]) == pytest.approx(0, abs=1e-9)


def test_seeds(several: Path) -> None:
    spread, each = ANALYSES["seeds"](study(several))
    (cell,) = rows(spread, "Avg.ACC")["ew", "paper"]
    values = [175 / 3, 175 / 3 + 1]
    expected = {"mean": statistics.mean(values), "sd": statistics.stdev(values), "low": values[0], "high": values[1]}
    assert asdict(cell) == pytest.approx({"n": 2, **expected})
    assert rows(each, "Avg.ACC")["ew", "paper", "1"] == (pytest.approx(values[1]),)


def test_types_add_up_to_forgetting(several: Path) -> None:
    [found] = ANALYSES["types"](study(several))
    for iuf, hal, oth, forgetting in rows(found, "Avg.IUF", "Avg.HAL", "Avg.OTH", "Forgetting").values():
        assert value(iuf) + value(hal) + value(oth) == pytest.approx(value(forgetting))
        assert value(hal) == pytest.approx(value(forgetting))


def judged(folder: Path, name: str = "vlm", **more: object) -> None:
    averages = {"avg_iuf": 3.0, "avg_hal": 4.0, "avg_oth": 0.5, "forgetting": 7.5}
    table = {"judge": "openai", "model": "m", "prompts": "v1", "prompts_sha256": "0" * 64, "complete": True}
    (folder / "judge").mkdir(exist_ok=True)
    (folder / "judge" / f"{name}.json").write_text(json.dumps(table | {"unjudged": 0, "metrics": averages} | more))


def test_types_by_a_judge(tmp_path: Path) -> None:
    one, two, three = (write(tmp_path / str(seed), seed=seed) for seed in range(3))
    judged(one)
    judged(two, unjudged=5, complete=False, metrics=dict.fromkeys(("avg_iuf", "avg_hal", "avg_oth", "forgetting")))
    _, found = ANALYSES["types"](study(tmp_path))
    assert found.name == "types.vlm"
    [(hal, verdicts)] = rows(found, "Avg.HAL", "verdicts").values()
    assert hal.n == 1
    assert hal.mean == 4.0
    assert verdicts == "INCOMPLETE: 5 not judged"
    assert f"Without its verdicts: {three}." in found.definition
    assert "m, prompts v1 (00000000)" in found.definition
    more = [write(tmp_path / str(seed), seed=seed) for seed in range(3, 7)]
    _, found = ANALYSES["types"](study(tmp_path))
    assert f"Without its verdicts: {three}, {more[0]}, {more[1]} and 2 other runs." in found.definition


def test_a_table_of_rules_is_shown_where_it_differs(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    judged(folder, "rules", judge="rules", metrics=Run.read(folder).results.metrics)
    assert [found.name for found in ANALYSES["types"](study(folder))] == ["types"]
    judged(folder, "rules", judge="rules")
    assert [found.name for found in ANALYSES["types"](study(folder))] == ["types", "types.rules"]
    judged(folder, "vlm", metrics=Run.read(folder).results.metrics)
    assert [found.name for found in ANALYSES["types"](study(folder))] == ["types", "types.rules", "types.vlm"]


def test_a_judge_says_nothing_of_what_was_not_trained(tmp_path: Path) -> None:
    trained, untrained = write(tmp_path / "lora"), write(tmp_path / "zero", method="zero-shot")
    change(untrained / "results.json", cost={"optimizer_steps": 0})
    for folder in (trained, untrained):
        judged(folder)
    assert [[row[0] for row in found.rows] for found in ANALYSES["types"](study(tmp_path))] == [["lora"], ["lora"]]


@pytest.mark.parametrize("change", [{"model": "other"}, {"prompts_sha256": "1" * 64}, {"judge": "replay"}], ids=str)
def test_two_judges_under_one_name_are_refused(tmp_path: Path, change: dict) -> None:
    one, two = (write(tmp_path / str(seed), seed=seed) for seed in range(2))
    judged(one)
    judged(two, **change)
    with pytest.raises(UserError, match=r"judge/vlm.json is by different judges") as caught:
        ANALYSES["types"](study(tmp_path))
    assert str(one) in str(caught.value)
    assert str(two) in str(caught.value)


def test_a_judge_table_of_something_else_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    (folder / "judge").mkdir()
    (folder / "judge" / "notes.json").write_text("{}")
    with pytest.raises(UserError, match=r"notes\.json: .* `judge`; expected what `cnext judge` writes"):
        ANALYSES["types"](study(tmp_path))
    (folder / "judge" / "notes.json").unlink()
    judged(folder, sha256="0" * 64)
    with pytest.raises(UserError, match=r"vlm\.json has changed since `cnext judge` wrote it; judge the run again"):
        ANALYSES["types"](study(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"suite": "other"}, {"backbone": "huge"}, {"split": "validation"}, {"profile": "paper"}, {"samples": {"say": 9}}],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_comparable_is_refused_and_named(tmp_path: Path, change: dict) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", seed=1, **change)
    with pytest.raises(UserError, match="are not comparable") as caught:
        study(tmp_path)
    assert all(str(part) in str(caught.value) for part in (one, two, next(iter(change))))


FORMS = {
    "again": ("red red red red", "red", True),
    "around": ("it is a red one, i think", "red", True),
    "part of a word": ("reddish", "red", False),
    "empty": ("", "red", False),
    "no brackets": ("0.1,0.1,0.5,0.5", "[0.10,0.10,0.50,0.50]", True),
    "two brackets": ("from [0.1, 0.1] to [0.5, 0.5]", "[0.10,0.10,0.50,0.50]", True),
    "corners turned": ("[0.5,0.1,0.1,0.5]", "[0.10,0.10,0.50,0.50]", True),
    "another box": ("[0.6,0.6,0.9,0.9]", "[0.10,0.10,0.50,0.50]", False),
    "three numbers": ("[0.1,0.1,0.5]", "[0.10,0.10,0.50,0.50]", False),
}


@pytest.mark.parametrize("case", FORMS)
def test_right_but_for_format(case: str) -> None:
    text, expected, right = FORMS[case]
    assert right_but_for_format(text, expected) is right


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """One run of two tasks, eight answers to the first: four right when learnt, three of them broken at the end."""
    matrix = ((50.0, None), (37.5, 80.0))
    folder = write(tmp_path / "run", tasks=("say", "draw"), matrix=matrix)
    learnt = [answer("say", n, "red" if n < 4 else "blue", 100.0 * (n < 4)) for n in range(8)]
    end = [
        answer("say", 0, "red", 100.0),
        answer("say", 1, "blue", 0.0),
        answer("say", 2, "red red red", 0.0, paper=0.0, error="instruction_unfollowing"),
        answer("say", 3, "", 0.0, paper=100.0, error="instruction_unfollowing"),
        answer("say", 4, "red", 100.0),
        answer("say", 5, "red", 100.0),
        answer("say", 6, "re", 0.0, paper=100.0),
        answer("say", 7, "blue", 0.0),
    ]
    write_answers(folder, "1_say", "say", learnt)
    write_answers(folder, "2_draw", "say", end)
    return folder


def test_answers_that_broke_by_hand(answered: Path) -> None:
    overall, by_task, prompts = ANALYSES["breaks"](study(answered))
    [row] = by_task.rows
    found = dict(zip(by_task.head[3:], map(value, row[3:]), strict=True))
    assert found == {
        "correct when learnt": 50.0, "broken": 37.5, "HAL": 12.5, "IUF": 25.0, "OTH": 0.0, "lenient": 0.0,
        "fixed": 12.5, "format only": 12.5, "lost": 37.5, "gained": 25.0, "forgetting": 12.5,
    }  # fmt: skip
    assert [value(cell) for cell in overall.rows[0][2:]] == list(found.values()), "of one task the mean is itself"
    assert found["forgetting"] == Run.read(answered).results.metrics["forgetting"]
    assert [row[1] for row in prompts.rows] == ["say-1", "say-2", "say-3"]
    assert prompts.rows[1][4:] == ["red", "red red red", "2 draw", "instruction unfollowing", "fixed"]


def test_a_fragment_is_lenient_and_an_empty_answer_is_not(answered: Path) -> None:
    said = [answer("say", n, text, 0.0, paper=100.0) for n, text in enumerate(["re", "", "re", "", "", "", "", ""])]
    write_answers(answered, "2_draw", "say", said)
    _, by_task, _ = ANALYSES["breaks"](study(answered))
    [cells] = rows(by_task, "lenient", "fixed").values()
    assert [*map(value, cells)] == [25.0, 0.0]


def test_answers_of_different_samples_are_refused(answered: Path) -> None:
    write_answers(answered, "2_draw", "say", [answer("say", 9, "red", 100.0)])
    with pytest.raises(UserError, match="expected answers to the same samples of say at every stage"):
        ANALYSES["breaks"](study(answered))


def test_samples_through_the_stages(answered: Path) -> None:
    [found] = ANALYSES["samples"](study(answered))
    assert found.head[4:] == ["0 zero-shot", "1 say", "2 draw"]
    assert found.rows[0][1:] == ["say-1", "What color?", "red", "", "red (100.0)", "blue (0.0)"]


def test_what_cannot_be_made_is_named_and_the_rest_is_made(answered: Path, tmp_path: Path) -> None:
    found = analyze(study(answered))
    assert set(found.tables) == {"types", "transfer", "stages", "samples", "breaks", "validity"}
    assert set(found.left_out) == {"orders", "ablations", "seeds", "drift"}
    assert "checkpoints/ lacks 1_say, 2_draw" in found.left_out["drift"]
    bare = write(tmp_path / "bare")
    with pytest.raises(Unavailable, match=r"answers in predictions/ are needed.*\(say, stages 1 and 3\)"):
        analyze(study(bare), ["breaks"])


def test_every_finding_has_a_definition_and_every_format(several: Path, answered: Path) -> None:
    for folder in (several / "mage-paper", answered):
        found = analyze(study(folder))
        assert found.results
        assert all(result.definition.endswith(".") for result in found.results)
        for one in found.results:
            assert f"{one.name}," in formats.comma_separated(found)
        assert formats.latex(found).count(r"\begin{tabular}") == len(found.results)
        assert [table["name"] for table in json.loads(formats.as_json(found))["tables"]] == [
            one.name for one in found.results
        ]


def test_csv_has_means_with_what_is_beside_them(several: Path) -> None:
    found = analyze(study(several), ["seeds"])
    block = formats.comma_separated(found).split("\n\n")[0]
    first, *_ = csv.DictReader(io.StringIO(block))
    assert first["table"] == "seeds"
    assert float(first["Avg.ACC n"]) == 2
    assert float(first["Avg.ACC low"]) < float(first["Avg.ACC"]) < float(first["Avg.ACC high"])


def test_markdown_shows_answers_as_they_are(answered: Path) -> None:
    hostile = "<b>|**x**|"
    rows = [answer("say", n, hostile, 0.0) for n in range(8)]
    write_answers(answered, "2_draw", "say", rows)
    text = formats.markdown(analyze(study(answered), ["breaks"]))
    assert hostile not in text
    assert r"\<b\>\|\*\*x\*\*\|" in text


def test_figures_of_nothing_have_no_sign() -> None:
    result = ResultTable("x", "x", "x.", ["a", "b"], [], signed=True)
    expected = {-0.001: "0.00", 0.0: "0.00", 1.0: "+1.00", -1.0: f"{MINUS}1.00", None: NOTHING}
    assert {figure: formats.shown(figure, result) for figure in expected} == expected


def test_verb(answered: Path, several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(answered), "--what", "drift"]) == 2
    assert f"error: {answered}: drift needs the checkpoint of every stage" in capsys.readouterr().err
    assert main(["analyze", str(several), "--what", "orders", "seeds", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("table,method,order,n,text n,text,")
    assert main(["analyze", str(answered), "--format", "latex"]) == 0
    shown = capsys.readouterr()
    assert "left out: seeds: " in shown.err
    assert main(["analyze", str(answered)]) == 0
    assert "- ablations: the ablation needs two methods" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["analyze", str(answered), "--what", "vibes"])
    assert stop.value.code == 2
