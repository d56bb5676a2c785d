"""A suite that declares audio, on a backbone that reads it: six branches through training, resuming and exchange."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import wave
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.toy import change

from cnext import RunConfig, adapters, run
from cnext.backbones.tiny.model import TinyBackbone, TinyInputs
from cnext.cli import main
from cnext.errors import UserError
from cnext.exchange.export import export, restore
from cnext.exchange.importing import import_adapter
from cnext.scoring.base import Prediction
from cnext.tasks import formats, suites
from cnext.tasks.base import Sample

SIX = [role.name for role in adapters.branch_roles(["text", "image", "audio"])]


class Listening(TinyBackbone):
    """The tiny backbone, which sees the spectrum of the sound that it is to hear."""

    @classmethod
    def modalities(cls, weights: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("text", "image", "audio"), ("text", "image")

    def prepare(self, sample: Sample) -> TinyInputs:
        return super().prepare(shown(sample))

    def generate(self, samples: list[Sample], max_new_tokens: int) -> list[Prediction]:
        return super().generate([shown(sample) for sample in samples], max_new_tokens)


def shown(sample: Sample) -> Sample:
    """The sample with a picture of its sound: 24 of its frequencies as bars."""
    from PIL import Image

    if "audio" not in sample.media:
        return sample
    with wave.open(str(sample.media["audio"])) as file:
        values = torch.tensor(struct.unpack(f"<{file.getnframes()}h", file.readframes(file.getnframes()))).float()
    bars = torch.fft.rfft(values).abs()[:24]
    picture = (bars / bars.max() * 255).byte().repeat_interleave(2).expand(48, 48)
    path = sample.media["audio"].with_suffix(".png")
    Image.fromarray(picture.contiguous().numpy()).convert("RGB").save(path)
    return replace(sample, image=path)


def write_sound(path: Path, pitch: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 1000, 0, "NONE", ""))
        tone = (torch.arange(100) * pitch * 0.0628).sin() * 20000
        file.writeframes(struct.pack("<100h", *tone.short().tolist()))


@pytest.fixture
def sounds(data: Path, toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A suite of a task with audio and one with images, and its data; the backbone is registered."""
    folder, files = tmp_path / "sounds", tmp_path / "data"
    folder.mkdir()
    (files / "wav").mkdir(parents=True)
    (files / "VQAv2").symlink_to(data / "VQAv2")
    for pitch in range(8):
        write_sound(files / "wav" / f"{pitch}.wav", pitch + 2)
    rows = [
        {"id": str(n), "audio": f"{n % 8}.wav", "conversations": [
            {"from": "human", "value": "high or low?"}, {"from": "gpt", "value": "low" if n % 8 < 4 else "high"}]}
        for n in range(16)
    ]  # fmt: skip
    (files / "train.json").write_text(json.dumps(rows))
    (files / "test.json").write_text(json.dumps(rows[:8]))
    task = {"reads": ["audio", "text"], "writes": ["text"], "format": "llava", "scorer": "exact_answer"}
    places = {"train": "train.json", "test": "test.json", "train_images": "wav", "test_images": "wav"}
    (folder / "Pitch.json").write_text(json.dumps(task | places))
    (folder / "VQAv2.json").write_text((toy_suite / "VQAv2.json").read_text())
    budget = json.loads((toy_suite / "suite.json").read_text())["budgets"]["default"]
    budget["steps"] = {"Pitch": 4, "VQAv2": 4}
    suite = {"tasks": ["Pitch", "VQAv2"], "modalities": ["text", "image", "audio"], "orders": {}}
    (folder / "suite.json").write_text(json.dumps(suite | {"budgets": {"default": budget}}))
    metadata = tmp_path / "site" / "listening-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: listening\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[cnext.backbones]\nlistening = {__name__}:Listening\n")
    monkeypatch.syspath_prepend(metadata.parent)
    importlib.invalidate_caches()
    return folder, files


