"""``cnext judge``: the errors of a run classified by rules, by a model behind a server and from a file of verdicts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
from failing_calls import SOME, Command, fails_once
from judging.judge_server import Judge, serving
from PIL import Image
from training.toy import rows as read_rows

from cnext.cli import main
from cnext.judging import asking
from cnext.judging.client import Client
from cnext.judging.run import JudgeConfig, judge_run
from cnext.judging.validation import FOLDER, SETS, validate
from cnext.scoring.base import ERROR_TYPES, PROFILES
from cnext.scoring.boxes import box
from cnext.scoring.text import short_answer
from cnext.tasks.base import Sample, Turn

TASKS = {"colors": short_answer, "boxes": box, "pictures": None}
SCORERS = {"colors": "short_answer", "boxes": "box", "pictures": "clip_text"}
# By stage of training: each task is answered ever worse.
ANSWERS = {
    "colors": [
        ["red", "red", "blue", "red", "red"],
        ["red", "blue", "jm", "", "redish"],
        ["djt", "", "blue", "redish", "a b"],
    ],
    "boxes": [None, ["[0.1,0.1,0.9,0.9]"] * 3, ["[0.1,0.1,0.9,0.9]", "left", "[0,0,0.1,0.1]"]],
    "pictures": [None, None, [92.5, 0.0, 31.25]],
}
NO_ERRORS = dict.fromkeys(ERROR_TYPES, 0.0)  # a judge reads them from the answers
REFERENCES = {"colors": "red", "boxes": "[0.1,0.1,0.9,0.9]", "pictures": ""}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(name="run")
def three_tasks(tmp_path: Path) -> Path:
    """The folder of a run of three tasks: what a judge reads of it, scored by the package's own scorers."""
    run, source, order = tmp_path / "run", tmp_path / "source.png", list(TASKS)
    Image.new("RGB", (4, 4)).save(source)
    scores = []
    for stage, trained in enumerate(order, 1):
        folder = run / "predictions" / f"{stage}_{trained}"
        folder.mkdir(parents=True)
        for task in order[:stage]:
            rows = [_row(run, folder, task, source, *pair) for pair in enumerate(ANSWERS[task][stage - 1])]
            (folder / f"{task}.jsonl").write_text(lines(rows))
            strict = sum(row["strict"] for row in rows) / len(rows)
            row = {"stage": stage, "trained": trained, "task": task, "scorer": SCORERS[task], "samples": len(rows)}
            scores.append({**row, "strict": strict, "paper": strict, "errors": dict.fromkeys(PROFILES, NO_ERRORS)})
    (run / "scores.jsonl").write_text(lines(scores))
    writes = {task: ["image" if task == "pictures" else "text"] for task in order}
    (run / "results.json").write_text(json.dumps({"tasks": order, "writes": writes}))
    return run


def _row(run: Path, folder: Path, task: str, source: Path, index: int, answer: str | float) -> dict:
    row = {"id": "same", "instruction": "What color is it?", "answer": REFERENCES[task], "text": "", "image": None}
    row |= {"source_image": None if task == "pictures" else str(source), "target_image": None}
    if task == "pictures":
        if answer:
            image = folder / f"{index}.png"
            Image.new("RGB", (4, 4), (index, 0, 0)).save(image)
            row["image"] = str(image.relative_to(run))
        return row | {"strict": answer, "error": "hallucination" if answer else "instruction_unfollowing"}
    from cnext.scoring.base import Prediction

    samples = [Sample("same", (Turn(row["instruction"], row["answer"]),))]
    score = TASKS[task](None, samples, [Prediction(answer)])[0]
    return row | {"text": answer, "strict": score.strict, "error": score.error}


def table(run: Path, name: str) -> dict:
    return json.loads((run / "judge" / f"{name}.json").read_text())


def growth(table: dict) -> float:
    return sum(table["metrics"][f"avg_{name}"] for name in ("hal", "iuf", "oth"))


