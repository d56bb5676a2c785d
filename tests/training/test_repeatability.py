"""Digests of each stage and fingerprints of the environment: their definition, in results, and in tables."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import sealing
import torch
from training.conftest import ORDER, Make
from training.toy import change

from cnext import records, run
from cnext.cli import main, run_main
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.monitoring.progress import Progress
from cnext.monitoring.signals import Stop
from cnext.ops import dispatch
from cnext.runs import fingerprint, state_digests
from cnext.tables import aggregate
from cnext.training import runner

STATE = {
    "adapters": {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3]], dtype=torch.int64)},
    "method": {"scalar": torch.tensor(True), "half": torch.ones(1, dtype=torch.bfloat16), "none": torch.empty(0, 2)},
    "optimizer": {"left out": torch.zeros(1)},
}


def test_a_digest_is_sha256_of_sorted_tensors() -> None:
    by_hand = [
        b"adapters/a torch.int64 (1, 1)\n",
        (3).to_bytes(8, "little"),
        b"adapters/b torch.float32 (2,)\n",
        bytes.fromhex("0000803f 00000040"),
        b"method/half torch.bfloat16 (1,)\n",
        bytes.fromhex("803f"),
        b"method/none torch.float32 (0, 2)\n",
        b"method/scalar torch.bool ()\n",
        b"\x01",
    ]
    assert state_digests.digest(STATE) == hashlib.sha256(b"".join(by_hand)).hexdigest()


def test_a_digest_depends_on_values_and_not_on_strides() -> None:
    first = state_digests.digest(STATE)
    strided = {**STATE, "adapters": {**STATE["adapters"], "b": torch.tensor([[1.0, 5.0], [2.0, 5.0]])[:, 0]}}
    assert state_digests.digest(strided) == first
    for other in (torch.tensor([1.0, 2.0000002]), torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(1, 2)):
        changed = {**STATE, "adapters": {**STATE["adapters"], "b": other}}
        assert state_digests.digest(changed) != first


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_digests_in_results_are_those_of_checkpoints(finished: Path) -> None:
    found = results(finished)["digests"]
    assert [(row["stage"], row["trained"]) for row in found] == [(0, "zero-shot"), *enumerate(ORDER, 1)]
    assert records.plain(state_digests.of_run(finished)) == found[1:]
    assert len({row["sha256"] for row in found}) == 4


def test_results_have_a_fingerprint(finished: Path) -> None:
    found = results(finished)["fingerprint"]
    checksum = found.pop("sha256")
    assert found == fingerprint.present("cpu", 1) | {"data": found["data"]}
    assert checksum == fingerprint.digest(found)
    assert found["threads"] == found["processes"] == 1
    assert found["torch"] == torch.__version__
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["ops"] == ("cpp" if not dispatch.missing("cpp", "cpu") else "reference")
    assert found["device"] == "cpu"


def test_a_run_resumed_elsewhere_says_so(
    finished: Path, config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, here = config(), fingerprint.present("cpu", 1)
    (made.folder).parent.mkdir(parents=True)
    shutil.copytree(finished, made.folder)
    shutil.rmtree(made.folder / "checkpoints" / "3_HQEdit")
    monkeypatch.setattr(fingerprint, "present", lambda device, threads: {**here, "processor": "another"})
    run(made)
    assert "resuming in another environment, which the results will show: processor: " in capsys.readouterr().err
    found = results(made.folder)
    assert found["fingerprint"]["processor"] == [here["processor"], "another"]
    assert found["fingerprint"]["torch"] == here["torch"]
    assert found["digests"] == results(finished)["digests"]

    monkeypatch.setattr(fingerprint, "present", lambda device, threads: {**here, "processor": "a third"})
    run(made)
    assert results(made.folder) == found, "a finished run is not done anywhere else"


def copy(run: Path, to: Path, **changes: object) -> Path:
    """The files of a run that tables and compare read, some values changed."""
    to.mkdir(parents=True)
    (to / "config.json").write_bytes((run / "config.json").read_bytes())
    if "seed" in changes:
        change(to / "config.json", seed=changes["seed"])
    sealing.write(to / "results.json", results(run) | changes)
    return to


def test_compare_names_the_stage_of_the_first_difference(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(finished)["digests"]
    here = results(finished)["fingerprint"] | {"threads": 4}
    parted = [*found[:1], {**found[1], "sha256": "0" * 64}, *found[2:]]
    other = copy(finished, tmp_path / "other", digests=parted, fingerprint=here)
    assert main(["compare", str(finished), "--to", str(other)]) == 0
    shown = capsys.readouterr().out
    assert "states: bit-identical up to stage 0 zero-shot; different from stage 1 VQAv2 on" in shown
    assert "environments differ in threads: 1 and 4" in shown
    assert main(["compare", str(finished), "--to", str(finished)]) == 0
    assert "states: bit-identical up to stage 3 HQEdit\n" in capsys.readouterr().out
    older = copy(finished, tmp_path / "older", digests=None)
    assert main(["compare", str(finished), "--to", str(older)]) == 0
    assert "states:" not in capsys.readouterr().out
    bad = copy(finished, tmp_path / "bad", digests=[{"stage": 1}])
    assert main(["compare", str(finished), "--to", str(bad)]) == 2
    assert "digests: expected rows with stage, trained and sha256" in capsys.readouterr().err


def test_another_seed_initializes_otherwise(finished: Path, config: Make) -> None:
    found = {}
    for seed in (0, 1):
        made = runner.Runner(plan(config(seed=seed)), None, Progress(quiet=True), Stop())
        made.load()
        made.resume()
        found[seed] = made.state.digests[0].sha256
    assert found[0] == results(finished)["digests"][0]["sha256"] != found[1]


def test_joined_and_differences() -> None:
    one, other = {"threads": 1, "torch": "2.9"}, {"threads": 2, "torch": "2.9"}
    assert fingerprint.joined([]) is None
    assert fingerprint.joined([one]) == {**one, "sha256": fingerprint.digest(one)}
    assert fingerprint.joined([one, other, one])["threads"] == [1, 2]
    assert fingerprint.differences(one, other) == ["threads: 1 and 2"]
    assert fingerprint.differences({**one, "sha256": "a"}, {**one, "sha256": "b"}) == []
    assert fingerprint.differences(None, one) == ["fingerprint: unknown and known"]
    assert fingerprint.differences(None, None) == []
    (line,) = fingerprint.differences(one, {**one, "error_rules": 2})
    assert line == "error_rules: null and 2 (error types may differ, scores do not; null: version 1)"


def test_different_environments_are_not_averaged_by_default(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = results(finished)["fingerprint"]
    for seed, found in enumerate((here, here | {"threads": 4, "processor": "another"})):
        copy(finished, tmp_path / f"seed-{seed}", seed=seed, fingerprint=found)
    assert main(["table", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "were run in different environments" in shown
    assert f'  processor: {json.dumps(here["processor"])} and "another"\n  threads: 1 and 4\n' in shown
    assert "--mix-environments" in shown
    assert main(["table", str(tmp_path), "--mix-environments"]) == 0
    assert "Averaged over runs of 2 different environments. processor: " in capsys.readouterr().out


def test_older_results_count_as_one_environment(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        copy(finished, tmp_path / f"seed-{seed}", seed=seed, fingerprint=None)
    assert main(["table", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "2 of 2 runs have no environment fingerprint" in shown.err
    assert "fingerprint" not in shown.out
    copy(finished, tmp_path / "seed-2", seed=2)
    assert main(["table", str(tmp_path)]) == 2
    assert "fingerprint: unknown and known" in capsys.readouterr().err


def test_a_study_checks_environments_before_it_starts(
    finished: Path, config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config()
    flags = ["--method", made.method, "--suite", made.suite, "--data", str(made.data), "--order", made.order]
    flags += ["--device", "cpu", "--checkpoint-interval", "1", "--out", str(made.out)]
    flags += ["--jobs", "1", "--seeds", "0", "1", "2"]
    here = results(finished)["fingerprint"]
    for seed in (0, 1):
        folder = made.folder.with_name(f"seed-{seed}")
        copy(finished, folder, seed=seed, fingerprint=here | {"threads": 1 + seed})
        change(folder / "config.json", seed=seed)
        (folder / "report.html").touch()
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("a run has started"))
    assert run_main(flags) == 2
    assert "threads: 1 and 2" in capsys.readouterr().err


def test_tables_refuse_files_that_no_run_wrote(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path / "a", seed="0")
    with pytest.raises(UserError, match=r"results\.json: Expected `int`, got `str` - at `\$\.seed`"):
        aggregate.read(folder)
