"""SEED-X on all six tasks: loss, training with MAGE, features and choice logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from backbones.seed_x.unbatched import TASKS, asked, hidden_of
from torch import Tensor, nn
from torch.nn import functional as F

from cnext import adapters, methods
from cnext.backbones.conversation import IGNORED, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.pretrained import checkpoint_activations
from cnext.backbones.seed_x import placing
from cnext.backbones.seed_x.encoding import SeedXInputs
from cnext.backbones.seed_x.model import SeedX
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.tasks import suites
from cnext.tasks.base import Sample, Turn
from cnext.tasks.left_out import LeftOut
from cnext.tasks.readers import READERS
from cnext.training import evaluation
from cnext.training.setup import check_lengths, load_backbone


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_loss_equals_a_loop_over_samples(loaded: SeedX, encoded: dict[str, list[SeedXInputs]], task: str) -> None:
    """CE + 6 MSE of a padded batch equals that of samples one by one."""
    loss = loaded.loss(encoded[task])
    logits, labels, drawn, wanted = [], [], [], []
    for item in encoded[task]:
        hidden = hidden_of(loaded, item)
        keep = item.labels[1:] != IGNORED
        logits.append(hidden[:-1][keep] @ loaded.llm.lm_head.weight.T)
        labels.append(item.labels[1:][keep])
        if item.target is not None:
            end = item.ids.tolist().index(loaded.tokenizer["</img>"], len(item.ids) - 3)
            drawn.append(loaded.output_resampler(hidden[None, end - 64 : end])[0])
            wanted.append(item.target)
    text = F.cross_entropy(torch.cat(logits), torch.cat(labels))
    image = F.mse_loss(torch.stack(drawn), torch.stack(wanted)) if drawn else torch.zeros(())
    torch.testing.assert_close(loss.text, text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.image, image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.total, text + 6 * image, rtol=1e-4, atol=1e-4)
    assert loaded.supervised(encoded[task]) == (sum(map(len, labels)), len(wanted))
    assert bool(wanted) == (task in ("Flickr30k", "HQEdit"))


def test_targets_are_pooled_features_of_the_whole_image(
    loaded: SeedX, tasks: dict[str, list[Sample]], encoded: dict[str, list[SeedXInputs]]
) -> None:
    from PIL import Image

    for sample, item in zip(tasks["HQEdit"], encoded["HQEdit"], strict=True):
        pixels = numpy.array(Image.open(sample.target_image).resize((448, 448)))
        features = loaded.vit.features(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        torch.testing.assert_close(item.target, F.avg_pool1d(features.mT, 4, 4).mT[0])
        assert item.centres.tolist() == [[0.5, 0.5]] * 2, "an image to edit is not cut into tiles"
    assert [len(item.centres) for item in encoded["VQAv2"]] == [3, 2]


def test_prepared_samples_are_pixels_and_can_be_pickled(loaded: SeedX, tasks: dict[str, list[Sample]]) -> None:
    import pickle

    prepared = [loaded.prepare(sample) for samples in tasks.values() for sample in samples]
    assert {item.features.dtype for item in prepared if item.features is not None} == {torch.uint8}
    sent = pickle.loads(pickle.dumps(prepared))
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(sent, prepared, strict=True))
    assert len(pickle.dumps(loaded.tokenizer)) > 0


@pytest.mark.parametrize("task", TASKS)
def test_mage_trains_its_roles(fresh: SeedX, encoded: dict[str, list[SeedXInputs]], task: str) -> None:
    """Gradients reach the task's branches and the connections it uses, and are the same with checkpointing."""
    suite = suites.load("continual-next")
    method = methods.load("mage-paper")(dropout=0.0)
    method.setup(fresh, [suite.task(name) for name in TASKS], torch.Generator().manual_seed(0))
    trained = method.trainable(suite.task(task)) | {n: p.requires_grad_() for n, p in fresh.connections().items()}
    for name, parameter in trained.items():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.01)

    def gradients() -> dict[str, Tensor]:
        fresh.zero_grad()
        fresh.loss(encoded[task]).total.backward()
        return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}

    found = gradients()
    unused = {"Flickr30k": ("input_resampler", "patch"), "HQEdit": ()}.get(task, ("output_resampler",))
    assert trained.keys() - found.keys() == {name for name in trained if unused and name.startswith(unused)}
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if "attn.in_proj_bias" not in name)
    fresh.train()
    checkpoint_activations(fresh.llm)
    again = gradients()
    assert again.keys() == found.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-4, atol=1e-5)


def test_bfloat16_under_autocast_with_float32_connections(
    folder: Path, loaded: SeedX, tasks: dict[str, list[Sample]], encoded: dict[str, list[SeedXInputs]]
) -> None:
    """As a run in bfloat16: the frozen model in it, what is trained in float32."""
    model = SeedX.load(weights=folder, dtype=torch.bfloat16, checkpointing=True, steps=1)
    expected = loaded.loss(encoded["HQEdit"])
    adapters.attach(model.language_model, model.targets, {"lora": 4}, dropout=0.05)
    trained = model.connections() | model.released_extras() | adapters.branch_parameters(model.language_model)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(model.encode(tasks["HQEdit"]))
    loss.total.backward()
    torch.testing.assert_close(loss.total, expected.total, rtol=0.05, atol=0.05)
    assert all(parameter.grad is not None for parameter in trained.values())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate([asked(tasks["HQEdit"][0])], 3)) == 1