def test_rules_add_up_to_forgetting(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(run)]) == 0
    shown = capsys.readouterr().out
    found = table(run, "rules")
    assert found["complete"]
    assert len(found["cells"]) == 6
    for cell in found["cells"]:
        assert sum(cell["shares"].values()) == pytest.approx(100 - cell["score"])
    # colors 80 to 0, boxes 100 to 33.3: forgetting (80 + 66.7) / 2.
    assert found["metrics"]["forgetting"] == pytest.approx((80 + 200 / 3) / 2)
    assert growth(found) == pytest.approx(found["metrics"]["forgetting"])
    # colors at the end: djt, "", "redish" and "a b" of no color; boxes: "left".
    assert found["metrics"]["avg_iuf"] == pytest.approx((80 + 100 / 3) / 2)
    assert "Forgetting 73.33" in shown
    assert "INCOMPLETE" not in shown
    rows = read_rows(run / "judge" / "rules.jsonl")
    assert len(rows) == sum(cell["errors"] for cell in found["cells"])
    scored = {}
    for file in (run / "predictions").glob("*/*.jsonl"):
        for index, row in enumerate(read_rows(file)):
            scored[int(file.parent.name[0]), file.stem, index] = row["error"]
    assert {(r["stage"], r["task"], r["index"]): r["error"] for r in rows}.items() <= scored.items()
    before = (run / "judge" / "rules.json").read_bytes()
    judge_run(run, JudgeConfig())
    assert (run / "judge" / "rules.json").read_bytes() == before


def test_a_model_judges_what_no_rule_decides(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Judge(brain=lambda messages: {"follows_instruction": True, "consistent": True})) as judge:
        given = ["judge", str(run), "--judge", f"openai:{judge.url}", "--model", "org/Toy-1"]
        assert main([*given, "--dry-run"]) == 0
        assert "11 errors: 6 judged by rules, 5 for the judge; 4 requests, about" in capsys.readouterr().out
        assert not judge.requests
        assert not (run / "judge").exists()
        assert main(given) == 0
        assert len(judge.requests) == 4
        found = table(run, "org-toy-1")
        assert found["complete"]
        assert growth(found) == pytest.approx(found["metrics"]["forgetting"])
        assert found["metrics"]["avg_hal"] == 0
        assert sum(cell["shares"]["other"] for cell in found["cells"]) > 0
        verdicts = run / "judge" / "org-toy-1.jsonl"
        before = (verdicts.read_bytes(), (run / "judge" / "org-toy-1.json").read_bytes())
        assert main(given) == 0
        assert len(judge.requests) == 4
        assert (verdicts.read_bytes(), (run / "judge" / "org-toy-1.json").read_bytes()) == before
    assert main(["judge", str(run), "--judge", f"replay:{verdicts}"]) == 0
    replayed = table(run, "replay")
    assert replayed["cells"] == found["cells"]
    assert replayed["model"] == "org/Toy-1"


def test_unjudged_errors_are_counted_for_no_type(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Judge()) as judge:
        config = JudgeConfig(f"openai:{judge.url}", "toy", limit=2, concurrency=1)
        found = judge_run(run, config)
        assert len(judge.requests) <= 2
        assert "INCOMPLETE: 3 errors are not judged" in capsys.readouterr().out
        assert not found["complete"]
        assert found["reasons"] == {"beyond the limit": 3}
        assert [found["metrics"][f"avg_{name}"] for name in ("hal", "iuf", "oth")] == [None] * 3
        assert found["metrics"]["forgetting"] is not None
        assert found["estimates"] is None, "a cell of which nothing is judged tells nothing"
        for cell in found["cells"]:
            assert sum(cell["shares"].values()) + cell["unjudged_share"] == pytest.approx(100 - cell["score"])
            assert ("undecided_by_rule" in cell) == (cell["unjudged"] > 0)
        part = next(c for c in found["cells"] if c["unjudged"])["undecided_by_rule"]
        for kind in ERROR_TYPES:
            low, high = part["types"][kind]["interval"]
            assert 0 <= low <= 100 * part["types"][kind]["count"] / max(part["judged"], 1) <= high <= 100
        done = len(judge.requests)
        judge.script = ["ok"] * (done + 1) + [(401, {})] * 9
        command = ["judge", str(run), "--judge", f"openai:{judge.url}", "--model", "toy", "--concurrency", "1"]
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "wants a key in OPENAI_API_KEY (status 401); verdicts so far are saved" in error
        assert f"{run / 'judge' / 'toy.json'} is incomplete: run the command again" in error
        assert 0 < table(run, "toy")["unjudged"] < 3
        judge.script = ()
        assert main(command) == 0
    assert table(run, "toy")["complete"]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def answer_again(run: Path, stage: str, task: str, rows: list[dict]) -> None:
    """Replaces the answers to a task after a stage, with their mean score."""
    (run / "predictions" / stage / f"{task}.jsonl").write_text(lines(rows))
    scores = read_rows(run / "scores.jsonl")
    for row in scores:
        if (f"{row['stage']}_{row['trained']}", row["task"]) == (stage, task):
            row["strict"] = sum(answer["strict"] for answer in rows) / len(rows)
    (run / "scores.jsonl").write_text(lines(scores))


