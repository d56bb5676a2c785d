"""Two processes (gloo, CPU) give the results of one, with a replicated model, FSDP2, and DeepSpeed's ZeRO."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from distributed.launched import CHILD, finish, start
from distributed.members import go
from distributed.process_child import learnt
from methods.sequence import VARIANTS
from safetensors.torch import load_file
from training.toy import copy_suite, rows
from waiting import outputs

from cnext import RunConfig, methods, run
from cnext.cli import run_main
from cnext.distributed import collectives
from cnext.distributed.processes import process_group
from cnext.exchange.export import export

TIGHT, LOOSE = 0.02, {"pgp": 0.05}
"""Tolerance relative to a parameter's largest value. pgp depends on the padding of shorter batches."""


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": 5e4,
        "stage3_max_live_parameters": 1e5,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu", "pin_memory": False},
    },
    "train_batch_size": "auto",
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "fp16": {"enabled": "auto", "loss_scale": 0},
}
"""A DeepSpeed file that partitions every parameter of a small model, and gathers none for longer than it is used."""
STAGES = (1, 2, 3) if find_spec("deepspeed") else ()


def zero(stage: int, folder: Path) -> dict[str, str]:
    """The environment of ``accelerate launch --use_deepspeed``: by its own settings, at stage 3 by DeepSpeed's file."""
    if stage < 3:
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    (folder / "zero.json").write_text(json.dumps(ZERO_3))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "zero.json")}


NAMES = sorted({*methods.modules(), *VARIANTS} - {"zero-shot"})
PLAIN = (
    "ew-ga", "lae", "mage-paper", "mage-paper with pema-kron", "mage-pull", "mage-slow", "mode", "o-lora", "two-split",
    "upper-bound",
)  # fmt: skip
"""Methods that read and run the frozen model as lora and mage do, so that sharding it is no other case."""
SHARDED = [name for name in NAMES if name not in PLAIN]


def together(names: list[str], data: Path, out: Path, **engine: str) -> Path:
    """What two processes train with these methods, one after another."""
    finish(start([str(CHILD), ",".join(names), str(data), str(out)], **engine))
    return out


@pytest.fixture(scope="module")
def replicated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return together(NAMES, data, tmp_path_factory.mktemp("replicated"))


@pytest.fixture(scope="module")
def sharded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As replicated, with the frozen model sharded by FSDP2."""
    return together(SHARDED, data, tmp_path_factory.mktemp("sharded"), **FSDP)


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {method: learnt(method, data) for method in NAMES}


@pytest.mark.parametrize("method", NAMES)
def test_two_processes_train_as_one(replicated: Path, alone: dict[str, dict[str, torch.Tensor]], method: str) -> None:
    """Shards of 2 and 2 against batches of 4, 8 steps. AdamW amplifies small differences of small gradients."""
    compare(method, load_file(replicated / f"{method}.safetensors"), alone[method])


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARDED)
def test_a_sharded_model_trains_as_one(sharded: Path, alone: dict[str, dict[str, torch.Tensor]], method: str) -> None:
    compare(method, load_file(sharded / f"{method}.safetensors"), alone[method])


def compare(method: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not value.is_floating_point():
            # Counters are equal, and so are all but a few of the indices that reglora selects by magnitude.
            same = numpy.isin(found[name].numpy(), value.numpy()).mean()
            assert same == 1 if value.ndim == 0 else same > 0.9, name
            continue
        if ".low." in name:
            # Of osf's weights, which are compared; where singular values are close, their vectors turn.
            continue
        ours = found[name]
        if name.startswith("state:basis."):
            # A subspace has many bases, so projections onto it are compared.
            ours, value = ours @ ours.T, value @ value.T
        largest = value.abs().max().clamp(min=1e-6)
        off = (ours - value).abs().mean() / largest
        assert off < LOOSE.get(method, TIGHT), f"{name}: off by {off:.4f} of {largest:.4g}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_zero_trains_as_one_process(
    stage: int, alone: dict[str, dict[str, torch.Tensor]], data: Path, tmp_path: Path
) -> None:
    """Moments partitioned by stages 1 and 2, the frozen model by stage 3."""
    names = ["ewc", "mage", "osf", "pgp", "sdft"]
    together(names, data, tmp_path, **zero(stage, tmp_path))
    for method in names:
        compare(method, load_file(tmp_path / f"{method}.safetensors"), alone[method])


ENGINES = ["fsdp", *(["zero-3"] if STAGES else [])]


@pytest.fixture(scope="module")
def in_bfloat16(data: Path, toy_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run in two processes, in bfloat16, with activation checkpointing and an odd number of test samples."""
    out = tmp_path_factory.mktemp("engines")
    suite = copy_suite(toy_suite, out / "odd", test_samples=5, checkpointing=True)
    shared = {"data": data, "order": "VQAv2,HQEdit", "device": "cpu", "precision": "bfloat16"}
    config = RunConfig(suite=str(suite), out=out / "whole", **shared)
    assert [(member.status, member.said) for member in go(config, 2) if member.status] == []
    return config


