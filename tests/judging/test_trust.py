"""What is kept of judging: through signals and other judges of the folder, and noticed when it has changed since."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from judging.judge_server import Judge, serving
from judging.test_parts import PROMPTS, kept, row
from judging.test_run import judging, no_proxy, table, three_tasks  # noqa: F401
from training.toy import rows as read_rows

from cnext.cli import main
from cnext.errors import UserError
from cnext.judging.cache import Verdicts
from cnext.judging.run import JudgeConfig, judge_run
from cnext.runs import judge_tables

YES = {"follows_instruction": True, "consistent": True}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "interrupted; the same command continues from what was saved\n"),
        (signal.SIGTERM, "stopped by SIGTERM; the same command continues from what was saved\n"),
    ],
)
def test_a_signal_ends_open_requests(
    number: signal.Signals,
    said: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    # A process that a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def signalled(messages: list) -> dict[str, bool]:
        if len(judge.requests) == 3:
            signal.pthread_kill(threading.main_thread().ident, number)
        return YES

    # The third is never answered, and only the client ends it: the server would wait for 20 seconds.
    with serving(Judge(["ok", "ok", "slow"], brain=signalled)) as judge:
        assert main(judging(run, judge, "--timeout", "1000")) == 130
        assert capsys.readouterr().err == said
        assert len(read_rows(run / "judge" / "toy.jsonl")) == 2
        first = table(run, "toy")
        assert first["reasons"] == {"judging ended early": first["unjudged"]}
        assert judge_tables.read(run, run / "judge" / "toy.json").unjudged > 0
        assert main(judging(run, judge)) == 0
        assert len(judge.requests) == 5
    assert table(run, "toy")["complete"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def flipped(path: Path, number: int = 0) -> None:
    """Turns a verdict of a file around."""
    lines = path.read_text().splitlines(keepends=True)
    lines[number] = lines[number].replace('"consistent": false', '"consistent": true')
    path.write_text("".join(lines))


def test_a_verdict_that_was_edited_is_refused(tmp_path: Path) -> None:
    path = kept(tmp_path / "toy.jsonl", "a", "b", "c")
    flipped(path, 1)
    with pytest.raises(UserError, match=r"toy\.jsonl:2 has changed .*; delete the line, and what it judges is asked"):
        Verdicts(path, PROMPTS, "toy")
    with pytest.raises(UserError, match=r"toy\.jsonl:2 has changed .*; judge again, or replay another file"):
        Verdicts(path, PROMPTS, None)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    verdicts = Verdicts(path, PROMPTS, "toy")
    assert [verdicts.error_type(key) for key in "abc"] == ["hallucination", None, "hallucination"]
    assert not verdicts.notes()


def test_every_field_of_a_verdict_is_sealed(tmp_path: Path) -> None:
    path = kept(tmp_path / "toy.jsonl", "a")
    whole = json.loads(path.read_text())
    for name, value in whole.items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else None
        other = {"a": 1} if isinstance(value, dict) else f"{value[:-1]}_" if other is None else other
        path.write_text(json.dumps(whole | {name: other}) + "\n")
        with pytest.raises(UserError, match=r"toy\.jsonl:1 has changed"):
            Verdicts(path, PROMPTS, "toy")


def test_half_a_line_and_verdicts_of_earlier_versions_are_said(
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(Judge(brain=lambda messages: YES)) as judge:
        assert main(judging(run, judge)) == 0
        assert "note:" not in capsys.readouterr().out
        path = run / "judge" / "toy.jsonl"
        rows = read_rows(path)
        del rows[0]["sha256"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows)[:-9])
        assert main(judging(run, judge)) == 0
        assert len(judge.requests) == len(rows) + 1
    out = capsys.readouterr().out
    assert f"note: {path}: 1 of {len(rows) - 1} verdicts have no checksum, as earlier versions wrote them" in out
    assert f"note: {path}: the last line breaks off; it does not count, and what it judges is asked again" in out


def test_a_file_that_goes_away_while_it_is_written(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "toy.jsonl", PROMPTS, "toy")
    verdicts.add(row("a"))
    (tmp_path / "toy.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match=r"toy\.jsonl was moved or deleted"):
        verdicts.add(row("b"))
    verdicts.close()


def test_a_second_judge_of_a_folder_asks_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Judge()) as judge:
        first = Verdicts(run / "judge" / "toy.jsonl", PROMPTS, "toy")
        first.open()
        assert main(judging(run, judge)) == 2
        assert "another process is writing" in capsys.readouterr().err
        assert not judge.requests
        first.close()
    second, late = (Verdicts(run / "judge" / "toy.jsonl", PROMPTS, "toy") for _ in range(2))
    second.add(row("a"))
    second.close()
    late.open()
    assert late.error_type("a") == "hallucination", "judged since the file was read"
    late.close()


def test_judges_by_rules_at_the_same_time(run: Path) -> None:
    failed: list[BaseException] = []

    def judged() -> None:
        try:
            for _ in range(5):
                judge_run(run, JudgeConfig())
        except BaseException as error:  # noqa: BLE001 (shown below)
            failed.append(error)

    threads = [threading.Thread(target=judged) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert judge_tables.read(run, run / "judge" / "rules.json").complete
    assert sorted(file.name for file in (run / "judge").iterdir()) == ["rules.json", "rules.jsonl"]


def answer_changed(run: Path) -> None:
    """Another wrong answer of the same score."""
    path = run / "predictions" / "3_pictures" / "colors.jsonl"
    path.write_text(path.read_text().replace('"text": "djt"', '"text": "green"'))


def image_changed(run: Path) -> None:
    shutil.copy(run / "predictions" / "3_pictures" / "0.png", run / "predictions" / "3_pictures" / "2.png")


def image_gone(run: Path) -> None:
    (run / "predictions" / "3_pictures" / "2.png").unlink()


REPLAY = ["--judge", "replay:part.jsonl"]


@pytest.mark.parametrize(
    ("judge", "change"),
    [([], answer_changed), ([], image_changed), ([], image_gone), (REPLAY, answer_changed), (REPLAY, image_changed)],
)
def test_a_table_is_of_the_answers_that_were_judged(
    judge: list[str],
    change: Callable[[Path], None],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run)
    kept(run / "part.jsonl", "a")
    command, name = ["judge", str(run), *judge], "replay" if judge else "rules"
    assert main(command) == bool(judge)
    file = run / "judge" / f"{name}.json"
    assert judge_tables.read(run, file).judge == name
    change(run)
    with pytest.raises(UserError, match=r"has changed since .*json was written; judge the run again"):
        judge_tables.read(run, file)
    assert main(command) == bool(judge)
    assert judge_tables.read(run, file).judge == name
    shutil.rmtree(run / "predictions")
    assert judge_tables.read(run, file).judge == name, "what is deleted cannot be checked"


def test_a_table_of_other_answers_does_not_stay(run: Path) -> None:
    """Though it is complete, and the new one is not."""
    with serving(Judge(brain=lambda messages: YES)) as judge:
        assert main(judging(run, judge)) == 0
        answer_changed(run)
        judge.script = ["ok"] * len(judge.requests) + ["malformed"] * 2
        assert main(judging(run, judge)) == 1
        assert not judge_tables.read(run, run / "judge" / "toy.json").complete


@pytest.mark.parametrize("change", [{"unjudged": 0}, {"metrics": {}}, {"sha256": "0" * 64}, {"predictions": {}}])
def test_a_table_that_was_edited_is_refused(change: dict, run: Path) -> None:
    judge_run(run, JudgeConfig())
    file = run / "judge" / "rules.json"
    values = json.loads(file.read_text())
    values["unjudged"] = 1
    file.write_text(json.dumps(judge_tables.sealed(values)))
    assert judge_tables.read(run, file).unjudged == 1
    file.write_text(json.dumps(judge_tables.sealed(values) | change))
    with pytest.raises(UserError, match=r"rules\.json has changed since `cnext judge` wrote it; judge the run again"):
        judge_tables.read(run, file)
    judge_run(run, JudgeConfig())
    assert judge_tables.read(run, file).complete


def test_tables_of_earlier_versions_are_read_as_before(run: Path) -> None:
    judge_run(run, JudgeConfig())
    file = run / "judge" / "rules.json"
    values = json.loads(file.read_text())
    del values["sha256"], values["predictions"]
    file.write_text(json.dumps(values))
    answer_changed(run)
    assert judge_tables.read(run, file).complete
    values["predictions"] = {"../elsewhere": "0" * 64}
    file.write_text(json.dumps(judge_tables.sealed(values)))
    with pytest.raises(UserError, match=r"expected files of predictions/, got '\.\./elsewhere'"):
        judge_tables.read(run, file)


STEERING = "\x1b]0;owned\x07\x1b[2J\r\u202e\n\u2028\ud800"


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
@pytest.mark.parametrize("bare", [False, True], ids=["json", "text"])
def test_what_a_server_says_cannot_steer_the_terminal(
    status: int,
    bare: bool,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = STEERING.replace("\ud800", "") if bare else {"error": {"message": f"max_tokens {STEERING}", "code": status}}
    headers = {"Retry-After": "0"}
    if bare:
        headers["Content-Length"] = str(len(said.encode()))
    with serving(Judge(server=lambda path, body: (status, headers, said))) as judge:
        assert main(judging(run, judge)) in (1, 2)
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).split("\n"))
    assert (r"\x1b]0;owned" in shown.out + shown.err) == (status in (400, 404))
    for line in json.dumps(table(run, "toy"), ensure_ascii=False).split("\n"):
        assert line.isprintable()


def test_what_files_hold_cannot_steer_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kept(run / "judge" / "toy.jsonl", "a")
    spoiled = json.loads(path.read_text()) | {"model": STEERING, "sha256": ""}
    path.write_text(json.dumps(spoiled) + "\n")
    with serving(Judge()) as judge:
        assert main(judging(run, judge)) == 2
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"tasks": [STEERING, *results["tasks"]]}))
    assert main(["judge", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert all(line.isprintable() for line in error.split("\n"))
