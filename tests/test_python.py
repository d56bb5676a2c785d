"""cnext from Python: what may be given, results and how they are shown, studies, progress in a notebook, threads."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import multiprocessing
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from studies import fake_child

import cnext
from cnext import RunConfig, RunResult, StudyResult, open_run, open_study, study
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.monitoring import notebook
from cnext.monitoring.eta import Estimate
from cnext.monitoring.progress import Event, StudyProgress
from cnext.results.display import figure
from cnext.studies import local
from cnext.training import runner

CONTENT = {
    "method": "mage", "suite": "toy", "order": "paper", "seed": 3, "finished": False, "tasks": ["<b>a", "b&"],
    "score_matrix": [[60.0, None], [None, None]], "zero_shot": [10.0, 20.25], "budget": "default",
    "metrics": {"avg_acc": 60.0, "forgetting": None, "new_acc": 60.0}, "cost": {"optimizer_steps": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(toy_suite: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    out = tmp_path_factory.mktemp("python")
    return RunConfig(suite=toy_suite, data=str(data), order="VQAv2,HQEdit", out=str(out), device="cpu")


@pytest.fixture(scope="module")
def done(shared: RunConfig) -> StudyResult:
    """A study of two methods, one of which trains nothing."""
    return study(shared, ["lora", "zero-shot"], hyperparameters={"lora": {"scale": 2.0}})


class Cells(HTMLParser):
    """The text of a table's cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1] += data


def test_what_there_is() -> None:
    assert {*cnext.__all__} <= {*dir(cnext)}
    assert {"config", "training"} <= {*dir(cnext)}, "the parts that are imported"
    assert not {"importlib", "Any", "TYPE_CHECKING"} & {*dir(cnext)}


def test_strings_and_paths_are_the_same(tmp_path: Path) -> None:
    given = {name: str(tmp_path / name) for name in ("out", "data", "weights", "init_from", "suite", "clip")}
    one, other = RunConfig(**given), RunConfig(**{name: Path(text) for name, text in given.items()})
    assert one == other
    assert all(isinstance(getattr(one, name), Path) for name in ("out", "data", "weights", "init_from"))
    assert all(isinstance(getattr(one, name), str) for name in ("suite", "clip"))
    assert dataclasses.replace(one) == one
    listed = RunConfig(init_tasks=["VQAv2"], backbone_options=["a=b"], seed=np.int64(2), learning_rate=np.float32(0.5))
    assert (listed.init_tasks, listed.backbone_options) == (("VQAv2",), ("a=b",))
    assert type(listed.seed) is int
    assert type(listed.learning_rate) is float


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"out": 3}, "out must be a path as a string or Path, got 3 (int)"),
        ({"out": None}, "out must be a path as a string or Path, got None (NoneType)"),
        ({"data": ""}, "data must be a folder as a string or Path, or datasets by task and split or None, got ''"),
        (
            {"data": ["a"]},
            "data must be a folder as a string or Path, or datasets by task and split or None, got ['a']",
        ),
        ({"suite": 1}, "suite must be a name or a path, got 1 (int)"),
        ({"method": ["mage", "lora"]}, "method must be a string, got ['mage', 'lora'] (list)"),
        ({"order": ["a", "b"]}, "order must be a string such as \"reverse\" or \"a,b,c\" or None, got ['a', 'b']"),
        ({"seed": "1"}, "seed must be a whole number, got '1' (str)"),
        ({"seed": True}, "seed must be a whole number, got True (bool)"),
        ({"seed": 1.0}, "seed must be a whole number, got 1.0 (float)"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number or None, got '1e-3' (str)"),
        ({"checkpointing": 1}, "checkpointing must be True or False or None, got 1 (int)"),
        ({"precision": 16}, "precision must be one of 'float32', 'bfloat16', 'float16' or None, got 16 (int)"),
        ({"init_tasks": "VQAv2"}, "init_tasks must be a list of strings, got 'VQAv2' (str)"),
        ({"hyperparameters": [("c", 1)]}, "hyperparameters must be a dictionary by name, got [('c', 1)] (list)"),
    ],
)
def test_another_type_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        RunConfig(**given)
    assert said in str(refused.value)
    assert refused.value._render_traceback_() == [f"UserError: {refused.value}"], "in a notebook, one line"