def assert_the_same_run(engine: str, whole: RunConfig, out: Path) -> None:
    """Runs it in two processes again, with the frozen model sharded, and compares to the bit."""
    config = dataclasses.replace(whole, out=out / engine)
    for member in go(config, 2, **FSDP if engine == "fsdp" else zero(3, out)):
        assert member.status == 0, member.said
    for name in ("results.json", "scores.jsonl", "train.jsonl"):
        assert (config.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharded_model_gives_the_same_run(engine: str, in_bfloat16: RunConfig, tmp_path: Path) -> None:
    """Though the ranks generate answers of different lengths."""
    assert_the_same_run(engine, in_bfloat16, tmp_path)


@pytest.fixture(scope="module")
def from_merged(in_bfloat16: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run in two processes that starts from a merged model."""
    out = tmp_path_factory.mktemp("merged")
    export(in_bfloat16.folder, out / "model", "merged", "1_VQAv2")
    config = dataclasses.replace(in_bfloat16, out=out / "run", init_from=out / "model", init_tasks=("VQAv2",))
    assert [(member.status, member.said) for member in go(config, 2) if member.status] == []
    return config


@pytest.mark.parametrize("engine", ENGINES)
def test_a_merged_model_in_a_sharded_one(engine: str, from_merged: RunConfig, tmp_path: Path) -> None:
    """Its weights take the place of shards, after the pretrained model was scored."""
    assert_the_same_run(engine, from_merged, tmp_path)


def test_a_whole_run_in_two_processes(data: Path, toy_suite: Path, tmp_path: Path) -> None:
    """Zero-shot scores are those of one process; then one process resumes where two have stopped."""
    shared = {"suite": str(toy_suite), "data": data, "order": "VQAv2,HQEdit", "device": "cpu"}
    one = run(RunConfig(out=tmp_path / "one", **shared))
    flags = ["--suite", str(toy_suite), "--data", str(data), "--order", "VQAv2,HQEdit", "--device", "cpu"]
    finish(start(["-m", "cnext.cli", "run", *flags, "--out", str(tmp_path / "two")]))
    folder = RunConfig(out=tmp_path / "two", **shared).folder
    two = json.loads((folder / "results.json").read_text())
    assert two["finished"]
    assert two["cost"]["trainable_params_by_task"] == one["cost"]["trainable_params_by_task"]
    assert two["cost"]["supervised_tokens"] == one["cost"]["supervised_tokens"]
    assert two["zero_shot"] == one["zero_shot"], "nothing has been trained"
    for row, other in zip(one["score_matrix"], two["score_matrix"], strict=True):
        assert [cell is None for cell in row] == [cell is None for cell in other]
    folders = (folder, RunConfig(out=tmp_path / "one", **shared).folder)
    losses = [[row["loss"] for row in rows(path / "train.jsonl")] for path in folders]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    # The last evaluation again, in one process, from the checkpoint that two have written.
    lines = (folder / "scores.jsonl").read_text().splitlines(keepends=True)
    (folder / "scores.jsonl").write_text("".join(lines[:-1]))
    assert run(RunConfig(out=tmp_path / "two", **shared))["score_matrix"] == two["score_matrix"]
    # The second task again, from the first one's checkpoint.
    source = ["--init-from", str(folder / "checkpoints" / "1_VQAv2"), "--init-tasks", "VQAv2"]
    finish(start(["-m", "cnext.cli", "run", *flags, *source, "--out", str(tmp_path / "again")]))
    again = RunConfig(out=tmp_path / "again", **shared).folder
    assert json.loads((again / "results.json").read_text())["digests"] == two["digests"]


def test_a_batch_that_cannot_be_sharded_is_refused(data: Path, toy_suite: Path, tmp_path: Path) -> None:
    flags = ["--suite", str(toy_suite), "--data", str(data), "--device", "cpu", "--batch-size", "3"]
    children = start(["-m", "cnext", "run", *flags, "--out", str(tmp_path)])
    texts = [out for out, _ in outputs(children)]
    assert all(child.returncode for child in children)
    assert "must be a multiple of the number of processes, 2, got 3" in texts[0]
    assert "Traceback" not in texts[0] + texts[1]
    assert not any(tmp_path.iterdir()), "found before anything starts"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE, which a launcher sets, must be a number of processes, got 'two'"),
        ({"WORLD_SIZE": "0"}, "got '0'"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE=2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start by torchrun",
        ),
    ],
    ids=["a word", "none", "half a launcher"],
)
def test_an_incomplete_environment_is_refused(
    environment: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_one_process_needs_no_group() -> None:
    with process_group("cpu") as device:
        assert (device, collectives.world_size(), collectives.rank()) == ("cpu", 1, 0)
    assert collectives.shard([1, 2, 3]) == collectives.gather_shards([1, 2, 3]) == [1, 2, 3]
    assert collectives.unshard([[1, 3, 5], [2, 4]]) == [1, 2, 3, 4, 5]
