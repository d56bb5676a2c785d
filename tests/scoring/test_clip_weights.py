"""Weights given by path: OpenAI's archive, safetensors and torch files, and what is no CLIP. On a small CLIP."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from cnext.errors import UserError
from cnext.scoring import make_scorers
from cnext.scoring.archive import is_archive, read_archive
from cnext.scoring.base import Prediction
from cnext.scoring.clip import load_clip
from cnext.scoring.clip_weights import CONFIG_FILE, WEIGHTS_FILES
from cnext.tasks.base import Sample, Turn

Make = Callable[[Path, Path], object]
SAFETENSORS, BIN, ARCHIVE, *_ = WEIGHTS_FILES
TEXTS = ["Please generate the image: a red circle", "a dog on a beach"]
SIZES = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """OpenAI's CLIP at a small size, random, its numbers those of float16, as the published ones are."""
    torch.manual_seed(0)
    model, _, _ = open_clip.create_model_and_transforms("ViT-B-32", force_quick_gelu=True, **SIZES)
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a TorchScript archive, a safetensors file and a torch file, a folder each."""
    folder = tmp_path_factory.mktemp("weights")
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    for kind in ("archive", "safetensors", "bin"):
        (folder / kind).mkdir()
    save_file(halves, folder / "safetensors" / SAFETENSORS)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in halves.items()}}, folder / "bin" / BIN)
    _trace(model, folder / "archive" / ARCHIVE)
    return folder


def _trace(model: torch.nn.Module, path: Path) -> None:
    """Saves a model as OpenAI did: traced, with a buffer that is no parameter beside them."""
    model.register_buffer("input_resolution", torch.tensor(64))
    inputs = (torch.zeros(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.int64))
    with warnings.catch_warnings():
        # Tracing is old and says so. It is what wrote the published files.
        for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        torch.jit.trace(model, inputs, check_trace=False).save(str(path))
    del model.input_resolution


def pictures(count: int) -> list[numpy.ndarray]:
    generator = numpy.random.default_rng(0)
    return [generator.integers(0, 256, (90, 120, 3), dtype=numpy.uint8) for _ in range(count)]


def archive_with(path: Path, given: Path, changed: dict[str, bytes], packed: str = "") -> Path:
    """A copy of an archive with some members' contents changed, and those that end in ``packed`` compressed."""
    with zipfile.ZipFile(given) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            inner = item.filename.partition("/")[2]
            kind = zipfile.ZIP_DEFLATED if packed and inner.endswith(packed) else zipfile.ZIP_STORED
            new.writestr(item.filename, changed.get(inner, old.read(item)), kind)
    return path


@pytest.mark.parametrize("kind", ["archive", "safetensors", "bin"])
def test_weights_by_path_are_the_model(kind: str, folder: Path, model: torch.nn.Module) -> None:
    """Bit for bit, with open_clip's preparation of images and its tokenizer; a folder stands for the file in it."""
    (file,) = (folder / kind).iterdir()
    clip = load_clip(str(file), "cpu")
    assert clip.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(clip.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    _, _, transform = open_clip.create_model_and_transforms("ViT-B-32", force_image_size=64)
    image = Image.fromarray(pictures(1)[0])
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    with torch.no_grad():
        seen, read = model.encode_image(transform(image)[None]), model.encode_text(tokens)
    assert torch.equal(clip.encode_images([image]), torch.nn.functional.normalize(seen.double(), dim=-1))
    assert torch.equal(clip.encode_texts(TEXTS), torch.nn.functional.normalize(read.double(), dim=-1))
    assert torch.equal(load_clip(str(folder / kind), "cpu").encode_texts(TEXTS), clip.encode_texts(TEXTS))


def test_the_paper_scores_the_whole_text(folder: Path) -> None:
    clip = load_clip(str(folder / "archive" / ARCHIVE), "cpu")
    samples = [Sample("0", (Turn(text),)) for text in (TEXTS[0], f"Please generate the image: {'a red circle ' * 50}")]
    drawn = pictures(2)
    scores = make_scorers(str(folder / "archive"))["clip_text"](None, samples, [Prediction("", p) for p in drawn])
    images = clip.encode_images(Image.fromarray(picture) for picture in drawn)
    for texts, profile in (
        ([sample.turns[0].instruction for sample in samples], "paper"),
        (["a red circle", "a red circle " * 50], "strict"),
    ):
        cosines = (100 * (images * clip.encode_texts(texts)).sum(-1)).tolist()
        kept = cosines if profile == "paper" else [max(0, cosine) for cosine in cosines]
        assert [getattr(score, profile) for score in scores] == pytest.approx(kept, abs=1e-9)


def test_no_more_than_a_batch_of_images_is_held(folder: Path) -> None:
    clip = load_clip(str(folder / "safetensors"), "cpu")
    images = [Image.fromarray(picture) for picture in pictures(3)] * 60
    drawn, done = [], []

    def one_by_one() -> Iterator[Image.Image]:
        for image in images:
            drawn.append(image)
            assert len(drawn) - len(done) <= 64
            yield image

    def counted(image: Image.Image) -> torch.Tensor:
        done.append(image)
        return clip.transform(image)

    assert torch.allclose(replace(clip, transform=counted).encode_images(one_by_one()), clip.encode_images(images))


def test_the_configuration_beside_the_weights_is_obeyed(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(folder / "safetensors" / SAFETENSORS, tmp_path))
    told = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(told))
    clip, quick = load_clip(str(path), "cpu"), load_clip(str(folder / "safetensors"), "cpu")
    assert torch.equal(clip.transform(Image.new("RGB", (64, 64), (255, 255, 255))), torch.full((3, 64, 64), 2.0))
    assert not torch.allclose(clip.encode_texts(TEXTS), quick.encode_texts(TEXTS), atol=1e-4)
    told["model_cfg"]["quick_gelu"] = True
    (tmp_path / CONFIG_FILE).write_text(json.dumps(told))
    path = path.rename(tmp_path / "again.safetensors")
    again = load_clip(str(path), "cpu")
    assert torch.equal(again.encode_texts(TEXTS), quick.encode_texts(TEXTS))
    (tmp_path / CONFIG_FILE).write_text("[]")
    with pytest.raises(UserError, match=r"open_clip_config\.json: expected open_clip's 'model_cfg'"):
        load_clip(str(path.rename(tmp_path / "renamed.safetensors")), "cpu")