def test_a_result_has_the_files_of_its_run(done: StudyResult, shared: RunConfig) -> None:
    run = done.runs[0]
    written = json.loads((run.folder / "results.json").read_text())
    assert run == written
    assert run == open_run(str(run.folder))
    assert run == cnext.run(dataclasses.replace(shared, method="lora", hyperparameters={"scale": 2.0})), "not run again"
    assert run["hyperparameters"]["scale"] == 2.0
    assert run.metrics == written["metrics"]
    assert (run.method, run.tasks, run.seed, run.finished) == ("lora", ("VQAv2", "HQEdit"), 0, True)
    np.testing.assert_array_equal(run.score_matrix, np.array(written["score_matrix"], float))
    np.testing.assert_array_equal(run.zero_shot, written["zero_shot"])
    assert [path.name for path in run.checkpoints] == ["1_VQAv2", "2_HQEdit"]
    assert run.report == run.folder / "report.html"
    assert repr(run).startswith("<RunResult lora on toy, order VQAv2,HQEdit, seed 0: Avg.ACC ")


def test_a_run_in_text_html_and_rich(done: StudyResult) -> None:
    run, console = done.runs[0], Console(file=io.StringIO(), width=100)
    console.print(run)
    cells = Cells(run._repr_html_()).found
    scores = [[*run.zero_shot], [run.score_matrix[0, 0], np.nan], [*run.score_matrix[1]]]
    rows = zip(["0 zero-shot", "1 VQAv2", "2 HQEdit"], scores, strict=True)
    lines = [" ".join([name, *(figure(score) for score in row)]) for name, row in rows]
    for shown in (str(run), console.file.getvalue(), " ".join(cells)):
        words = " ".join(shown.split())
        assert [line for line in lines if line not in words] == []
    assert f"Forgetting {run.metrics['forgetting']:.2f}".replace("-", "\N{MINUS SIGN}") in str(run)


def test_an_unfinished_run_says_so_and_html_is_escaped(tmp_path: Path) -> None:
    run = RunResult(tmp_path, CONTENT)
    html = run._repr_html_()
    assert Cells(html).found[:3] == ["after stage", "<b>a", "b&"]
    assert Cells(html).tags <= {"div", "b", "table", "thead", "tbody", "tr", "td", "th"}
    assert "&lt;b&gt;a" in html
    assert "Unfinished: 2 of 3 stages are evaluated." in str(run)
    assert ", unfinished: Avg.ACC 60.0, Forgetting \N{EN DASH}" in repr(run)
    assert str(run).splitlines()[3].split() == ["0", "zero-shot", "10.0", "20.2", "15.1"]
    assert run.report is None
    assert len(run.records()) == 3


def test_data_frames(done: StudyResult) -> None:
    scores = done.to_dataframe()
    assert list(scores.columns) == ["method", "order", "seed", "stage", "trained", "task", "score"]
    lora = scores[scores.method == "lora"]
    assert list(zip(lora.stage, lora.trained, lora.task, strict=True)) == [
        (0, "zero-shot", "VQAv2"), (0, "zero-shot", "HQEdit"), (1, "VQAv2", "VQAv2"), (2, "HQEdit", "VQAv2"),
        (2, "HQEdit", "HQEdit"),
    ]  # fmt: skip
    assert list(lora.score)[2] == done.runs[0].score_matrix[0, 0]
    metrics = done.to_dataframe("metrics").set_index("method")
    assert metrics.avg_acc.dtype == metrics.forgetting.dtype == np.float64
    assert metrics.forgetting["lora"] == done.runs[0].metrics["forgetting"]
    assert np.isnan(metrics.forgetting["zero-shot"]), "nothing was learnt"
    with pytest.raises(UserError, match="unknown form of a DataFrame 'score'; valid: scores, metrics"):
        done.runs[0].to_dataframe("score")  # type: ignore[arg-type]


