"""Runs on models of transformers: known suites, one's own, resumed, exported; what is refused before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones.own_suites import write_rows_of, write_suite
from backbones.small_vlms import WRITERS, write_llama, write_llava, write_qwen3
from peft import PeftModel
from training.toy import change

from cnext import adapters, attach_mage, backbones
from cnext.backbones.hf.folder import check_causal
from cnext.backbones.hf.model import HuggingFace
from cnext.cli import main, run_main
from cnext.errors import UserError
from cnext.tasks.base import Sample, Turn
from cnext.training.trainer import TaskTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
PAIRS = [(f"what is number {index}?", f"ring {index}") for index in range(6)]
TASKS = {"Rings": (PAIRS, PAIRS), "Stars": ([(q, a.replace("ring", "star")) for q, a in PAIRS], PAIRS)}
BUDGET = {"steps": 3, "batch_size": 4, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS["qwen2_vl"](tmp_path_factory.mktemp("weights") / "qwen2_vl")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("weights") / "qwen3")


def on(weights: Path) -> list[str]:
    return ["--backbone", "hf", "--weights", str(weights), "--device", "cpu"]


def results(out: Path) -> dict[str, Any]:
    (file,) = out.rglob("results.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("suite", "answers"),
    [
        ("coin", {"ScienceQA": "B", "TextVQA": "stop", "Grounding": "[0.10,0.20,0.30,0.40]"}),
        ("ucit", {"ArxivQA": "B", "Flickr30k": "a red ring on green"}),
        ("mllm-cl-domain", {"RS": "two", "Sci": "B"}),
    ],
)
def test_suites_of_models_that_write_text(suite: str, answers: dict[str, str], qwen: Path, tmp_path: Path) -> None:
    write_rows_of(suite, tmp_path / "data", answers)
    flags = [*on(qwen), "--suite", suite, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    flags += ["--preset", "smoke", "--batch-size", "2", "--method", "mage", "--order", ",".join(answers)]
    assert run_main(flags) == 0
    found = results(tmp_path / "runs")
    assert found["tasks"] == list(answers)
    assert all(score is not None for score in found["score_matrix"][-1])


def test_a_resumed_run_ends_with_the_same_bits(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = write_suite(tmp_path / "suite", tmp_path / "data", TASKS, image=True, **BUDGET)
    flags = [*on(qwen), *suite, "--method", "mage", "--checkpoint-interval", "1"]
    assert run_main([*flags, "--out", str(tmp_path / "whole")]) == 0
    step, taken = TaskTrainer.train_step, []

    def stops(self: TaskTrainer) -> Any:
        taken.append(self)
        if len(taken) == 5:
            raise UserError("stopped in the second task")
        return step(self)

    monkeypatch.setattr(TaskTrainer, "train_step", stops)
    assert run_main([*flags, "--out", str(tmp_path / "parts")]) == 2
    assert len(taken) == 5
    assert run_main([*flags, "--out", str(tmp_path / "parts")]) == 0
    assert len(taken) == 7
    (whole,), (parts,) = ((tmp_path / name).rglob("results.json") for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("method", ["mage", "lora"])
def test_a_run_is_exported_to_peft_and_merged(method: str, qwen: Path, tmp_path: Path) -> None:
    """Both give the logits of the trained model, by the stock classes."""
    suite = write_suite(tmp_path / "suite", tmp_path / "data", TASKS, image=True, **BUDGET)
    assert run_main([*on(qwen), *suite, "--method", method, "--out", str(tmp_path / "runs")]) == 0
    (folder,) = [file.parent for file in (tmp_path / "runs").rglob("results.json")]
    for format in ("peft-merged-rank", "merged"):
        assert main(["export", str(folder), "--to", str(tmp_path / format), "--format", format]) == 0
    sample = Sample("", (Turn(*PAIRS[0]),), tmp_path / "data" / "images" / "Rings.png")
    merged = HuggingFace.load("cpu", tmp_path / "merged")
    auto = transformers.AutoModelForImageTextToText
    adapted = PeftModel.from_pretrained(auto.from_pretrained(qwen, dtype=torch.float32), tmp_path / "peft-merged-rank")
    inputs = merged.prepare(sample).fields
    with torch.no_grad():
        found, wanted = merged.model(**inputs).logits, adapted(**inputs).logits
        plain = HuggingFace.load("cpu", qwen).model(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert (
        merged.model.generation_config.eos_token_id
        == HuggingFace.load("cpu", qwen).model.generation_config.eos_token_id
    )


def test_an_adapter_is_imported_onto_its_own_model_alone(
    qwen: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A language model too, which has no connections."""
    for weights in (qwen, text):
        adapter = tmp_path / f"{weights.name}-adapter"
        model = HuggingFace.load("cpu", weights).model
        attach_mage(model).save_pretrained(adapter)
        to = str(tmp_path / weights.name)
        assert main(["import", str(adapter), "--to", to, *on(weights)[:4]]) == 0
        capsys.readouterr()
    given = ["import", str(tmp_path / f"{qwen.name}-adapter"), "--to", str(tmp_path / "other"), *on(text)[:4]]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "the adapter does not fit the model, is it of another backbone?" in said
    assert "connections" not in said


