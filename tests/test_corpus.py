"""Run folders and exports that releases wrote: this version resumes, reports, tabulates, exports and imports them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import sealing

from cnext import cli, open_run
from cnext.runs import schemas
from cnext.runs.schemas import StageScore

ARCHIVES = sorted((Path(__file__).parent / "corpus").glob("*.tar.xz"))
ORDER = ["VQAv2", "HQEdit"]


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a release, unpacked."""
    folder = tmp_path_factory.mktemp("corpus")
    with tarfile.open(request.param) as file:
        file.extractall(folder, filter="data")
    return folder


def done(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0, words


def test_there_is_one_of_this_release() -> None:
    import cnext

    assert any(path.name == f"{cnext.__version__}.tar.xz" for path in ARCHIVES)


@pytest.mark.parametrize("verb", ["table", "status", "analyze", "report", "metrics", "judge"])
def test_a_finished_run_is_read(verb: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = corpus / "mage-run"
    done(verb, run)
    out = capsys.readouterr().out
    average = open_run(run).metrics["avg_acc"]
    assert average is not None
    if verb in ("table", "status", "metrics"):
        assert f"{average:.1f}"[:3] in out
    elif verb == "report":
        assert (run / "report.html").stat().st_size > 10_000
    else:
        assert "VQAv2" in out


def test_a_finished_run_compares_equal_to_itself(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done("compare", corpus / "mage-run", "--to", corpus / "mage-run")
    assert "identical" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["peft", "authors"])
def test_its_adapters_are_exported_as_then_and_imported(kind: str, corpus: Path, tmp_path: Path) -> None:
    done("export", corpus / "mage-run", "--to", tmp_path / kind, "--format", kind)
    method = ["--method", "mage"] if kind == "authors" else []
    done("import", corpus / f"export-{kind}", "--to", tmp_path / "imported", "--backbone", "tiny", *method)
    names = {path.relative_to(tmp_path / kind) for path in (tmp_path / kind).rglob("*.safetensors")}
    for name in names:
        assert (tmp_path / kind / name).read_bytes() == (corpus / f"export-{kind}" / name).read_bytes(), name
    assert bool(names) == (kind == "peft")


def test_a_stopped_run_is_resumed(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In another place than it was begun in. What was measured before stays."""
    place = corpus / "again" / "lora" / "-".join(ORDER) / "seed-0"
    place.parent.mkdir(parents=True)
    (corpus / "lora-run").rename(place)
    sealing.change(place / "config.json", data=str(corpus / "data"))
    before = schemas.read_log(place / "scores.jsonl", StageScore)
    flags = ["--suite", corpus / "suite", "--data", corpus / "data", "--order", ",".join(ORDER), "--method", "lora"]
    flags += ["--lora.rank", 1, "--checkpoint-interval", 1, "--threads", 1, "--device", "cpu"]
    done("run", *flags, "--out", corpus / "again")
    assert "resuming from 2_HQEdit_step2" in capsys.readouterr().err
    assert schemas.read_log(place / "scores.jsonl", StageScore)[: len(before)] == before
    assert json.loads((place / "results.json").read_text())["finished"]
