"""Both profiles of the image scorers, on a small CLIP with random weights."""

import json
import shutil
from pathlib import Path

import numpy
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cnext.errors import UserError
from cnext.scoring import make_scorers
from cnext.scoring.base import PROFILES, Prediction, Score
from cnext.scoring.clip import MODEL_FILE, TINY_CLIP, Clip, WordTokenizer, build_tiny_clip, load_clip
from cnext.scoring.errors import error_shares
from cnext.scoring.images import caption_of
from cnext.tasks.base import DataError, Sample, Turn

VOCABULARY = ["<pad>", "<unknown>", "a", "red", "blue", "circle", "please", "generate", "the", "image", "<end>"]
PREFIX = "Please generate the image: "
CAPTIONS = ["a red circle", "a blue circle", "the red image", "blue blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model, _, _ = build_tiny_clip(VOCABULARY)
    (folder / MODEL_FILE).write_text((TINY_CLIP / MODEL_FILE).read_text())
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(str(folder), "cpu")


@pytest.fixture(scope="module")
def pictures() -> list[numpy.ndarray]:
    generator = numpy.random.default_rng(0)
    return [generator.integers(0, 256, (48, 48, 3), dtype=numpy.uint8) for _ in CAPTIONS]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("targets")
    generator = numpy.random.default_rng(1)
    made = []
    for i, caption in enumerate(CAPTIONS):
        target = folder / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (48, 48, 3), dtype=numpy.uint8)).save(target)
        made.append(Sample(str(i), (Turn(PREFIX + caption),), target_image=target, origin=f"test.json#{i}"))
    return made


def reference_cosine(clip: Clip, image: numpy.ndarray, other: str | Path) -> float:
    """100 cos by the plainest use of open_clip: one item at a time, float32."""
    with torch.no_grad():
        a = clip.model.encode_image(clip.transform(Image.fromarray(image))[None])[0]
        if isinstance(other, Path):
            b = clip.model.encode_image(clip.transform(Image.open(other))[None])[0]
        else:
            b = clip.model.encode_text(clip.tokenizer([other]))[0]
    return 100 * float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize(
    ("instruction", "caption"),
    [
        ("Please generate the image: a red circle", "a red circle"),
        ("Please generate the image. a red circle", "a red circle"),
        ("please generate the image : A red circle.", "A red circle."),
        ("a red circle", "a red circle"),
        ("Now please generate the image: x", "Now please generate the image: x"),
        (PREFIX + PREFIX + "x", PREFIX + "x"),
    ],
)
def test_caption_of(instruction: str, caption: str) -> None:
    assert caption_of(instruction) == caption


def test_clip_text_compares_with_caption_or_instruction(folder, clip, samples, pictures) -> None:
    scores = make_scorers(str(folder))["clip_text"](None, samples, [Prediction("", p) for p in pictures])
    for score, sample, picture, caption in zip(scores, samples, pictures, CAPTIONS, strict=True):
        instruction = sample.turns[0].instruction
        assert score.strict == pytest.approx(max(0.0, reference_cosine(clip, picture, caption)), abs=1e-3)
        assert score.paper == pytest.approx(reference_cosine(clip, picture, instruction), abs=1e-3)
        assert score.error == "hallucination"


def test_clip_image_compares_with_the_target(folder, clip, samples, pictures) -> None:
    scores = make_scorers(str(folder))["clip_image"](None, samples, [Prediction("", p) for p in pictures])
    for score, sample, picture in zip(scores, samples, pictures, strict=True):
        cosine = reference_cosine(clip, picture, sample.target_image)
        assert (score.strict, score.paper) == pytest.approx((max(0.0, cosine), cosine), abs=1e-3)


def test_the_target_itself_scores_100(folder, samples) -> None:
    drawn = [Prediction("", numpy.array(Image.open(sample.target_image))) for sample in samples]
    for score in make_scorers(str(folder))["clip_image"](None, samples, drawn):
        assert 100 - 1e-9 < score.strict <= 100
        assert score.paper == score.strict


def test_only_paper_keeps_negative_cosines(folder, tmp_path, samples, pictures) -> None:
    turned = shutil.copytree(folder, tmp_path / "turned")
    weights = load_file(turned / "weights.safetensors")
    save_file(weights | {"text_projection": -weights["text_projection"]}, turned / "weights.safetensors")
    predictions = [Prediction("", picture) for picture in pictures]
    for score, opposite in zip(
        make_scorers(str(folder))["clip_text"](None, samples, predictions),
        make_scorers(str(turned))["clip_text"](None, samples, predictions),
        strict=True,
    ):
        assert opposite.paper == pytest.approx(-score.paper)
        assert min(score.paper, opposite.paper) < 0
        assert min(score.strict, opposite.strict) == 0.0


def test_without_an_image_paper_reuses_the_previous_score(folder, samples, pictures) -> None:
    scorer = make_scorers(str(folder))["clip_text"]
    full = scorer(None, samples, [Prediction("", p) for p in pictures])
    drawn = [None, pictures[1], None, None]
    scores = scorer(None, samples, [Prediction("no", p) for p in drawn])
    assert [s.strict for s in scores] == pytest.approx([0, full[1].strict, 0, 0])
    assert [s.paper for s in scores] == pytest.approx([0, *[full[1].paper] * 3])
    assert [s.error for s in scores] == ["instruction_unfollowing", "hallucination", *["instruction_unfollowing"] * 2]


