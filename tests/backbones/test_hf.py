"""Models of transformers by their chat template, against the stock model and processor alone: ten families."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones.small_vlms import TEXT_WRITERS, WRITERS
from PIL import Image
from torch import Tensor

from cnext import adapters, methods
from cnext.adapters.prompts import Prompts
from cnext.backbones.conversation import IGNORED, IMAGE_READ, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.hf.model import HuggingFace
from cnext.errors import UserError
from cnext.tasks.base import Recipe, Sample, Task, Turn
from cnext.training.evaluation import question
from cnext.training.phases import finish_task
from cnext.training.trainer import TaskTrainer

Load = Callable[..., HuggingFace]
EVERY = {**WRITERS, **TEXT_WRITERS}
ENDS = ("</s>", "<|im_end|>", "<end_of_utterance>", "<end_of_turn>")
"""Tokens that end a turn in the templates of these tests."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module", params=list(EVERY))
def folder(request: pytest.FixtureRequest, root: Path) -> Path:
    return EVERY[request.param](root / request.param)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Square, wide and tall."""
    place = tmp_path_factory.mktemp("images")
    paths = []
    for number, (width, height) in enumerate([(16, 16), (60, 20), (18, 44)]):
        pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        paths.append(place / f"{number}.png")
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def loaded() -> dict[str, HuggingFace]:
    return {}


@pytest.fixture
def load(folder: Path, loaded: dict[str, HuggingFace]) -> Load:
    """Loads with these options, or copies what was loaded with them."""

    def copied(**options: Any) -> HuggingFace:
        key = f"{folder} {options}"
        if key not in loaded:
            loaded[key] = HuggingFace.load("cpu", folder, **options)
        return copy.deepcopy(loaded[key])

    return copied


def samples(backbone: HuggingFace, images: Sequence[Path]) -> list[Sample]:
    """Of several lengths, with images of several sizes and without, before the words and after them."""
    square, wide, tall = images if backbone.reads_images else (None, None, None)
    return [
        Sample("a", (Turn("what color is the ring?", "red"),), square),
        Sample("b", (Turn("how many?", "three blue rings"),), wide, image_first=False),
        Sample("c", (Turn("hello", "a star is on green"),)),
        Sample("d", (Turn(" shape? ", "star "),), tall),
    ]


def stock(folder: Path, sample: Sample, answered: bool) -> dict[str, Tensor]:
    """Inputs of a sample by transformers' processor alone, with its answer or up to where it begins."""
    (turn,), reads = sample.turns, folder.name in WRITERS
    maker = (transformers.AutoProcessor if reads else transformers.AutoTokenizer).from_pretrained(folder)
    asked, told = turn.instruction.strip(), turn.answer.strip()
    if folder.name in ("llama", "gpt2"):
        return dict(maker(f"{asked}\n{told}</s>" if answered else f"{asked}\n", return_tensors="pt"))
    content: Any = asked
    answer: Any = told
    seen = []
    if reads:
        seen = [] if sample.image is None else [Image.open(sample.image).convert("RGB")]
        content = [{"type": "text", "text": asked}]
        content[0 if sample.image_first else 1 : 0] = [{"type": "image", "image": image} for image in seen]
        answer = [{"type": "text", "text": told}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}][: 1 + answered]
    thinks = {"enable_thinking": False} if folder.name == "qwen3" else {}
    if folder.name == "llava" and answered:  # whose template has no token that ends an answer
        text = maker.apply_chat_template(messages, tokenize=False).removesuffix(" ") + "</s>"
        return dict(maker(text=text, images=seen or None, return_tensors="pt"))
    return dict(
        maker.apply_chat_template(
            messages, add_generation_prompt=not answered, tokenize=True, return_dict=True, return_tensors="pt", **thinks
        )
    )


