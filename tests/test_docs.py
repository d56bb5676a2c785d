"""The README and the documentation: commands parse, names and paths exist, and the README's recipes run."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from cnext import cli
from cnext.studies import flags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHERS = ("torchrun", "accelerate")
GROUPS = {"cnext.scorers", "cnext.readers"}
"""Groups of entry points that are no modules as well."""


def recipe(heading: str, language: str) -> str:
    """The code block in a language under a heading of the README."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    [block] = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return block


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ``cnext`` in a page's code, without placeholders."""
    text = page.read_text(encoding="utf-8")
    code = [*re.findall(r"`(cnext[^`]*)`", text), *re.findall(r"^(?:    |\$ )?(\w.*)$", text, re.MULTILINE)]
    found = []
    for command in [part.strip() for line in code for part in line.split("&&")]:
        if re.match(rf"(cnext|cnext-run|({'|'.join(LAUNCHERS)}) .*-m cnext run)( |$)", command):
            words = [word for word in shlex.split(command, comments=True) if word != "..."]
            found.append(words[words.index("-m") + 1 :] if words[0] in LAUNCHERS else words)
    return found


@pytest.fixture
def methods_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's method and the example, as pip would install them."""
    sources = {"decay": recipe("Your method", "python")}
    sources["l2_lora"] = (ROOT / "cnext/example_method/l2_lora.py").read_text(encoding="utf-8")
    for module, source in sources.items():
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        metadata = tmp_path / f"{module}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[cnext.methods]\n{module.replace('_', '-')} = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


class Parsed(Exception):
    """A command's arguments are valid."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path, methods_of_the_docs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(flags, "read", lambda path, kinds: flags.Settings())  # files of settings are the reader's

    def only_parse(parser: argparse.ArgumentParser, words: list[str]) -> None:
        parse(parser, words)
        raise Parsed

    for program, *words in commands(page):
        if {"--version", "--help", "--help-all"} & {*words} or not words:
            continue
        if program == "cnext-run" or words[0] == "run":
            flags.parse(words[program == "cnext" :])
            continue
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        if len(words) == 1 and words[0] not in ("list", "doctor"):  # the text names a command
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main([*words, "--help"])
        else:
            with pytest.raises(Parsed):
                cli.main(words)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def test_names_resolve() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in {*re.findall(r"(?<![\w/.-])cnext(?:\.\w+)+", text)} - GROUPS:
        parts = name.split(".")
        place = importlib.import_module("cnext")
        for number, part in enumerate(parts[1:], 2):
            if not hasattr(place, part):
                importlib.import_module(".".join(parts[:number]))
            place = getattr(place, part)


def test_flags_exist() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    code = "".join(
        file.read_text(encoding="utf-8") for folder in ("cnext", "bench") for file in (ROOT / folder).rglob("*.py")
    )
    named = {flag.rpartition(".")[2] for flag in re.findall(r"`--([a-z][\w.-]+)", text)} - {"help"}
    assert not [flag for flag in named if f'("--{flag}"' not in code and f"    {flag.replace('-', '_')}: " not in code]


def test_paths_exist() -> None:
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`((?:bench|cnext|csrc|docs|kernels|results|tests|\.ci)/[\w./-]*)`", text)
        linked = re.findall(r"\]\((?!https?:)([\w./-]+)", text)
        missing += [path for path in named if not (ROOT / path).exists()]
        missing += [path for path in linked if not (page.parent / path).exists()]
    assert not missing


def test_the_settings_file_of_the_docs_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/tracking.md").read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "mine.yaml"
    file.write_text(f"{block}out: {tmp_path}\n", encoding="utf-8")
    assert cli.main(["validate", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: 6 runs\n")


def test_the_recipe_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = re.split(r"^// ([\w/.]+).*\n", recipe("Your data", "json"), flags=re.MULTILINE)[1:]
    files = dict(zip(parts[::2], map(json.loads, parts[1::2]), strict=True))
    suite, photos, rows = (files[name] for name in ("birds/suite.json", "birds/Photos.json", "data/Photos/train.json"))
    suite["budgets"]["default"]["steps"] = dict.fromkeys(suite["tasks"], 1)
    Path("birds").mkdir()
    Path("birds/suite.json").write_text(json.dumps(suite))
    for number, task in enumerate(suite["tasks"]):
        manifest = json.loads(json.dumps(photos).replace("Photos", task))
        Path(f"birds/{task}.json").write_text(json.dumps(manifest))
        for split in ("train", "test"):
            Image.new("RGB", (16, 16), (90 * number, 0, len(split))).save(tmp_path / f"{task}-{split}.png")
            file = Path("data", manifest[split])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([row | {"image": f"{task}-{split}.png"} for row in rows]))
    images = Path("data", photos["train_images"])
    images.mkdir()
    for image in tmp_path.glob("*.png"):
        image.rename(images / image.name)
    check, run = recipe("Your data", "sh").splitlines()
    assert cli.main(shlex.split(check, comments=True)[1:]) == 0
    assert cli.run_main(shlex.split(run)[1:]) == 0
    scores = [json.loads(file.read_text())["score_matrix"] for file in Path("runs").glob("*/*/seed-0/results.json")]
    assert [len(matrix) for matrix in scores] == [2, 2]


def test_the_recipe_of_a_model() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    ids = torch.randint(20, (2, 5))
    before = model.eval()(ids).logits
    task = [{"input_ids": ids, "labels": ids}] * 2
    names = {"model": model, "tasks": [task, task]}
    exec(recipe("Your model", "python"), names)
    model.eval()
    merged = model(ids).logits
    assert not torch.allclose(merged, before)
    names["branches"].unmerge()
    torch.testing.assert_close(model(ids).logits, merged)
    assert torch.equal(names["branches"].detach()(ids).logits, before)


def test_the_recipe_of_a_method(
    methods_of_the_docs: None, toy_suite: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [compare] = re.findall(r"`(cnext-run --method lora decay [^`]+)`", README)
    given = ["--order", "VQAv2", "--suite", str(toy_suite), "--data", str(data), "--out", str(tmp_path / "runs")]
    assert cli.run_main([*shlex.split(compare)[1:], *given]) == 0
    shown = capsys.readouterr().out
    assert "decay" in shown
    assert "lora" in shown