def test_the_program_of_an_archive_is_never_looked_at(folder: Path, tmp_path: Path, model: torch.nn.Module) -> None:
    given = folder / "archive" / ARCHIVE
    with zipfile.ZipFile(given) as archive:
        programs = [name.partition("/")[2] for name in archive.namelist() if "/code/" in name]
    changed = archive_with(tmp_path / "changed.pt", given, dict.fromkeys([*programs, "constants.pkl"], b"nonsense"))
    read = read_archive(changed)
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_what_a_pickle_asks_for_is_not_done(folder: Path, tmp_path: Path) -> None:
    asked = pickle.dumps({"weight": Malice(tmp_path / "made")}, protocol=2)
    archive = archive_with(tmp_path / "bad.pt", folder / "archive" / ARCHIVE, {"data.pkl": asked})
    torch.save({"weight": Malice(tmp_path / "made")}, tmp_path / "bad.bin")
    for path in (archive, tmp_path / "bad.bin"):
        with pytest.raises(UserError, match=path.name):
            load_clip(str(path), "cpu")
    assert not (tmp_path / "made").exists()
    pickle.loads(asked)
    assert (tmp_path / "made").exists()


def _content(content: bytes) -> Make:
    return lambda folder, path: path.write_bytes(content)


def _cut(folder: Path, path: Path) -> None:
    path.write_bytes((folder / "safetensors" / SAFETENSORS).read_bytes()[:-100])


def _spanned(folder: Path, path: Path) -> None:
    """A zip file that says it goes on on another disk."""
    content = (folder / "archive" / ARCHIVE).read_bytes()
    end = content.rindex(b"PK\5\6")
    path.write_bytes(content[:end] + struct.pack("<4sLQL", b"PK\6\7", 1, 0, 2) + content[end:])


def _changed(name: str, value: torch.Tensor | None) -> Make:
    """The weights with another tensor, or without one."""

    def make(folder: Path, path: Path) -> None:
        tensors = load_file(folder / "safetensors" / SAFETENSORS) | {name: value}
        save_file({name: value for name, value in tensors.items() if value is not None}, path)

    return make


def _archived(changed: dict[str, bytes], packed: str = "") -> Make:
    return lambda folder, path: archive_with(path, folder / "archive" / ARCHIVE, changed, packed)


