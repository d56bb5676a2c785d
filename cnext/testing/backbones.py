"""The contract of backbones: what is frozen, encoded, lost and generated, and on what that may depend."""

from __future__ import annotations

import inspect
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext import backbones, methods
from cnext.backbones.base import Backbone, Output
from cnext.errors import UserError, listed
from cnext.scoring.base import Prediction
from cnext.tasks import formats, suites, synthetic
from cnext.tasks.base import Sample, Turn
from cnext.testing.sequence import TEST, TRAIN

CLOSE = 1e-3
"""Largest difference, relative to the largest value, that padding may make in float32."""
NEW_TOKENS = 6
ROLES = ("text read", "image read", "text written", "image written")
"""What positions are for, by their number in ``Backbone.positions``."""


@dataclass(frozen=True)
class Material:
    """What the checks work on.

    make: gives a fresh backbone.  samples: three of each kind that it can learn, by "text", "read", "write", "edit".
    """

    make: Callable[[], Backbone]
    samples: dict[str, list[Sample]]

    @property
    def mixed(self) -> list[Sample]:
        """One sample of each kind."""
        return [each[0] for each in self.samples.values()]


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return found.shape == expected.shape and float((found - expected).abs().max() if scale else 0.0) <= CLOSE * scale


def _blind(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with other answers and without target images."""
    return [replace(s, turns=(Turn(s.turns[0].instruction, "no"),), target_image=None, references=()) for s in samples]


def is_frozen_and_takes_branches(material: Material) -> None:
    """`load` returns a frozen model in evaluation mode, of whose language model ``targets`` are linear layers."""
    backbone = material.make()
    free = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert not free, f"`load` must freeze every parameter; these require a gradient: {listed(free)}"
    training = [name for name, module in backbone.named_modules() if module.training]
    assert not training, f"`load` must return the model in evaluation mode; in training mode: {listed(training)}"
    names = {name for name, module in backbone.language_model.named_modules() if isinstance(module, torch.nn.Linear)}
    lacking = [target for target in backbone.targets if not any(name.endswith(target) for name in names)]
    assert not lacking, f"`targets` name no linear layers of `language_model`: {listed(lacking)}; {listed(names)}"


def prepares_for_other_processes(material: Material) -> None:
    """What `prepare` returns can be pickled, and is encoded as before."""
    backbone = material.make()
    prepared = [backbone.prepare(sample) for sample in material.mixed]
    sent = pickle.loads(pickle.dumps(prepared))
    one, other = (backbone.output(backbone.encode_prepared(each)) for each in (prepared, sent))
    assert torch.equal(one.logits, other.logits), "samples that were pickled after `prepare` give another output"


def pads_without_effect(material: Material) -> None:
    """The output of a batch is that of its samples one by one."""
    backbone = material.make()
    encoded = backbone.encode(material.mixed)
    together, alone = backbone.output(encoded), [backbone.output([item]) for item in encoded]
    for name in ("logits", "labels", "image_pred", "image_target"):
        expected = torch.cat(
            [getattr(each, name) for each in alone if len(getattr(each, name))] or [together.labels[:0]]
        )
        found = getattr(together, name)
        assert len(found) == len(expected), f"`output` of a batch has {len(found)} {name}, one by one {len(expected)}"
        assert not len(found) or _close(found.double(), expected.double()), (
            f"{name} of a batch differ from those of its samples one by one; padding must have no effect"
        )


def _check_output(output: Output, counts: tuple[int, int], kind: str) -> None:
    tokens, images = len(output.labels), len(output.image_pred)
    assert output.logits.dtype == torch.float32, f"logits must be float32, got {output.logits.dtype}"
    assert output.labels.dtype == torch.int64, f"labels must be int64, got {output.labels.dtype}"
    assert output.logits.shape[:1] == output.labels.shape, (
        f"`output` has logits {tuple(output.logits.shape)} for labels {tuple(output.labels.shape)}"
    )
    assert counts == (tokens, images), f"`supervised` says {counts} for {kind}, `output` has {(tokens, images)}"
    assert bool(images) == (kind in ("write", "edit")), f"`output` has {images} images written, for samples of {kind}"


def counts_and_weighs_its_loss(material: Material) -> None:
    """`supervised` counts what `output` has, and the losses of a batch's parts add up to the batch's."""
    backbone = material.make()
    for kind, samples in material.samples.items():
        encoded = backbone.encode(samples)
        whole = backbone.supervised(encoded)
        _check_output(backbone.output(encoded), whole, kind)
        loss = backbone.loss(encoded)
        assert torch.isfinite(loss.total), f"the loss of {kind} must be finite, it is {loss}"
        parts = sum(backbone.loss(part, whole).total for part in (encoded[:1], encoded[1:]))
        assert _close(torch.as_tensor(parts), loss.total), (
            f"the losses of a batch's parts add up to {float(parts)}, and not to the batch's {float(loss.total)}"
        )


def gives_gradients_to_branches_alone(material: Material) -> None:
    """With MAGE's branches, a backward pass reaches the branches that a task trains, and no frozen parameter."""
    for kind, samples in material.samples.items():
        backbone, mage = material.make(), methods.load("mage-paper")()
        reads = ("text", "image") if kind in ("read", "edit") else ("text",)
        writes = ("image",) if kind in ("write", "edit") else ("text",)
        task = replace(suites.load("next-tiny").tasks[0], reads=reads, writes=writes)
        mage.setup(backbone, [task], torch.Generator().manual_seed(0))
        trained = mage.trainable(task)
        backbone.train()
        backbone.loss(backbone.encode(samples)).total.backward()
        missed = [n for n, p in trained.items() if n.endswith(".B") and (p.grad is None or not p.grad.any())]
        assert not missed, f"a backward pass of {kind} gives no gradient to {listed(missed)}"
        added = {id(parameter) for parameter in mage.adapter_parameters().values()}
        frozen = [n for n, p in backbone.named_parameters() if id(p) not in added and p.grad is not None]
        assert not frozen, f"a backward pass of {kind} gives a gradient to frozen parameters: {listed(frozen)}"


def says_what_positions_are_for(material: Material) -> None:
    """``positions`` has a role for each position of every forward pass of training, in a new tensor."""
    backbone, seen = material.make(), []
    hook = backbone.language_model.register_forward_pre_hook(lambda *_: seen.append(backbone.positions))
    for kind, samples in material.samples.items():
        seen.clear()
        backbone.output(backbone.encode(samples))
        found = seen[-1] if seen else None
        assert isinstance(found, Tensor), f"`positions` must be set before `language_model` is called, it is {found!r}"
        form = (found.dtype, found.ndim, len(found))
        assert form == (torch.int64, 2, len(samples)), (
            f"`positions` must be int64 of shape (batch, length), got {found.dtype}, {tuple(found.shape)}"
        )
        strange = {*found.unique().tolist()} - {*range(len(ROLES))}
        assert not strange, f"`positions` must be from 0 to {len(ROLES) - 1}, got {listed(map(str, strange))}"
        expected = {"text": {0, 2}, "read": {0, 1, 2}, "write": {0, 3}, "edit": {0, 1, 3}}[kind]
        lacking = expected - {*found.unique().tolist()}
        named = [f"{role} ({ROLES[role]})" for role in sorted(lacking)]
        assert not lacking, f"`positions` of {kind} lack {listed(named)}"
    hook.remove()


def answers_by_the_question_alone(material: Material) -> None:
    """`generate` gives an answer per sample, the same each time, in any batch, and whatever the reference answer is."""
    backbone = material.make()
    asked = material.mixed
    answers = backbone.generate(asked, NEW_TOKENS)
    kinds = [type(one) for one in answers]
    assert kinds == [Prediction] * len(asked), f"`generate` must return a Prediction per sample, got {answers!r}"
    for answer in answers:
        image = answer.image
        form = None if image is None else (image.dtype.name, image.ndim, image.shape[-1])
        assert form in (None, ("uint8", 3, 3)), f"an image must be (H, W, 3) uint8, it is {form}"
    for what, others in {
        "a second time": backbone.generate(asked, NEW_TOKENS),
        "without their reference answers and target images": backbone.generate(_blind(asked), NEW_TOKENS),
        "one by one": [backbone.generate([sample], NEW_TOKENS)[0] for sample in asked],
    }.items():
        one, other = ([(answer.text, answer.image is None) for answer in each] for each in (answers, others))
        assert one == other, f"the samples are answered {one}, and {other} {what}"
    assert backbone.generate([], NEW_TOKENS) == [], "`generate` of no samples must return []"


def describes_questions_without_their_answers(material: Material) -> None:
    """`question_features`, `question_means` and `choice_logits` have a row per sample, and read neither answers nor
    target images."""
    backbone = material.make()
    for kind, samples in material.samples.items():
        found = backbone.question_features(backbone.encode(samples))
        assert (found.ndim, len(found)) == (2, len(samples)), (
            f"`question_features` must be (samples, hidden), got {tuple(found.shape)}"
        )
        assert torch.isfinite(found).all(), f"`question_features` of {kind} are not finite"
        blind = backbone.question_features(backbone.encode(_blind(samples)))
        assert _close(found, blind), f"`question_features` of {kind} depend on the answers"
        means = backbone.question_means(backbone.encode(samples))
        assert means.shape == found.shape, f"`question_means` must be {tuple(found.shape)}, got {tuple(means.shape)}"
        assert _close(means, backbone.question_means(backbone.encode(_blind(samples)))), (
            f"`question_means` of {kind} depend on the answers"
        )
        logits = backbone.choice_logits(samples, ["a", "b"])
        assert logits.shape == (len(samples), 2), f"`choice_logits` must be (samples, 2), got {tuple(logits.shape)}"
        assert _close(logits, backbone.choice_logits(_blind(samples), ["a", "b"])), (
            f"`choice_logits` of {kind} depend on the samples' own answers"
        )
    empty = backbone.question_features([])
    assert empty.shape == (0, found.shape[1]), f"`question_features` of no samples must be (0, hidden), {empty.shape}"


def states_its_needs(material: Material) -> None:
    """`check_length` takes what `prepare` takes."""
    backbone = material.make()
    for sample in material.mixed:
        backbone.check_length(sample)


BACKBONE_CHECKS: dict[str, Callable[[Material], None]] = {
    check.__name__: check
    for check in (
        is_frozen_and_takes_branches,
        prepares_for_other_processes,
        pads_without_effect,
        counts_and_weighs_its_loss,
        gives_gradients_to_branches_alone,
        says_what_positions_are_for,
        answers_by_the_question_alone,
        describes_questions_without_their_answers,
        states_its_needs,
    )
}
"""The checks of `check_backbone` by name: functions of a `Material`."""


def material(
    backbone: str | type, data: Path, weights: Path | None = None, kinds: Sequence[str] | None = None, **options: Any
) -> Material:
    """What the checks of a backbone work on. Arguments: as of `check_backbone`; data: a folder with next-tiny."""
    kind: Any = backbones.load(backbone) if isinstance(backbone, str) else backbone
    if inspect.isabstract(kind):
        lacking = listed(sorted(kind.__abstractmethods__))
        raise AssertionError(f"{kind.__name__} lacks members of cnext.backbones.base.Backbone: {lacking}")
    assert isinstance(getattr(kind, "name", None), str), f"{kind.__name__} must have its registered name as `name`"

    def of(task: str) -> list[Sample]:
        return formats.read_samples(suites.load("next-tiny").task(task), data, "train")[:3]

    every = {
        "text": [replace(sample, image=None) for sample in of("VQAv2")],
        "read": of("VQAv2"),
        "write": of("Flickr30k"),
        "edit": of("HQEdit"),
    }
    reads, writes = kind.modalities(weights)
    draws = "image" in writes and not kind.missing_to_draw(weights)
    answers, sees = "text" in writes, "image" in reads
    possible = {"text": answers, "read": answers and sees, "write": draws, "edit": draws and sees}
    kinds = kinds or [name for name, able in possible.items() if able]
    if unknown := {*kinds} - every.keys():
        raise UserError(f"unknown kinds of samples: {listed(sorted(unknown))}; valid: {', '.join(every)}")
    return Material(lambda: kind.load("cpu", weights, **options), {name: every[name] for name in kinds})


def check_backbone(
    backbone: str | type, weights: Path | None = None, kinds: Sequence[str] | None = None, **options: Any
) -> None:
    """Checks that a backbone keeps the contract of backbones, in float32 on the CPU. Use weights of a small model.

    It is frozen, pads without effect, answers by the question alone, counts and weighs its loss, gives gradients to
    branches alone, and says what each position is for. Seconds for a small random model.

    Args:
        backbone: its class, or the name that `cnext list` shows.
        weights: as of ``Backbone.load``.
        kinds: of samples that it can learn: "text" (text alone), "read" (with an image), "write" (an image of a
            caption), "edit" (an image of an image). None: all that ``missing_to_draw`` allows.
        options: of ``Backbone.load``.

    Raises:
        AssertionError: says what was expected, what came, and what to do.
        UserError: an unknown name, or weights that are missing or cannot be read.

    Example:
        >>> from cnext.testing import check_backbone
        >>> check_backbone("tiny")
    """
    with tempfile.TemporaryDirectory() as scratch:
        data = synthetic.write_next_tiny(Path(scratch) / "data", TRAIN, TEST)
        made = material(backbone, data, weights, kinds, **options)
        for check in BACKBONE_CHECKS.values():
            check(made)
