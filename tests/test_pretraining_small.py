"""Pretraining of the small backbone, with few steps: resumable to the bit, on its own split, its files are loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import pytest
import torch
from pretrain_small import main
from pretraining import resumable, small, small_corpus, small_stages
from safetensors.torch import load_file
from torch import Tensor, nn

from cnext.backbones.small.model import FOLDER, SmallBackbone
from cnext.scoring.clip import SMALL_CLIP, load_clip
from cnext.tasks.next_real import material, pictures
from cnext.tasks.next_real.examples import seen_things
from cnext.tasks.scenes import split_of


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    main(["--out", str(out), "--scale", "0.0003", "--threads", "1"])
    return out


def test_written_files_are_loaded_and_a_second_call_repeats_no_step(
    pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = pretrained / "backbones/small/weights.safetensors"
    assert SmallBackbone.load(weights=weights).sizes.tokens == 36
    assert load_clip(str(pretrained / "scoring/small_clip"), "cpu").encode_texts(["a cat above a dog"]).shape == (1, 96)
    before = weights.read_bytes()
    main(["--out", str(pretrained), "--scale", "0.0003", "--threads", "1"])
    assert "step" not in capsys.readouterr().out
    assert weights.read_bytes() == before
    with pytest.raises(SystemExit, match=r"is of a stage of 1 steps, not 2; delete it"):
        main(["--out", str(pretrained), "--scale", "0.001"])


def test_an_interrupted_stage_ends_with_the_same_weights_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "INTERVAL", 3)

    def trained(folder: Path, stop: int = 0) -> tuple[nn.Module, dict[str, float]]:
        torch.manual_seed(1)
        module, calls = nn.Linear(4, 1), itertools.count(1)

        def step(rng: Random) -> tuple[Tensor, dict[str, Tensor]]:
            if next(calls) == stop:
                raise KeyboardInterrupt
            loss = (module(torch.randn(2, 4)) - rng.random()).square().mean()
            return loss, {"loss": loss.detach()}

        return module, resumable.train("stage", module, step, 10, 0.1, 7, folder, lambda line: None)

    whole, values = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=8)
    again, resumed = trained(tmp_path / "parts")
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    assert resumed["loss"] == values["loss"]


def test_the_shipped_files_are_of_the_declared_stages() -> None:
    card, model = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8"), SmallBackbone.load()
    for module in (model.encoder, model.detokenizer, model.decoder):
        assert f"{sum(parameter.numel() for parameter in module.parameters()):,}" in card
    for name, (steps, _) in small.STAGES.items():
        assert f"| {name} | {steps} |" in card
    assert list(model.tokenizer.tokens[-len(small_corpus.vocabulary()) :]) == small_corpus.vocabulary()
    clip = load_file(SMALL_CLIP / "weights.safetensors")
    assert len(clip["token_embedding.weight"]) == len(small_stages.clip_vocabulary())


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["own wordings", "benchmark's wordings"])
def test_every_picture_is_of_the_pretrain_split(share: float) -> None:
    photographs = {"", *material.photographs("pretrain")}
    for _, _, read, written in itertools.islice(small_corpus.corpus(Random(0), share), 300):
        for picture in filter(None, (read, written)):
            assert picture.ground.photograph in photographs
        if isinstance(read, pictures.Number):
            assert all(pictures.split_of_digit(index) == "pretrain" for index in read.digits)
        elif isinstance(read, pictures.Lettering):
            assert split_of(read.word) == "pretrain"


def test_the_decoder_meets_the_names_of_two_of_three_things_alone_beside_repeating() -> None:
    unseen = {*material.things()} - {*seen_things()}
    for instruction, answer, read, _ in itertools.islice(small_corpus.corpus(Random(1), 0.5), 800):
        if not instruction.startswith(("Repeat:", "Copy")):
            assert not unseen & {*f"{instruction} {answer}".replace(",", " ").replace(".", " ").split()}, instruction
        assert instruction != "Copy" or read is not None


def test_a_bad_output_folder_is_an_error_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "file"), "--scale", "0.001"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: File exists: {tmp_path / 'file'}\n"