def test_a_text_model_learns_a_suite_without_images(text: Path, tmp_path: Path) -> None:
    flags = write_suite(tmp_path / "suite", tmp_path / "data", TASKS, **BUDGET | {"steps": 40})
    flags += ["--method", "lora", "--lora.scale", "1", "--lora.lr-factor", "1"]
    assert run_main([*on(text), *flags, "--out", str(tmp_path / "runs")]) == 0
    scores = results(tmp_path / "runs")["score_matrix"]
    assert scores[0][0] > 60


REFUSED = {
    "images written": (["text"], ["image"], "image", "Rings (writes image), Stars (writes image)"),
    "images read by a text model": (["text", "image"], ["text"], "text", "Rings (reads image), Stars (reads image)"),
}


@pytest.mark.parametrize(("reads", "writes", "model", "said"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("how", ["run", "dry run", "study", "forecast", "data check", "doctor"])
def test_suites_that_it_cannot_do_are_refused_before_anything_is_loaded(
    how: str,
    reads: list[str],
    writes: list[str],
    model: str,
    said: str,
    qwen: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights are not loaded")

    monkeypatch.setattr(HuggingFace, "load", loaded)
    weights = text if model == "text" else qwen
    flags = write_suite(tmp_path / "suite", tmp_path / "data", TASKS, image="image" in reads, writes=writes, **BUDGET)
    run = [*on(weights), *flags, "--out", str(tmp_path / "runs")]
    commands: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "run": (run_main, run),
        "dry run": (run_main, [*run, "--dry-run"]),
        "study": (run_main, [*run, "--method", "lora", "mage"]),
        "forecast": (run_main, [*run, "--dry-run", "--gpus", "1"]),
        "data check": (main, ["data", "check", str(tmp_path / "data"), "--suite", flags[1], *run[:4]]),
        "doctor": (main, ["doctor", *run[:4], *flags]),
    }
    command, given = commands[how]
    assert command(given) == (1 if how == "doctor" else 2)
    output = capsys.readouterr()
    assert f"reads {'text' if model == 'text' else 'text and image'} and writes text, and cannot do {said}" in (
        " ".join((output.out + output.err).split())
    )
    assert not (tmp_path / "runs").exists()


def test_an_image_in_a_suite_without_images_is_refused_before_training(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write_suite(tmp_path / "suite", tmp_path / "data", TASKS, image=True, **BUDGET)
    for name in TASKS:
        change(tmp_path / "suite" / f"{name}.json", reads=["text"])
    assert run_main([*on(text), *flags, "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "has an image, and Qwen3ForCausalLM reads text alone" in said


def test_the_data_check_asks_the_processor(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2-VL's refuses an image whose one side is over 200 times the other."""
    from PIL import Image

    flags = write_suite(tmp_path / "suite", tmp_path / "data", TASKS, image=True, **BUDGET)
    check = ["data", "check", str(tmp_path / "data"), "--suite", flags[1], *on(qwen)[:4]]
    main(check)
    assert "aspect ratio" not in capsys.readouterr().out
    Image.new("RGB", (2010, 10)).save(tmp_path / "data" / "images" / "Rings.png")
    assert main(check) == 1
    assert "absolute aspect ratio must be smaller than 200" in capsys.readouterr().out
    assert run_main([*on(qwen), *flags, "--out", str(tmp_path / "runs")]) == 2
    assert "names an image that cannot be read" in capsys.readouterr().err


def test_weights_belong_to_a_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tmp_path), "--weights", str(tmp_path)]) == 2
    assert "--weights are those of a --backbone" in capsys.readouterr().err


def broken(folder: Path, tmp_path: Path, change_it: Callable[[Path], None]) -> Path:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    change_it(copy)
    return copy


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return remove


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "no config.json in"),
    "no weights": (without("model.safetensors"), "no weights in"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json or"),
    "no processor": (
        without("processor_config.json", "preprocessor_config.json"),
        "has no preprocessor_config.json or processor_config.json",
    ),
    "no chat template": (without("chat_template.jinja", "chat_template.json"), "has no chat template"),
    "another kind of model": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "vit"})),
        "is of model_type 'vit', which is no decoder",
    ),
    "encoder and decoder": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "t5"})),
        "is of model_type 't5', which is no decoder",
    ),
    "code of its own": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}})
        ),
        "needs Python code of its own, which is not executed here",
    ),
    "an adapter beside it": (
        lambda folder: (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"})),
        "has adapter_config.json, an adapter that transformers applies to the model",
    ),
    "quantized": (
        lambda folder: change(
            folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "is quantized (quantization_config in config.json)",
    ),
    "an unknown type": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "no such"})),
        "cannot be loaded",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not readable JSON"),
    "truncated weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-64]),
        "cannot be loaded",
    ),
    "a missing shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}})
        ),
        "1 are missing: model-1-of-2.safetensors",
    ),
}