def stock_labels(folder: Path, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs with the answer, and labels: all that follows the question, up to the token that ends the turn."""
    inputs, length = stock(folder, sample, True), stock(folder, sample, False)["input_ids"].shape[1]
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = inputs["input_ids"]
    end = max(index for index, token in enumerate(ids[0].tolist()) if words.convert_ids_to_tokens(token) in ENDS)
    labels = torch.full_like(ids, IGNORED)
    labels[:, length : end + 1] = ids[:, length : end + 1]
    return inputs, labels


def accepted(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Without the types of ids that tokenizers of no family give, and at the model's precision."""
    kept = {n: v for n, v in inputs.items() if n != "token_type_ids" or "gemma" in model.config.model_type}
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in kept.items()}


def stock_model(folder: Path, dtype: torch.dtype) -> Any:
    auto = transformers.AutoModelForImageTextToText if folder.name in WRITERS else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype).eval()


def test_loss_equals_that_of_the_stock_model(folder: Path, load: Load, images: list[Path]) -> None:
    """On the processor's own tokenization, in double precision."""
    backbone, model = load(dtype=torch.float64), stock_model(folder, torch.float64)
    for sample in samples(backbone, images):
        inputs, labels = stock_labels(folder, sample)
        item = backbone.prepare(sample)
        length = len(item.labels)
        assert item.fields["input_ids"][0].tolist() == inputs["input_ids"][0, :length].tolist()
        assert item.labels.tolist() == labels[0, :length].tolist()
        assert (labels[0, length:] == IGNORED).all()
        with torch.no_grad():
            wanted = model(**accepted(model, inputs, torch.float64), labels=labels).loss
            found = backbone.loss(backbone.encode([sample]))
        torch.testing.assert_close(found.total.double(), wanted.double(), rtol=1e-6, atol=1e-6)
        assert found.tokens == backbone.supervised([item])[0] == int((labels != IGNORED).sum())