def configured(sounds: tuple[Path, Path], out: Path, **changes: object) -> RunConfig:
    folder, files = sounds
    values = {"method": "mage-paper", "suite": str(folder), "data": files, "backbone": "listening", "device": "cpu"}
    return RunConfig(**(values | {"order": "Pitch,VQAv2", "out": out, "checkpoint_interval": 1} | changes))


def test_six_branches_are_trained_by_role_resumed_and_exchanged(
    sounds: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(sounds, tmp_path / "runs")
    results = run(config)
    trained = {merge["task"]: set(merge["branches"]) for merge in results["averaging"]}
    assert trained == {
        "Pitch": {"text-general", "audio-general", "text-expert"},
        "VQAv2": {"text-general", "image-general", "text-expert"},
    }
    assert json.loads((config.folder / "config.json").read_text())["modalities"] == ["text", "image", "audio"]
    restored = restore(config.folder)
    layers = adapters.layers(restored.method.model)
    assert all(list(layer.branches) == SIX for layer in layers.values())
    assert not any(layer.branches["audio-expert"].B.any() for layer in layers.values())
    assert all(layer.branches["audio-general"].B.any() for layer in layers.values())

    (config.folder / "results.json").unlink()
    for later in (config.folder / "checkpoints").glob("*"):
        if later.name > "1_Pitch":
            shutil.rmtree(later)
    again = run(config)
    assert (again["score_matrix"], again["digests"]) == (results["score_matrix"], results["digests"])

    export(config.folder, tmp_path / "peft", "peft")
    assert "audio-expert (rank 8)" in import_adapter(tmp_path / "peft", tmp_path / "imported", "listening")
    imported = adapters.layers(restore(tmp_path / "imported").method.model)
    for name, layer in imported.items():
        for branch in SIX:
            assert torch.equal(layer.branches[branch].B, layers[name].branches[branch].B)
    with pytest.raises(UserError, match="four branches"):
        export(config.folder, tmp_path / "authors", "authors")


def test_every_method_of_roles_has_a_branch_for_each_modality(sounds: tuple[Path, Path], tmp_path: Path) -> None:
    kron = {"average": "pema-kron"}
    for method, given, expected in (
        ("two-split", {}, 3),
        ("mage-experts", {}, 5),
        ("mage-routed", {}, 6),
        ("mage", {}, 6),
        ("mage-paper", kron, 6),
    ):
        config = configured(sounds, tmp_path / "runs", method=method, hyperparameters=given)
        run(config)
        layer = next(iter(adapters.layers(restore(config.folder).method.model).values()))
        assert len(layer.branches) == expected


def test_routing_by_position_needs_text_and_image(sounds: tuple[Path, Path], tmp_path: Path) -> None:
    change(sounds[0] / "suite.json", modalities=["text", "audio"])
    for method in ("mage-routed", "mode"):
        with pytest.raises(UserError, match="needs a suite whose modalities include text and image"):
            run(configured(sounds, tmp_path / method, method=method, order="Pitch"))


def test_a_task_may_read_only_what_its_suite_declares(sounds: tuple[Path, Path], tmp_path: Path) -> None:
    change(sounds[0] / "suite.json", modalities=["text", "image"])
    with pytest.raises(UserError, match=r"task Pitch: unknown modality 'audio'; valid: text, image \(suite.json may"):
        run(configured(sounds, tmp_path / "runs"))


def test_a_row_must_name_its_file_and_the_file_be_there(
    sounds: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, files = sounds
    rows = json.loads((files / "train.json").read_text())
    del rows[1]["audio"]
    rows[2]["audio"] = "gone.wav"
    rows[3]["audio"] = "../train.json"
    (files / "train.json").write_text(json.dumps(rows))
    with pytest.raises(UserError) as caught:
        formats.read_samples(suites.load(str(folder)).task("Pitch"), files, "train")
    text = str(caught.value)
    assert "#1: lacks the key 'audio'" in text
    assert "#2: names a file of audio that is missing" in text
    assert "#3: 'audio' leaves the image folder" in text
    assert main(["data", "check", str(files), "--suite", str(folder)]) == 1
    assert "gone.wav" in capsys.readouterr().out