@pytest.mark.parametrize(("change_it", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_broken_folders_are_named(change_it: Callable[[Path], None], said: str, qwen: Path, tmp_path: Path) -> None:
    folder = broken(qwen, tmp_path, change_it)
    with pytest.raises(UserError) as caught:
        HuggingFace.load("cpu", folder)
    assert said in str(caught.value)


def write_bert(folder: Path, **options: Any) -> Path:
    """BERT beside the tokenizer of a small Llama."""
    config = transformers.AutoConfig.from_pretrained(write_llama(folder))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name) for name in names}
    made = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=True))
    made.config.is_decoder = options.get("is_decoder", False)
    made.save_pretrained(folder)
    return folder


def test_models_that_read_what_follows_are_refused(tmp_path: Path) -> None:
    """By their configuration before they are loaded, or by what they predict; BERT as a decoder is none of them."""
    bert = write_bert(tmp_path / "bert")
    with pytest.raises(UserError, match="is of model_type 'bert', which is no decoder that writes text"):
        HuggingFace.modalities(bert)
    assert HuggingFace.load("cpu", write_bert(tmp_path / "decoder", is_decoder=True)).targets
    llama = write_llama(tmp_path / "llama")
    for dtype in (torch.float32, torch.bfloat16):
        backbone = HuggingFace.load("cpu", llama, dtype=dtype)
        backbone.model.model.register_forward_pre_hook(both_ways, with_kwargs=True)
        with pytest.raises(UserError, match="LlamaForCausalLM that reads the tokens after the one it predicts"):
            check_causal(llama, backbone.model)