def test_without_an_image_an_edit_scores_zero(folder, samples, pictures) -> None:
    drawn = [pictures[0], None, None, None]
    scores = make_scorers(str(folder))["clip_image"](None, samples, [Prediction("no", p) for p in drawn])
    assert scores[1:] == [Score(0.0, 0.0, "instruction_unfollowing")] * 3


@pytest.mark.parametrize("name", ["clip_text", "clip_image"])
def test_no_image_at_all_needs_no_model(name: str, samples) -> None:
    scores = make_scorers("no such model")[name](None, samples, [Prediction("no")] * len(samples))
    assert scores == [Score(0.0, 0.0, "instruction_unfollowing")] * len(samples)


@pytest.mark.parametrize("name", ["clip_text", "clip_image"])
@pytest.mark.parametrize("profile", PROFILES)
def test_shares_add_up(name: str, profile: str, folder, samples, pictures) -> None:
    drawn = [Prediction("", picture) for picture in pictures[:3]] + [Prediction("")]
    scores = make_scorers(str(folder))[name](None, samples, drawn)
    assert all(0 <= score.strict <= 100 and -100 <= score.paper <= 100 for score in scores)
    mean = sum(getattr(score, profile) for score in scores) / len(scores)
    assert sum(error_shares(scores, profile).values()) == pytest.approx(100 - mean, abs=1e-10)


def test_a_sample_without_a_target_names_its_place(folder, pictures) -> None:
    sample = Sample("3", (Turn("edit"),), origin="test.json#3")
    with pytest.raises(DataError, match=r"test\.json#3.*target"):
        make_scorers(str(folder))["clip_image"](None, [sample], [Prediction("", pictures[0])])


def test_tokenizer() -> None:
    tokenizer = WordTokenizer(VOCABULARY, 6)
    end = len(VOCABULARY) - 1
    assert tokenizer(["A red, circle!", "", "pad <end> zebra"]).tolist() == [
        [2, 3, 5, end, 0, 0],
        [end, 0, 0, 0, 0, 0],
        [1, 1, 1, end, 0, 0],
    ]
    assert tokenizer("red " * 20).tolist() == [[3, 3, 3, 3, 3, end]]


def test_no_word_of_a_text_pads_or_ends_it() -> None:
    assert WordTokenizer(["pad", "unknown", "red", "end"], 5)("pad end red").tolist() == [[1, 1, 2, 3, 0]]


@pytest.mark.parametrize("vocabulary", [["a", "b"], ["<pad>", "<unk>", "red", "red", "<end>"]], ids=["short", "double"])
def test_a_bad_vocabulary_is_refused(vocabulary: list[str]) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        WordTokenizer(vocabulary, 8)


def test_a_saved_clip_loads_through_open_clip(folder, clip) -> None:
    torch.manual_seed(0)
    model, _, tokenizer = build_tiny_clip(VOCABULARY)
    for name, value in model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[name], value), name
    assert clip.model.encode_image(torch.zeros(2, 3, 48, 48)).shape == (2, 64)
    assert clip.model.encode_text(tokenizer(CAPTIONS)).shape == (len(CAPTIONS), 64)
    assert tokenizer(CAPTIONS).shape == (len(CAPTIONS), 32)
    white = clip.transform(Image.new("RGB", (48, 48), (255, 255, 255)))
    assert torch.equal(white, torch.ones(3, 48, 48))


def test_the_tiny_clip_has_under_half_a_million_parameters() -> None:
    model, _, _ = build_tiny_clip([str(i) for i in range(150)])
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 500_000


def test_embeddings_do_not_depend_on_the_batch(clip, pictures) -> None:
    many = [Image.fromarray(picture) for picture in pictures] * 20
    together = clip.encode_images(many)
    assert together.shape == (80, 64)
    assert torch.allclose(together.norm(dim=1), torch.ones(80, dtype=torch.float64))
    assert torch.allclose(together[:4], clip.encode_images(many[:4]), atol=1e-5)
    assert torch.allclose(together[:4], together[76:], atol=1e-5)


def test_a_clip_is_loaded_once_per_process(folder, clip) -> None:
    assert load_clip(str(folder), "cpu") is clip


def test_the_benchmark_clip_has_its_own_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create(*args: object, **kwargs: object) -> None:
        asked.append((args, kwargs))
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(UserError, match=r"'openai/ViT-B-32'.*no network"):
        load_clip("openai/ViT-B-32", "cpu")
    assert asked == [(("ViT-B-32",), {"pretrained": "openai", "force_quick_gelu": True})]


def test_an_unknown_clip_is_refused() -> None:
    with pytest.raises(UserError, match=r"valid: tiny, small, a file or folder .* openai/ViT-B-32"):
        load_clip("openai/ViT-Z-1", "cpu")


def test_a_folder_that_lacks_files_names_them(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"vocabulary\.json, weights\.safetensors missing"):
        load_clip(str(tmp_path), "cpu")