def test_without_pandas(done: StudyResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package pandas, .*; pip install pandas"):
        done.to_dataframe()


def test_plots_are_figures(done: StudyResult, tmp_path: Path) -> None:
    for number, plotted in enumerate((done.plot(), done.runs[0].plot())):
        assert isinstance(plotted, Figure)
        plotted.savefig(tmp_path / f"{number}.svg")
        written = [text.get_text() for text in plotted.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert f"{done.row('lora').avg_acc.mean:.1f}" in written
        assert any(
            "Avg.ACC in percent" in text or "Outlined: the task just learnt" in text.replace("\n", " ")
            for text in written
        )
        assert plotted._repr_png_()[:4] == b"\x89PNG"


def test_a_study(done: StudyResult, shared: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert done.methods == ("lora", "zero-shot")
    assert [run.folder.relative_to(shared.out).parts[0] for run in done.runs] == ["lora", "zero-shot"]
    assert done.report == shared.out / "study.html"
    assert done.row("lora").avg_acc.mean == done.runs[0].metrics["avg_acc"]
    assert repr(done).startswith("<StudyResult 2 runs on toy: Avg.ACC lora ")
    cells = Cells(done._repr_html_()).found
    assert cells[:6] == ["method", "n", "Avg.ACC", "Forgetting", "New.ACC", "lora"]
    opened = open_study(str(shared.out), baseline="zero-shot")
    assert opened.tables.rows == done.tables.rows
    assert opened.tables.baseline == "zero-shot"
    capsys.readouterr()
    assert study(shared, ("lora", "zero-shot"), hyperparameters={"lora": {"scale": 2.0}}).tables == done.tables
    assert "2 of 2 runs are already finished" in capsys.readouterr().err


def test_several_orders_are_named(tmp_path: Path) -> None:
    for order, tasks in (("paper", ["a", "b"]), ("reverse", ["b", "a"])):
        for seed in (0, 1):
            config = RunConfig(method="lora", order=order, seed=seed, out=tmp_path, suite="next-tiny")
            fake_child.write_results(config)
            file = config.folder / "results.json"
            matrix = {"tasks": tasks, "score_matrix": [[50.0, None], [40.0, 60.0]], "zero_shot": None}
            file.write_text(json.dumps(json.loads(file.read_text()) | matrix))
    opened = open_study(tmp_path)
    assert opened.row("lora", "reverse").avg_acc.mean == 50.5
    assert str(opened).splitlines()[2].split()[:3] == ["method", "order", "n"]
    assert "lora, reverse 50.5" in repr(opened)
    assert opened.to_dataframe("metrics").groupby("order").avg_acc.max().to_dict() == {"paper": 51.0, "reverse": 51.0}
    with pytest.raises(UserError, match=r"lora has several orders, paper, reverse: name one, row\('lora', ORDER\)"):
        opened.row("lora")
    with pytest.raises(UserError, match="unknown order of lora 'alphabet'; valid: paper, reverse"):
        opened.row("lora", "alphabet")
    with pytest.raises(UserError, match="unknown method of the study 'mage'; valid: lora"):
        opened.row("mage")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": []}, "methods needs at least one value, got none"),
        ({"methods": [1]}, "methods must be strings, got 1 (int)"),
        ({"seeds": "01"}, "seeds must be whole numbers, got '01' (str)"),
        ({"seeds": [0, 0]}, "--seeds has 0 more than once"),
        ({"methods": "nothing"}, "unknown method 'nothing'"),
        ({"jobs": 0}, "--jobs must be auto or a number of at least 1, got 0"),
        ({"baseline": "ewc"}, "unknown baseline 'ewc'; valid: mage"),
        ({"hyperparameters": {"ewc": {}}}, "unknown method in hyperparameters 'ewc'; valid: mage"),
        ({"config": "mage"}, "study() expects a RunConfig first, got 'mage'; give methods as study(methods=[...])"),
        (
            {"config": RunConfig(method="ewc", hyperparameters={"strength": 1.0}), "methods": "lora"},
            "the configuration has hyperparameters of ewc, which is not one of lora",
        ),
    ],
)
def test_mistakes_of_a_study(given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        study(**given)
    assert said in str(refused.value)
    assert not list(tmp_path.iterdir()), "before anything is written"


def test_a_study_with_failures_raises_once_the_others_are_done(
    shared: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: RunConfig, _: object) -> None:
        if config.method == "mage":
            raise (UserError if config.seed else RuntimeError)("the data is bad")
        fake_child.write_results(config)

    monkeypatch.setattr(runner, "run", run)
    changed = dataclasses.replace(shared, out=tmp_path)
    for seed, kind in ((1, UserError), (0, RuntimeError)):
        with pytest.raises(kind) as raised:
            study(changed, ["mage", "lora"], seeds=seed)
        assert type(raised.value) is kind
        assert f"1 of 2 runs failed; the same call runs only these again, and cnext.open_study('{tmp_path}')" in str(
            raised.value
        )
        assert f"failed: mage/VQAv2-HQEdit/seed-{seed}" in str(raised.value)
        assert (tmp_path / f"lora/VQAv2-HQEdit/seed-{seed}/results.json").is_file()


def test_a_script_needs_its_main_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="under `if __name__ == '__main__':`"):
        study(jobs=2)


def test_open_reads_without_torch(done: StudyResult) -> None:
    code = (
        f"import cnext, sys; study = cnext.open_study({str(done.folder)!r}); "
        f"run = cnext.open_run({str(done.runs[0].folder)!r}); "
        "str(study), study._repr_html_(), str(run), run.records(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such file; give the folder of one run, or open a study with cnext.open_study"
    ):
        open_run(tmp_path)
    with pytest.raises(UserError, match="is no run folder and holds none"):
        open_study(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(CONTENT | {"tasks": "all"}))
    with pytest.raises(UserError, match=r"results.json: Expected `array`, got `str` - at `\$.tasks`"):
        open_run(tmp_path)


def test_runs_in_another_thread(shared: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main thread may set what a signal does."""
    monkeypatch.setattr(local, "_run", fake_child.child)
    plans = [
        plan(dataclasses.replace(shared, method="lora", seed=seed, out=tmp_path)) for seed in (0, fake_child.CRASHES)
    ]
    for planned in plans:
        planned.config.folder.mkdir(parents=True)
    failed: list[local.Failure] = []
    thread = threading.Thread(target=lambda: failed.extend(local.run_in_parallel(plans, 2)))
    thread.start()
    thread.join()
    assert [failure.config.seed for failure in failed] == [fake_child.CRASHES]
    assert (plans[0].config.folder / "results.json").is_file()


def test_progress_in_a_notebook_is_updated_in_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of runs in processes of their own; tests/test_notebook.py has those of a kernel's own."""
    shown, now = [], [0.0]

    def display(bundle: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        shown.append(bundle)
        return SimpleNamespace(update=lambda changed, raw: shown.append(changed))

    kernel = SimpleNamespace(kernel="a kernel")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(notebook, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StudyProgress(2, 2) as progress:
        progress.start("lora/<x>")
        for step in range(1000):
            now[0] += 0.001
            progress.update("lora/<x>", Event(f"step {step}", Estimate(step / 1000, 60.0, 90.0), line=step % 500 == 0))
        now[0] += 1
        progress.end("lora/<x>", "Avg.ACC 50.00")
    assert len(shown) < 10
    place = r"lora/<x> +\d+%  step \d+; 1 min 00 s left\nall runs +\d+%  0 of 2 done; "
    assert len([bundle for bundle in shown if re.match(place, bundle["text/plain"])]) >= 3
    assert "lora/&lt;x&gt;" in shown[-3]["text/html"]
    assert shown[-2]["text/plain"].startswith("all runs  50%  1 of 2 done")
    assert shown[-1] == {"text/plain": ""}, "nothing is left of the bars"
    assert "lora/<x>: Avg.ACC 50.00" in capsys.readouterr().out