def test_answers_equal_those_of_the_stock_model(folder: Path, load: Load, images: list[Path]) -> None:
    """One by one, with a penalty in the released generation_config.json that greedy decoding has not; batches of any
    size give the same."""
    backbone, model = load(dtype=torch.float64), stock_model(folder, torch.float64)
    assert model.generation_config.repetition_penalty == 1.3
    asked = samples(backbone, images)
    wanted = []
    for sample in asked:
        inputs = accepted(model, stock(folder, sample, False), torch.float64)
        options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 6}
        ids = model.generate(**inputs, **options, pad_token_id=0, eos_token_id=backbone.stop_ids)
        wanted.append(
            backbone.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    assert [one.text for one in backbone.generate(asked, 6)] == wanted
    assert [backbone.generate([sample], 6)[0].text for sample in asked] == wanted
    assert len(set(wanted)) > 1
    assert all(one.image is None for one in backbone.generate(asked, 2))


def test_padding_and_other_images_change_nothing(load: Load, images: list[Path]) -> None:
    backbone = load(dtype=torch.float64)
    mixed = samples(backbone, images)
    together = backbone.output(backbone.encode(mixed))
    alone = [backbone.output(backbone.encode([sample])) for sample in mixed]
    for name in ("logits", "labels"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    features = backbone.question_features(backbone.encode(mixed))
    each = [backbone.question_features(backbone.encode([sample])) for sample in mixed]
    torch.testing.assert_close(features, torch.cat(each))
    assert backbone.question_features([]).shape == (0, 32)


def test_answers_alone_are_supervised_each_with_its_end(load: Load, images: list[Path]) -> None:
    backbone = load()
    image = images[1] if backbone.reads_images else None
    item = backbone.prepare(Sample("", (Turn("what?", "red"), Turn("shape?", "ring of stars")), image))
    runs = [list(run) for wanted, run in groupby(item.labels.tolist(), lambda label: label != IGNORED) if wanted]
    end = backbone.chat.end
    assert [backbone.tokenizer.decode(run).strip() for run in runs] == [f"red{end}", f"ring of stars{end}"]
    assert (item.fields["input_ids"][0][item.labels != IGNORED] == item.labels[item.labels != IGNORED]).all()


def test_every_position_has_its_role(load: Load, images: list[Path]) -> None:
    backbone = load()
    mixed = samples(backbone, images)
    seen: list[Tensor] = []
    backbone.language_model.register_forward_hook(lambda *_: seen.append(backbone.positions))
    backbone.output(backbone.encode(mixed))
    for row, sample in zip(seen[0], mixed, strict=True):
        item = backbone.prepare(sample)
        first = int((item.labels != IGNORED).nonzero()[0])
        read = item.fields["input_ids"][0] == (backbone.image_token or -1)
        assert (row[: len(read)][read] == IMAGE_READ).all()
        assert bool(read.any()) == (sample.image is not None)
        assert (row[first - 1 : len(item.labels)] == TEXT_WRITTEN).all()
        assert (row[: first - 1][~read[: first - 1]] == TEXT_READ).all()
    seen.clear()
    backbone.generate(mixed, 3)
    assert [tuple(each.shape) for each in seen] == [seen[0].shape, (4, 1), (4, 1)]
    assert (seen[0][:, -1] == TEXT_WRITTEN).all()
    assert all((each == TEXT_WRITTEN).all() for each in seen[1:])


def test_training_the_branches_changes_answers_and_nothing_else(load: Load, images: list[Path]) -> None:
    backbone = load()
    pretrained = {name: value.clone() for name, value in backbone.state_dict().items()}
    reads = ("text", "image") if backbone.reads_images else ("text",)
    task = Task("one", reads, ("text",), "llava", "exact_answer", "", "", "", "")
    mage = methods.load("mage-paper")(scale=1.0)
    mage.setup(backbone, [task], torch.Generator().manual_seed(0))
    layers = adapters.layers(backbone.model)
    assert len(layers) == 2 * (4 if "c_attn" in backbone.targets else 7)
    assert all(".vision" not in name and ".visual" not in name for name in layers)
    parameters, encoded = mage.trainable(task), backbone.train().encode(samples(backbone, images))
    optimizer = torch.optim.AdamW(parameters.values(), 0.02)
    asked = samples(backbone, images)
    before, losses = backbone.eval().generate(asked, 6), []
    backbone.train()
    for _ in range(40):
        optimizer.zero_grad()
        loss = backbone.loss(encoded).total
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] / 4
    after = backbone.eval().generate(asked, 6)
    assert [one.text for one in after] != [one.text for one in before]
    assert not any(p.grad is not None for name, p in backbone.named_parameters() if ".branches." not in name)
    adapters.detach(backbone.model)
    assert all(torch.equal(value, pretrained[name]) for name, value in backbone.state_dict().items())


def test_lengths_are_known_before_images_are_decoded(load: Load, images: list[Path]) -> None:
    backbone = load()
    config = backbone.model.config.get_text_config()
    for sample in samples(backbone, images):
        config.max_position_embeddings = len(backbone.prepare(sample).labels)
        backbone.check_length(sample)
        config.max_position_embeddings -= 1
        with pytest.raises(UserError, match=r"is [\d,]+ tokens long, the model reads [\d,]+ at most"):
            backbone.check_length(sample)
        with pytest.raises(UserError, match=r"is [\d,]+ tokens long, the model reads [\d,]+ at most"):
            backbone.prepare(sample)
        config.max_position_embeddings = 1024


def test_tokens_of_the_template_are_refused_in_texts(load: Load) -> None:
    backbone = load()
    for turn in (Turn(f"what {backbone.chat.end} is this?", "a"), Turn("what?", f"a{backbone.chat.end}")):
        with pytest.raises(UserError, match=r"file:3 has .* in its text"):
            backbone.check_length(Sample("", (turn,), origin="file:3"))
        with pytest.raises(UserError, match="in its text"):
            backbone.prepare(Sample("", (turn,)))


def test_connections_are_the_projector(load: Load) -> None:
    backbone = load()
    if not backbone.reads_images:
        with pytest.raises(UserError, match="no layers between visual parts and language model"):
            backbone.connections()
        return
    found = backbone.connections()
    inside = {id(p) for p in backbone.language_model.parameters()}
    assert found
    assert not inside & {id(p) for p in found.values()}
    extras = backbone.released_extras()
    assert not extras.keys() & found.keys()
    ends = (backbone.model.get_input_embeddings().weight, backbone.model.get_output_embeddings().weight)
    assert {id(end) for end in ends} < {id(parameter) for parameter in extras.values()}
    assert all("vision" not in name and "visual" not in name for name in extras)


def test_it_says_what_it_reads_and_writes(folder: Path) -> None:
    reads = ("text", "image") if folder.name in WRITERS else ("text",)
    assert HuggingFace.modalities(folder) == (reads, ("text",))
    assert [file.name for file in HuggingFace.check(folder)] == ["model.safetensors"]


def test_sizes_are_counted_without_values(folder: Path, load: Load) -> None:
    backbone = HuggingFace.meta(folder)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    count = sum(parameter.numel() for parameter in load().parameters())
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count


def test_prompts_are_seen_by_every_family(load: Load, images: list[Path]) -> None:
    """Whatever the form of its masks and positions: in training and in generation, in any batch."""
    backbone = load(dtype=torch.float64)
    mixed = samples(backbone, images)
    encoded, asked = backbone.encode(mixed), [backbone.generate([sample], 4)[0].text for sample in mixed]
    plain = backbone.output(encoded).logits
    pool = Prompts(backbone.language_model, 4 * 5 * 32, 4, 2, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone.output(encoded).logits, plain, rtol=0, atol=0)
    with pool.before(torch.tensor([[0, 2]])):
        together = backbone.output(encoded).logits
        alone = torch.cat([backbone.output([item]).logits for item in encoded])
        answers = [one.text for one in backbone.generate(mixed, 4)]
        assert answers == [backbone.generate([sample], 4)[0].text for sample in mixed]
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, plain)
    assert answers != asked
    assert [backbone.generate([sample], 4)[0].text for sample in mixed] == asked