def both_ways(_: object, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With a mask that hides nothing."""
    length = options["input_ids"].shape[1]
    return given, {**options, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool)}


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights given: expected a folder"):
        HuggingFace.check(None)
    with pytest.raises(UserError, match="no folder or file"):
        HuggingFace.check(tmp_path / "nowhere")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"2 \.gguf files in .*, name one of them"):
        HuggingFace.check(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="expected a folder"):
        HuggingFace.check(tmp_path / "weights.bin")


def test_weights_in_shards_are_read(qwen: Path, tmp_path: Path) -> None:
    whole = HuggingFace.load("cpu", qwen)
    whole.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    whole.processor.save_pretrained(tmp_path / "shards")
    files = HuggingFace.check(tmp_path / "shards")
    assert len(files) > 2
    parts = HuggingFace.load("cpu", tmp_path / "shards")
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in parts.state_dict().items())


def test_options_of_loading(qwen: Path, tmp_path: Path) -> None:
    plain = HuggingFace.load("cpu", qwen)
    asked = Sample("", (Turn("what?"),))
    system = HuggingFace.load("cpu", qwen, system="Answer in one word.")
    assert "Be helpful." in plain.chat.question(asked)
    assert "<|im_start|>system\nAnswer in one word.<|im_end|>" in system.chat.question(asked)
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] }}={{ m['content'][-1]['text'] }};{% endfor %}")
    own = HuggingFace.load("cpu", qwen, chat_template=str(file))
    assert own.chat.conversation(Sample("", (Turn("what?", "a ring"),))).text == "user=what?;assistant=a ring</s>"
    assert own.chat.question(asked) == "user=what?;assistant="
    with pytest.raises(UserError, match="expected a file with a Jinja template"):
        HuggingFace.load("cpu", qwen, chat_template=str(tmp_path / "nowhere"))
    file.write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="chat template refuses a conversation"):
        HuggingFace.load("cpu", qwen, chat_template=str(file))
    file.write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(UserError, match="shows 0 of the 1 answers"):
        HuggingFace.load("cpu", qwen, chat_template=str(file))
    for precision in (torch.bfloat16, torch.float64):
        assert {p.dtype for p in HuggingFace.load("cpu", qwen, dtype=precision).parameters()} == {precision}


def test_a_run_is_not_resumed_with_another_chat_template(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, flags = tmp_path / "t.jinja", write_suite(tmp_path / "suite", tmp_path / "data", TASKS, **BUDGET)
    flags += ["--backbone-options", f"chat_template={file}", "--method", "lora", "--out", str(tmp_path / "runs")]
    assert run_main([*on(text), *flags]) == 2
    assert f"chat_template={file}: expected a file" in capsys.readouterr().err
    file.write_text("{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}")
    assert run_main([*on(text), *flags]) == 0
    (config,) = (tmp_path / "runs").rglob("config.json")
    assert json.loads(config.read_text())["code"].keys() == {"backbone_options.chat_template"}
    file.write_text(file.read_text().replace(";", "."))
    assert run_main([*on(text), *flags]) == 2
    assert 'another configuration:\n  code.backbone_options.chat_template: "' in capsys.readouterr().err


def test_connections_train(tmp_path: Path) -> None:
    """By --trainable connections, LLaVA's projector beside the branches."""
    llava = write_llava(tmp_path / "llava")
    flags = write_suite(tmp_path / "suite", tmp_path / "data", TASKS, image=True, **BUDGET)
    flags += ["--trainable", "connections", "--method", "lora", "--out", str(tmp_path / "runs")]
    assert run_main([*on(llava), *flags, "--checkpointing", "True", "--precision", "bfloat16"]) == 0
    (folder,) = [file.parent for file in (tmp_path / "runs").rglob("results.json")]
    before = HuggingFace.load("cpu", llava).connections()
    assert main(["export", str(folder), "--to", str(tmp_path / "merged"), "--format", "merged"]) == 0
    after = HuggingFace.load("cpu", tmp_path / "merged").connections()
    assert (
        before.keys()
        == after.keys()
        == {f"model.model.multi_modal_projector.linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    )
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "hf             Models of transformers that write text" in capsys.readouterr().out


def test_other_backbones_read_and_write_both(tmp_path: Path) -> None:
    for name in ("tiny", "janus", "emu3", "seed-x"):
        assert backbones.load(name).modalities(None) == (("text", "image"), ("text", "image"))


def test_a_plain_template_is_one_line_each(tmp_path: Path) -> None:
    """Of a base model without a chat template."""
    llama = HuggingFace.load("cpu", write_llama(tmp_path / "llama"))
    text, answers = llama.chat.conversation(Sample("", (Turn("what?", "a"), Turn("and?", "b"))))
    assert text == "what?\na</s>\nand?\nb</s>"
    assert [text[begin:end] for begin, end in answers] == ["a</s>", "b</s>"]
    assert not adapters.layers(llama.model)