def test_a_part_of_the_errors_gives_estimates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("1_colors", "3_pictures"):
        known = read_rows(run / "predictions" / stage / "colors.jsonl")
        more = [{"id": text, "text": text} for text in ("green", "pink", "cyan", "gold", "teal", "navy")]
        wrong = {"strict": 0.0, "error": "hallucination"}
        answer_again(run, stage, "colors", known + [known[-1] | wrong | row for row in more])
    with serving(Judge(brain=lambda messages: {"follows_instruction": True, "consistent": False})) as judge:
        given = ["judge", str(run), "--judge", f"openai:{judge.url}", "--model", "toy"]
        assert main(given) == 0
        whole = table(run, "toy")
        assert "estimates" not in whole
        assert main([*given, "--limit", "8"]) == 0
    assert table(run, "toy") == whole, "a sample does not replace all"
    found = table(run, "toy-limit-8")
    assert not found["complete"]
    assert [found["metrics"][name] for name in found["estimates"]] == [None] * 3
    assert sum(of["estimate"] for of in found["estimates"].values()) == pytest.approx(found["metrics"]["forgetting"])
    for name, of in found["estimates"].items():
        assert of["low"] <= whole["metrics"][name] <= of["high"]
    low, high = (found["estimates"]["avg_hal"][end] for end in ("low", "high"))
    assert low < high
    out = capsys.readouterr().out
    assert f"Avg.HAL {found['estimates']['avg_hal']['estimate']:.2f} [{low:.2f}, {high:.2f}]  Avg.IUF" in out


def judging(run: Path, judge: Judge, *more: str) -> list[str]:
    given = ["--judge", f"openai:{judge.url}", "--model", "toy", "--concurrency", "1", "--tries", "1"]
    return ["judge", str(run), *given, *more]


@pytest.mark.parametrize("script", [["malformed"] * 2, ["length"] * 2, [(400, {})], [(500, {})]], ids=range(4))
def test_an_error_that_is_not_judged_makes_the_exit_status_1(
    script: list, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Judge(script)) as judge:
        assert main(judging(run, judge)) == 1
        shown = capsys.readouterr().out
        left = table(run, "toy")["unjudged"]
        assert left > 0
        assert f"{left} errors were to be judged and were not: run the command again" in shown
        assert f"used: {len(script) + 3} requests, " in shown
        assert not table(run, "toy")["complete"]
        assert main(judging(run, judge)) == 0
        assert len(judge.requests) == len(script) + 4
        counted = 7 * sum(isinstance(what, str) for what in script) + 7 * 4
        assert table(run, "toy")["complete"]
        assert table(run, "toy")["usage"]["requests"] == len(judge.requests)
        assert table(run, "toy")["usage"]["prompt_tokens"] == counted, "of both commands"


def test_all_of_a_sample_is_enough_for_exit_status_0(run: Path) -> None:
    with serving(Judge()) as judge:
        assert main(judging(run, judge, "--limit", "2")) == 0
        assert not table(run, "toy")["complete"]
        assert main(judging(run, judge)) == 0
        whole = table(run, "toy")
        assert whole["complete"]
        assert main(judging(run, judge, "--limit", "99")) == 0
        assert table(run, "toy") == whole
        assert len(judge.requests) == 4
    assert [file.name for file in (run / "judge").glob("*.json")] == ["toy.json"]