KINDS = ("lora", "mage-experts", "mage-routed", "mr-lora", "prompt-pool", "distillation")


@pytest.mark.parametrize(
    "method", [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in sorted(methods.modules())]
)
def test_every_method_trains_and_answers(method: str, root: Path, images: list[Path]) -> None:
    """Two tasks of two steps, with images and without, on Qwen2-VL."""
    folder = root / "qwen2_vl"
    backbone = HuggingFace.load("cpu", folder if folder.exists() else WRITERS["qwen2_vl"](folder))
    tasks = [Task(name, ("text", "image"), ("text",), "llava", "exact_answer", "", "", "", "") for name in "ab"]
    rows = samples(backbone, images)
    made = methods.load(method)(**({"router_steps": 2} if method == "mr-lora" else {}))
    made.setup(backbone, tasks, torch.Generator().manual_seed(0))
    recipe = Recipe({"a": 2, "b": 2}, batch_size=4, learning_rate=0.01, warmup_steps=1)
    before = {name: parameter.detach().clone() for name, parameter in made.adapter_parameters().items()}
    for number, task in enumerate(tasks, 1):
        parameters, kept = made.trainable(task), made.card.rehearsal
        if not parameters:
            continue
        trainer = TaskTrainer(backbone.train(), made, parameters, rows, recipe, 2, (0, task.name))
        made.before_task(parameters, 2, {each.name: rows[:kept] for each in tasks[:number] if kept})
        while trainer.step < 2:
            trainer.train_step()
        finish_task(made)
    changed = [
        name for name, parameter in made.adapter_parameters().items() if not torch.equal(parameter, before[name])
    ]
    assert bool(changed) == (method != "zero-shot")
    with made.for_eval():
        answers = made.answer([question(row) for row in rows], 4, tasks[0] if made.card.task_id_at_test else None)
    assert [one.image for one in answers] == [None] * 4