def _cut_tree(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(folder / "archive" / ARCHIVE) as archive:
        (tree,) = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    archive_with(path, folder / "archive" / ARCHIVE, {"data.pkl": tree[: len(tree) // 2]})


OTHER_MODEL = save({"lm_head.weight": torch.zeros(4, 4)})
BAD = {
    "nothing.pt": (_content(b""), "cannot read it"),
    "words.pt": (_content(b"not a model"), "cannot read it"),
    "spanned.pt": (_spanned, "cannot read it"),
    "words.safetensors": (_content(b"not a model"), "cannot read it"),
    "cut.safetensors": (_cut, "cannot read it"),
    "other.safetensors": (_content(OTHER_MODEL), "found 1 tensors, without visual.conv1.weight"),
    "width.safetensors": (_changed("token_embedding.weight", torch.zeros(49408, 60)), "widths in multiples of 64"),
    "norm.safetensors": (_changed("ln_final.weight", None), "ln_final.weight"),
    "shape.safetensors": (_changed("visual.proj", torch.zeros(32, 64)), "visual.proj"),
    "packed.pt": (_archived({}, "data/0"), "data/0 is compressed"),
    "short.pt": (_archived({"data/0": b"1234"}), "record size"),
    "tree.pt": (_cut_tree, "archive of modules and tensors"),
}


@pytest.mark.parametrize(("name", "make", "message"), [(name, *given) for name, given in BAD.items()], ids=BAD)
def test_what_is_no_clip_is_refused(name: str, make: Make, message: str, folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / name)
    with pytest.raises(UserError) as refused:
        load_clip(str(tmp_path / name), "cpu")
    assert str(tmp_path / name) in str(refused.value)
    assert message in str(refused.value)


def test_half_of_an_archive_is_no_archive(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "archive" / ARCHIVE).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert is_archive(folder / "archive" / ARCHIVE)
    assert not is_archive(tmp_path / "half.pt")
    with pytest.raises(UserError, match=r"half\.pt"):
        load_clip(str(tmp_path / "half.pt"), "cpu")


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/ViT-B-32\.pt', and no such file"):
        load_clip(str(tmp_path / "nowhere" / "ViT-B-32.pt"), "cpu")


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A CLIP of transformers in its folder, with heads that are not 64 wide and narrow inner layers, and the model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "hidden_act": request.param}
    text = sizes | {"vocab_size": 49408, "num_attention_heads": 4, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = sizes | {"num_attention_heads": 2, "image_size": 64, "patch_size": 32}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    made = CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    made.save_pretrained(folder)
    return folder, model


def by_transformers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of `pictures` and `TEXTS` by the stock model."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    _, _, transform = open_clip.create_model_and_transforms(
        "ViT-B-32", force_image_size=64, image_mean=(0, 0, 0), image_std=(1, 1, 1)
    )
    seen = torch.stack([(transform(Image.fromarray(one)) - mean) / std for one in pictures(2)])
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=seen)
    return tuple(
        torch.nn.functional.normalize(one.double(), dim=-1) for one in (output.image_embeds, output.text_embeds)
    )


@pytest.mark.parametrize("place", ["folder", "file", "repository", "hub"])
def test_a_clip_of_transformers(place: str, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nearly everybody has it on a machine without a network: a folder, or Hugging Face's cache."""
    folder, model = stock
    name = {"folder": str(folder), "file": str(folder / "model.safetensors"), "repository": "some/clip"}.get(place)
    if place in ("repository", "hub"):
        cache = tmp_path / "models--some--clip"
        shutil.copytree(folder, cache / "snapshots/abc")
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    load_clip.cache_clear()
    clip = load_clip(name or "hf-hub:some/clip", "cpu")
    images, texts = by_transformers(model)
    assert torch.allclose(clip.encode_images(map(Image.fromarray, pictures(2))), images, atol=1e-5)
    assert torch.allclose(clip.encode_texts(TEXTS), texts, atol=1e-5)


def config_with(**changes: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for part in ("text_config", "vision_config"):
            config[part] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return write


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "expected config.json of a CLIP beside weights"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "expected config.json of a CLIP"),
    "another model's": (lambda folder: (folder / "config.json").write_text("{}"), "KeyError"),
    "another activation": (config_with(hidden_act="relu"), "whose activation is quick_gelu or gelu: KeyError"),
    "no heads": (config_with(num_attention_heads=0), "ZeroDivisionError"),
    "a tensor less": (
        lambda folder: save_file(
            {n: t for n, t in load_file(folder / "model.safetensors").items() if "layers.1.self_attn.k_proj" not in n},
            folder / "model.safetensors",
        ),
        "expected the weights of a CLIP like OpenAI's",
    ),
    "fewer tokens": (
        lambda folder: save_file(
            {
                n: t[:99].clone() if "token_embedding" in n else t
                for n, t in load_file(folder / "model.safetensors").items()
            },
            folder / "model.safetensors",
        ),
        "expected a CLIP with OpenAI's 49,408 tokens, got one with 99",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_folders_of_transformers_that_are_no_clip(spoil: Callable, reason: str, stock: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(stock[0], tmp_path / "clip")
    spoil(folder)
    with pytest.raises(UserError, match=reason):
        load_clip(str(folder), "cpu")


@pytest.mark.parametrize("name", ["openai/clip-vit-nowhere", "hf-hub:laion/nothing", "a b", "x/y/z"])
def test_a_repository_that_is_not_in_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"unknown CLIP .*`hf download openai/clip-vit-base-patch32` puts one"):
        load_clip(name, "cpu")


def test_heads_of_open_clips_configuration(tmp_path: Path) -> None:
    """Of 80 in ViT-H: no shape tells."""
    torch.manual_seed(0)
    wide = {"vision_cfg": {**SIZES["vision_cfg"], "width": 320, "head_width": 80}}
    text = {"text_cfg": {**SIZES["text_cfg"], "width": 128, "heads": 4}}
    model, _, _ = open_clip.create_model_and_transforms("ViT-B-32", embed_dim=64, **wide, **text)
    save_file(model.state_dict(), tmp_path / SAFETENSORS)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": {"embed_dim": 64, **wide, **text}}))
    ids = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    clip = load_clip(str(tmp_path), "cpu")
    seen = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(clip.model.encode_image(seen), model.eval().encode_image(seen))
        assert torch.equal(clip.model.encode_text(ids), model.encode_text(ids))
