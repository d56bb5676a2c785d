"""The README and the documentation: commands parse, names and links resolve, and the README's recipes run."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from cnext import cli
from cnext.studies import flags

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^(?:    |\$ )?((?:torchrun|accelerate launch|cnext|cnext-run) .*)$|`(cnext(?:-run)? [^`]+)`", re.M)
FOLDERS = "bench|cnext|csrc|docs|kernels|results|tests"


def pages(test: Any) -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def commands(page: Path) -> list[list[str]]:
    """The words of every ``cnext`` and ``cnext-run`` command of a page, those behind a launcher included."""
    found = []
    for line in COMMAND.findall(page.read_text(encoding="utf-8")):
        words = [word for word in shlex.split("".join(line), comments=True) if word != "..."]
        if "-m" in words:
            words = words[words.index("-m") + 1 :]
        found.append(["cnext-run", *words[2:]] if words[:2] == ["cnext", "run"] else words)
    return found


class Parsed(Exception):
    pass


@pages
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, words: list[str]) -> None:
        parse(parser, words)
        raise Parsed

    monkeypatch.setattr("cnext.methods.modules", functools.partial(dict, importlib.import_module("cnext.methods").modules()))
    for program, *words in commands(page):
        words = ["lora" if word in ("decay", "l2-lora", "NAME") else word for word in words]
        if program == "cnext-run":
            assert flags.parse([word for word in words if not word.startswith("--decay") and word != "0.01"])
        elif words[0] not in ("--version", "--help"):
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                cli.main(words)
