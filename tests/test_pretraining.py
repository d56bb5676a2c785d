"""Pretraining of the tiny backbone, with few steps: seeded, on its own split, and its files are loaded again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pretraining
import pytest
import torch
from pretrain_tiny import main
from pretraining import corpus, stages
from safetensors.torch import load_file

from cnext.backbones.tiny.model import WEIGHTS, TinyBackbone
from cnext.backbones.tiny.tokenizer import TinyTokenizer
from cnext.scoring.clip import TINY_CLIP, load_clip
from cnext.tasks import scenes, synthetic


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    main(["--out", str(out), "--scale", "0.001"])
    return out


def test_written_files_are_loaded_again(pretrained: Path) -> None:
    tiny = TinyBackbone.load(weights=pretrained / "backbones/tiny/weights.safetensors")
    assert sum(parameter.numel() for parameter in tiny.parameters()) > 1e6
    clip = pretrained / "scoring/tiny_clip"
    (clip / "model.json").write_text((TINY_CLIP / "model.json").read_text())
    assert load_clip(str(clip), "cpu").encode_texts(["a red circle"]).shape == (1, 64)


def test_the_card_states_steps_time_and_losses(pretrained: Path) -> None:
    card = (pretrained / "backbones/tiny/MODEL_CARD.md").read_text()
    command = "`python bench/pretrain_tiny.py --seed 0 --threads 1`"
    for part in (command, "vision 2,", "seconds", "pixel_mse", "phase_2_text_loss", "matched_cosine"):
        assert part in card


def test_the_shipped_card_matches_the_shipped_weights() -> None:
    """In parameter counts and steps."""
    card = WEIGHTS.with_name("MODEL_CARD.md").read_text()
    tiny = TinyBackbone.load()
    for module in (tiny.encoder, tiny.detokenizer, tiny.decoder):
        assert f"{sum(p.numel() for p in module.parameters()):,}" in card
    for name, steps in pretraining.STAGES.items():
        assert f"{name} {steps}" in card
    assert json.loads((TINY_CLIP / "vocabulary.json").read_text()) == stages.clip_vocabulary()


def test_the_same_seed_gives_the_same_weights(pretrained: Path, tmp_path: Path) -> None:
    pretraining.pretrain(tmp_path, scale=0.001)
    for name in ("backbones/tiny/weights.safetensors", "scoring/tiny_clip/weights.safetensors"):
        one, other = load_file(pretrained / name), load_file(tmp_path / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["own templates", "benchmark templates"])
def test_every_input_image_is_of_the_pretrain_split(share: float) -> None:
    for instruction, _, read, written in itertools.islice(corpus.corpus(0, share), 300):
        if read is not None:
            assert scenes.split_of(scenes.key(read)) == "pretrain"
        elif instruction.startswith(synthetic.DRAW):
            assert scenes.split_of(written.caption) == "pretrain"


def test_all_words_of_the_corpus_are_in_the_vocabulary() -> None:
    tokenizer = TinyTokenizer()
    for instruction, _, _, _ in itertools.islice(corpus.corpus(0, 0.5), 500):
        assert not [piece for piece in tokenizer.encode(instruction) if tokenizer.tokens[piece].startswith("#")], (
            instruction
        )


def test_icons_in_benchmark_templates_are_restricted() -> None:
    answers = {
        answer
        for question, answer, _, _ in itertools.islice(corpus.corpus(0, 1.0), 600)
        if "object in the image" in question
    }
    assert answers <= set(corpus.SEEN_ICONS)


def test_a_bad_output_folder_is_an_error_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "file"), "--scale", "0.001"])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: File exists: {tmp_path / 'file'}\n"
    assert "step" not in shown.out