@pytest.mark.parametrize("script", [["malformed"] * 2, [(401, {})]], ids=["incomplete", "stopped"])
def test_a_complete_table_stays(script: list, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stages are asked for after those that matter, and one case stays without a verdict."""
    rows = read_rows(run / "predictions" / "2_boxes" / "colors.jsonl")
    wrong = {"strict": 0.0, "error": "hallucination"}
    others = [row | wrong | {"text": text} for row, text in zip(rows, ("green", "pink"), strict=False)]
    answer_again(run, "2_boxes", "colors", others)
    with serving(Judge()) as judge:
        assert main(judging(run, judge)) == 0
        whole = table(run, "toy")
        judge.script = ["ok"] * len(judge.requests) + script
        assert main(judging(run, judge, "--every-stage")) == (2 if "malformed" not in script else 1)
        shown = "".join(capsys.readouterr())
        assert "toy.json" in shown
        assert "stays as it is" in shown
        assert table(run, "toy") == whole
        answer_again(run, "1_colors", "colors", read_rows(run / "predictions" / "1_colors" / "colors.jsonl")[:3])
        judge.script = ["ok"] * len(judge.requests) + script
        assert main(judging(run, judge, "--every-stage")) == (2 if "malformed" not in script else 1)
        assert not table(run, "toy")["complete"], "a table of other answers is replaced"
        assert main(judging(run, judge, "--every-stage")) == 0
    assert table(run, "toy")["complete"]
    assert len(table(run, "toy")["cells"]) > len(whole["cells"])


def test_a_judging_that_is_interrupted_is_resumed(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    # A process that a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    ask, stopped = asking.judge, []

    def recorded(keyed: object, verdicts: object, client: Client, *rest: object) -> dict[str, str]:
        stopped.append(client.stopped)
        return ask(keyed, verdicts, client, *rest)

    def interrupted(messages: list) -> dict[str, bool]:
        if len(judge.requests) == 3:
            for _ in range(6):  # a thread that is about to wait notices a signal only when it wakes
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                if stopped[0].wait(5):
                    break
        return {"follows_instruction": True, "consistent": True}

    monkeypatch.setattr(asking, "judge", recorded)
    with serving(Judge(brain=interrupted)) as judge:
        assert main(judging(run, judge)) == 130
        assert capsys.readouterr().err.startswith("interrupted; the same command continues")
        first = table(run, "toy")
        assert first["unjudged"] > 0
        assert first["reasons"] == {"judging ended early": first["unjudged"]}
        kept = len(read_rows(run / "judge" / "toy.jsonl"))
        assert kept == len(judge.requests) == 3
        assert main(judging(run, judge)) == 0
        assert len(judge.requests) == 4
    assert table(run, "toy")["complete"]
    assert table(run, "toy")["usage"]["requests"] == 4


def test_what_is_sent_otherwise_is_said_and_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def server(path: str, body: dict) -> tuple | None:
        refused = body.get("response_format", {}).get("type") == "json_schema"
        return (400, {}, {"error": {"message": "json_schema is not supported"}}) if refused else None

    with serving(Judge(server=server)) as judge:
        assert main(judging(run, judge, "--max-tokens", "512")) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("warning: the judge at ")
    assert error.endswith("json_schema is not supported); it is sent response_format json_object from now on\n")
    changed = {"max_tokens": 512, "response_format": {"type": "json_object"}}
    assert table(run, "toy")["parameters"] == [changed]
    assert all(row["parameters"] == changed for row in read_rows(run / "judge" / "toy.jsonl"))


def test_words_that_a_task_knows_are_words(run: Path) -> None:
    """A "tv" has no vowel, and is no slip of the form where the task asks about one; "djt" is."""
    row = read_rows(run / "predictions" / "3_pictures" / "colors.jsonl")[0] | {"instruction": "What is it?"}
    asked = [("tv", "tv", 100.0, ""), ("lamp", "tv", 0.0, ""), ("lamp", "djt", 0.0, "")]
    rows = [row | dict(zip(("answer", "text", "strict", "error"), of, strict=True)) for of in asked]
    answer_again(run, "3_pictures", "colors", rows)
    judge_run(run, JudgeConfig())
    labels = read_rows(run / "judge" / "rules.jsonl")
    found = [row["error"] for row in labels if (row["stage"], row["task"]) == (3, "colors")]
    assert found == ["hallucination", "instruction_unfollowing"]


def test_every_run_of_a_folder_is_judged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "study" / "one")
    shutil.copytree(run, tmp_path / "study" / "two")
    assert main(["judge", str(tmp_path / "study"), str(run)]) == 0
    folders = [tmp_path / "study" / "one", tmp_path / "study" / "two", run]
    assert all((folder / "judge" / "rules.json").is_file() for folder in folders)
    assert [line for line in capsys.readouterr().out.splitlines() if line in map(str, folders)] == [*map(str, folders)]


def test_replay_of_part_of_the_verdicts(run: Path) -> None:
    with serving(Judge()) as judge:
        judge_run(run, JudgeConfig(f"openai:{judge.url}", "toy"))
    rows = read_rows(run / "judge" / "toy.jsonl")
    left = set()
    for dropped in range(len(rows)):
        (run / "part.jsonl").write_text(lines(rows[:dropped] + rows[dropped + 1 :]))
        found = judge_run(run, JudgeConfig(f"replay:{run / 'part.jsonl'}"))
        assert not found["complete"]
        assert found["reasons"] == {"no verdict in the file": found["unjudged"]}
        assert main(["judge", str(run), "--judge", f"replay:{run / 'part.jsonl'}"]) == 1
        left.add(found["unjudged"])
    assert left == {1, 2}, "one verdict is of two equal answers"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("results.json", "is no run folder and holds none"),
        ("scores.jsonl", "scores.jsonl is missing: a judge needs a complete run folder"),
        ("predictions/3_pictures/boxes.jsonl", "boxes.jsonl: a judge needs a run's predictions, found none"),
    ],
    ids=["results", "scores", "predictions"],
)
def test_a_run_without_its_files_is_named(
    spoil: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / spoil).unlink()
    assert main(["judge", str(run)]) == 2
    error = capsys.readouterr().err
    assert str(run) in error
    assert message in error


def test_answers_of_another_run_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "predictions" / "3_pictures" / "colors.jsonl"
    path.write_text((run / "predictions" / "1_colors" / "colors.jsonl").read_text())
    assert main(["judge", str(run)]) == 2
    assert "the files are of different runs" in capsys.readouterr().err


def test_an_untrained_run_is_judged_by_its_zero_shot_answers(run: Path) -> None:
    scores = read_rows(run / "scores.jsonl")
    zero = scores[0] | {"stage": 0, "trained": "zero-shot"}
    (run / "scores.jsonl").write_text(lines([zero, *scores]))
    (run / "predictions" / "1_colors").rename(run / "predictions" / "0_zero-shot")
    assert len(judge_run(run, JudgeConfig())["cells"]) == 7


BAD = ("--judge gpt", "--judge openai:", "--judge replay:", "--limit -1", "--concurrency 0", "--timeout 0", "--tries 0")
BAD += ("--name ../up", "--judge replay:nowhere.jsonl")
SERVER = "--judge openai:http://127.0.0.1:1"
BAD += tuple(f"{SERVER} {over}" for over in ("--max-tokens 0", "--timeout inf", "--timeout nan", "--timeout 1e300"))
BAD += tuple(f"{SERVER} {over}" for over in ("--tries 5000", "--concurrency 1000000000", "--limit " + "9" * 40))
USELESS = (
    "--limit 5",
    "--max-tokens 99",
    "--model toy",
    "--concurrency 2",
    "--timeout 9",
    "--tries 2",
    "--out elsewhere",
)
USELESS += ("--judge replay:nowhere.jsonl --model toy",)


@pytest.mark.parametrize("given", [*BAD, *USELESS])
def test_bad_options_are_named(given: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that would change nothing is refused as well."""
    words = given.split()
    assert main(["judge", str(run), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words[-2]} needs " if given in USELESS else "error: ")
    assert not (run / "judge").exists()


PICTURED, IUF = ("made", "read", "read-later"), "instruction_unfollowing"


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = found = validate(JudgeConfig(), tmp_path)
    assert list(found["sets"]) == list(SETS)
    made = found["sets"]["made"]
    assert (made["judged"], made["confusion"]["hallucination"]["hallucination"]) == (200, 69)
    assert "accuracy 0.925  kappa 0.887  judged 200  unjudged 0" in capsys.readouterr().out
    docs = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    for name, each in found["sets"].items():
        types = [
            f"{each['types'][kind]['precision']:.2f} / {each['types'][kind]['recall']:.2f}" for kind in ERROR_TYPES
        ]
        cells = [str(each["judged"]), f"{each['accuracy']:.2f}", f"{each['kappa']:.2f}", *types]
        assert re.search(rf"^\| `{name}` \| [^|]* \| {re.escape(' | '.join(cells))} \|$", docs, re.MULTILINE), cells
    assert main(["judge", "validate", "--out", str(tmp_path / "judge")]) == 0
    assert (tmp_path / "judge" / "rules.json").is_file()

    labelled = {
        (row["instruction"], row["expected"], row["answer"]): row["error"]
        for name in PICTURED
        for row in json.loads((FOLDER / f"{name}.json").read_text())
    }

    def knowing(messages: list) -> dict[str, bool]:
        data = json.loads(messages[1]["content"][-1]["text"].split(" ", 1)[1].rsplit(" ", 1)[0])
        error = labelled[data["instruction"], data.get("expected", ""), data["answer"]]
        return {"follows_instruction": error != "instruction_unfollowing", "consistent": error == "other"}

    with serving(Judge(brain=knowing)) as judge:
        found = validate(JudgeConfig(f"openai:{judge.url}", "toy"), tmp_path)
        for name in PICTURED:
            # Where rules say unfollowing, no model is asked.
            by_rule = rules["sets"][name]["confusion"]
            missed = sum(row[IUF] for kind, row in by_rule.items() if kind != IUF)
            each = found["sets"][name]
            assert each["accuracy"] == pytest.approx(1 - missed / each["judged"])
        asked = len(judge.requests)
        assert asked <= sum(each["judged"] for each in found["sets"].values()) - 66
        titles = {sum(part["type"] == "image_url" for part in r["messages"][1]["content"]) for r in judge.requests}
        assert titles == {1, 3}
        validate(JudgeConfig(f"openai:{judge.url}", "toy"), tmp_path)
        assert len(judge.requests) == asked


def test_validate_that_is_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Judge(["malformed"] * 2)) as judge:
        given = ["judge", "validate", "--judge", f"openai:{judge.url}", "--out", str(tmp_path), "--concurrency", "1"]
        assert main([*given, "--limit", "3"]) == 1
        assert "judged 71  unjudged 129" in capsys.readouterr().out
        assert main([*given, "--limit", "3"]) == 0
        assert len(judge.requests) == 5
    [file] = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["usage"]["requests"] == 5


class Judging(Command):
    """Repeated, it asks for less: the tokens used, and with them the table's checksum, are others."""

    def files(self) -> dict[str, bytes]:
        found = super().files()
        for name in [name for name in found if name.endswith("toy.json")]:
            kept = {key: value for key, value in json.loads(found[name]).items() if key not in ("usage", "sha256")}
            found[name] = json.dumps(kept).encode()
        return found


@SOME
def test_calls_for_files_that_fail(some: int | None, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a model is asked. One request at a time, so that verdicts are kept in one order."""
    copy = run.with_name("copy") / "run"
    with serving(Judge()) as judge:

        def begin() -> None:
            judge.requests.clear()
            shutil.rmtree(copy.parent, ignore_errors=True)
            shutil.copytree(run, copy)

        command = Judging(copy.parent, begin, lambda: main(judging(copy, judge)))
        assert fails_once(command, capsys, some) > 10
