"""Loading of SEED-X from every file format, and errors for broken folders."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbones.seed_x.released import PIECES, TOKENIZER

from cnext.backbones.seed_x.folder import fill
from cnext.backbones.seed_x.model import SeedX
from cnext.errors import UserError

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The released folder, to be changed. Its large files are links."""
    return Path(shutil.copytree(folder, tmp_path / "pretrained", copy_function=os.link))


def replaced(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def merged(llm: Path) -> dict[str, torch.Tensor]:
    shards = sorted(llm.glob("*.bin"))
    state = {name: tensor for file in shards for name, tensor in torch.load(file, weights_only=True).items()}
    for file in [*shards, llm / INDEX]:
        file.unlink()
    return state


def as_one_file(llm: Path) -> None:
    torch.save(merged(llm), llm / "pytorch_model.bin")


def as_an_old_file(llm: Path) -> None:
    torch.save(merged(llm), llm / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_safetensors(llm: Path) -> None:
    from safetensors.torch import save_file

    save_file(merged(llm), llm / "model.safetensors")


def as_safetensors_with_index(llm: Path) -> None:
    from safetensors.torch import save_file

    state = merged(llm)
    halves = {f"model-{half}.safetensors": dict(list(state.items())[half::2]) for half in range(2)}
    for name, tensors in halves.items():
        save_file(tensors, llm / name)
    index = {"weight_map": {tensor: name for name, tensors in halves.items() for tensor in tensors}}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", [as_one_file, as_an_old_file, as_safetensors, as_safetensors_with_index])
def test_every_file_format_gives_the_same_model(copy: Path, loaded: SeedX, form: Callable[[Path], None]) -> None:
    form(copy / "seed_x_i" / "llm")
    found, expected = SeedX.load(weights=copy).state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_loaded_tensors_equal_those_of_the_files(folder: Path, loaded: SeedX) -> None:
    llm = folder / "seed_x_i" / "llm"
    files = [
        *llm.glob("*.bin"),
        folder / "QwenViT" / "qwen_vit_G.pt",
        folder / "seed_x_i" / "agent" / "pytorch_model.bin",
    ]
    own = loaded.state_dict()
    for file in files:
        prefix = {llm: "llm.", folder / "QwenViT": "vit."}.get(file.parent, "")
        for name, tensor in torch.load(file, weights_only=True).items():
            assert name.endswith("inv_freq") or torch.equal(own[prefix + name], tensor)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # Rotary frequencies come from the config: the files of this folder have zeros.
    expected = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(loaded.llm.model.rotary_emb.inv_freq, expected)


def test_bfloat16_and_missing_position_embeddings(copy: Path, loaded: SeedX) -> None:
    agent = copy / "seed_x_i" / "agent" / "pytorch_model.bin"
    state = {
        name: t
        for name, t in torch.load(agent, weights_only=True).items()
        if not name.endswith("pos_embed") or "." not in name
    }
    agent.unlink()
    torch.save(state, agent)
    model = SeedX.load(weights=copy, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.input_resampler.pos_embed[1, 0] == torch.tensor(1.0).sin().bfloat16()


def test_the_files_of_weights_are_found_without_reading_them(copy: Path) -> None:
    names = [path.name for path in SeedX.check(copy)]
    shards = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    assert names == [*shards, "pytorch_model.bin", "qwen_vit_G.pt"]
    next(copy.glob(LLM)).unlink()
    with pytest.raises(UserError, match="1 are missing"):
        SeedX.check(copy)


def test_a_tokenizer_beside_the_model_is_found(copy: Path) -> None:
    (copy / "seed_x_i" / TOKENIZER).rename(copy / TOKENIZER)
    assert len(SeedX.load(weights=copy).tokenizer) == PIECES + 330


def test_the_backbone_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--weights"):
        SeedX.load()
    with pytest.raises(UserError, match=r"QwenViT/qwen_vit_G.pt; found no folder"):
        SeedX.load(weights=tmp_path / "nowhere")


def changed_state(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = next(root.glob(file))
        state = torch.load(path, weights_only=True)
        change(state)
        path.unlink()
        torch.save(state, path)

    return apply


def changed_config(**values: object) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "seed_x_i" / "llm" / "config.json"
        replaced(path, json.dumps(json.loads(path.read_text()) | values))

    return apply


LLM = "seed_x_i/llm/*00001*.bin"
AGENT = "seed_x_i/agent/pytorch_model.bin"
VISION = "QwenViT/qwen_vit_G.pt"


DAMAGED = {
    "shard missing": (
        lambda root: next(root.glob(LLM)).unlink(),
        r"expected 2 files beside it, 1 are missing: pytorch_model-00001",
    ),
    "index missing": (
        lambda root: (root / "seed_x_i/llm" / INDEX).unlink(),
        "expected pytorch_model.bin or model.safetensors, or an",
    ),
    "index of another form": (
        lambda root: replaced(root / "seed_x_i/llm" / INDEX, "[]"),
        "expected an object with 'weight_map'",
    ),
    "index leads outside": (
        lambda root: replaced(root / "seed_x_i/llm" / INDEX, '{"weight_map": {"a": "../x.bin"}}'),
        r"expected names of files beside it, found '\.\./x\.bin'",
    ),
    "not a torch file": (
        lambda root: replaced(next(root.glob(LLM)), b"no weights"),
        "expected a file of tensors, by torch or safetensors; cannot",
    ),
    "pickle with code": (lambda root: replaced(next(root.glob(LLM)), pickle.dumps(Path, protocol=2)), "cannot read it"),
    "key missing": (
        changed_state(LLM, lambda s: s.pop("model.embed_tokens.weight")),
        "1 missing: model.embed_tokens.weight",
    ),
    "key too many": (changed_state(LLM, lambda s: s.update(strange=torch.ones(1))), "1 not of this model: strange"),
    "another shape": (
        changed_state(AGENT, lambda s: s.update(patch_pos_embed=torch.ones(4, 5))),
        r"1 of another shape: patch_pos_embed \(4, 5\), expected \(4, 64\)",
    ),
    "not the encoder": (changed_state(VISION, lambda s: s.pop("conv1.weight")), "state of Qwen-VL's visual encoder"),
    "encoder incomplete": (changed_state(VISION, lambda s: s.pop("ln_post.bias")), "1 missing: ln_post.bias"),
    "another architecture": (changed_config(model_type="mistral"), "expected model_type 'llama', found 'mistral'"),
    "another vocabulary": (
        changed_config(vocab_size=32000),
        r"expected vocab_size \d+, as many as the tokenizer has tokens, found 32000",
    ),
    "fewer layers": (changed_config(num_hidden_layers=1), "9 not of this model: model.layers.1"),
    "impossible config": (
        changed_config(num_attention_heads=7),
        "expected the (config of a LLaMA|21 tensors of the released) model",
    ),
    "no config": (lambda root: (root / "seed_x_i/llm/config.json").unlink(), "with seed_x_i/llm/config.json; found"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_errors_name_what_does_not_fit(copy: Path, change: Callable[[Path], None], message: str) -> None:
    change(copy)
    with pytest.raises(UserError, match=message):
        SeedX.load(weights=copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit_stage": "third"}, "valid: first, second"),
        ({"noise": "gpu"}, "unknown noise 'gpu'; valid: cpu, device"),
        ({"resolution": 100}, "multiple of 8"),
        ({"steps": 0}, "steps"),
    ],
    ids=["edit_stage", "noise", "resolution", "steps"],
)
def test_options_out_of_range_are_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SeedX.load(weights=folder, **options)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_damaged_files_are_refused(copy: Path, tmp_path: Path, zipped: bool) -> None:
    """A flipped byte takes the reader of pickles anywhere; a user sees one message."""
    small, agent = tmp_path / "small.bin", copy / AGENT
    torch.save({"patch_pos_embed": torch.ones(2, 2)}, small, _use_new_zipfile_serialization=zipped)
    content, draw, refused = small.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        replaced(agent, bytes(damaged))
        with pytest.raises(UserError, match=re.escape(str(agent))) as caught:
            fill(torch.nn.Linear(3, 3, device="meta"), [agent], torch.float32, lambda _: torch.device("cpu"))
        refused += "cannot read it" in str(caught.value)
    assert refused > 40


def test_a_missing_detokenizer_warns_and_require_drawing_raises(copy: Path) -> None:
    (copy / "seed_detokenizer" / "second_stage" / "pytorch_model.bin").unlink()
    SeedX.load(weights=copy).require_drawing()
    shutil.rmtree(copy / "stable-diffusion-xl-base-1.0" / "vae")
    missing = "stable-diffusion-xl-base-1.0/vae/config.json, stable-diffusion-xl-base-1.0/vae/diffusion_pytorch_model"
    with pytest.warns(UserWarning, match=missing):
        model = SeedX.load(weights=copy)
    with pytest.raises(UserError, match=missing):
        model.require_drawing()
    with pytest.warns(UserWarning, match="seed_detokenizer/second_stage/pytorch_model.bin, stable"):
        SeedX.load(weights=copy, edit_stage="second")