@torch.no_grad()
def test_question_features_are_the_last_state_of_the_instruction(
    loaded: SeedX, tasks: dict[str, list[Sample]], encoded: dict[str, list[SeedXInputs]]
) -> None:
    for task in ("VQAv2", "Flickr30k", "HQEdit"):
        found = loaded.question_features(encoded[task])
        for sample, features in zip(tasks[task], found, strict=True):
            item = loaded.encode([asked(sample)])[0]
            assert item.ids[-1] == 2
            bare = replace(item, ids=item.ids[:-1])
            torch.testing.assert_close(features, hidden_of(loaded, bare)[-1], rtol=1e-3, atol=1e-4)
    assert loaded.positions[0].tolist().count(TEXT_WRITTEN) == 1
    assert loaded.positions[0, 0] == TEXT_READ
    assert loaded.question_features([]).shape == (0, 64)


@torch.no_grad()
def test_choice_logits_compare_the_first_difference(loaded: SeedX, tasks: dict[str, list[Sample]]) -> None:
    samples = [asked(sample) for sample in tasks["VQAv2"]]
    words = ["A", "B"]
    tokens = [loaded.tokenizer.encode(word) for word in words]
    place = next(number for number, pair in enumerate(zip(*tokens, strict=True)) if len(set(pair)) > 1)
    found = loaded.choice_logits(samples, words)
    for sample, logits in zip(samples, found, strict=True):
        item = loaded.encode([sample])[0].question
        longer = replace(item, ids=torch.cat([item.ids, torch.tensor(tokens[0][:place], dtype=torch.long)]))
        every = loaded.llm.lm_head(hidden_of(loaded, longer)[-1])
        expected = every[[one[place] for one in tokens]]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_device_map_hooks_and_adapters_change_nothing(
    folder: Path, loaded: SeedX, encoded: dict[str, list[SeedXInputs]]
) -> None:
    """One device cannot show the moving between devices, but that the hooks which do it and the adapters agree."""
    from accelerate import dispatch_model

    expected = loaded.loss(encoded["HQEdit"]).total
    model = SeedX.load(weights=folder, device_map="auto")
    dispatch_model(model.llm.model, {"": "cpu"}, force_hooks=True)
    adapters.attach(model.language_model, model.targets, {"lora": 4})
    torch.testing.assert_close(model.loss(encoded["HQEdit"]).total, expected)
    spread = {"embed_tokens": 1, "layers.0": 0, "layers.1": "cpu", "norm": 1}
    assert placing.device_of("layers.1.mlp.up_proj.weight", spread, torch.device("meta")).type == "cpu"
    assert placing.device_of("layers.10.mlp.up_proj.weight", spread, torch.device("meta")).type == "meta"


def test_an_image_to_edit_is_not_tiled_in_tests(loaded: SeedX, tasks: dict[str, list[Sample]]) -> None:
    sample = tasks["HQEdit"][0]
    row = {"source_image": sample.image.name, "target_image": sample.target_image.name, "instruction": "red"}
    read = READERS["editing"](row, sample.image.parent, "1", "")
    assert len(loaded.prepare(evaluation.question(read)).centres) == 2
    assert len(loaded.prepare(replace(evaluation.question(read), tiled=True)).centres) == 3


def test_a_run_that_writes_images_needs_the_detokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("seed_x_i", "QwenViT"):
        (tmp_path / name).symlink_to(folder / name)
    planned = plan(RunConfig(backbone="seed-x", weights=tmp_path, device="cpu"))
    with (
        pytest.warns(UserWarning, match="de-tokenizer"),
        pytest.raises(UserError, match="seed_detokenizer/first_stage"),
    ):
        load_backbone(planned)
    with pytest.warns(UserWarning, match="de-tokenizer"):
        load_backbone(replace(planned, order=("VQAv2",)))


def test_samples_are_left_out_by_their_length_as_released(fresh: SeedX, tasks: dict[str, list[Sample]]) -> None:
    """All tokens count, the first and the last too; of training samples alone, and only where the task says so."""
    for name, (sample, *_) in tasks.items():
        first, *more = sample.turns
        long = replace(sample, turns=(Turn(f"{first.instruction} it", first.answer), *more))
        limit = fresh.length(long)
        assert len(fresh.prepare(sample).ids) == fresh.length(sample) < limit == len(fresh.prepare(long).ids)
        left, samples = LeftOut(), {"train": {name: [sample, long]}, "test": {name: [long]}}
        kept = check_lengths(fresh, samples, left=left, limits={name: limit})
        assert kept == {"train": {name: [sample]}, "test": {name: [long]}}
        assert left.rows == {name: {"train": {"length, as released": [f": {limit} tokens"]}}}
        assert check_lengths(fresh, samples, limits={name: 0}) == samples
        fresh.max_length = limit - 10
        assert fresh.length(long) == limit, "it is not that of the truncated sequence"
        fresh.max_length = 880


def test_too_long_samples_are_found_without_decoding(fresh: SeedX, tasks: dict[str, list[Sample]]) -> None:
    """At the limit to the token, for tiled images, whole ones and images that are written."""

    def fits(ask: Callable[[Sample], object], sample: Sample, length: int) -> bool:
        fresh.max_length = length
        try:
            ask(sample)
        except UserError as error:
            return "file.json#3: expected less than" not in str(error)
        return True

    for sample in (replace(one, origin="file.json#3") for listed in tasks.values() for one in listed):
        least = next(length for length in range(1000) if fits(fresh.check_length, sample, length))
        assert least > 10
        assert fits(fresh.prepare, sample, least)
        assert not fits(fresh.prepare, sample, least - 1)
        assert fits(fresh.check_length, Sample("", (Turn("what? " * 500),), sample.image), 40)
