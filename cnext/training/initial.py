"""What a run starts from, ``--init-from``: read, checked against the run, and put in place of the pretrained state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.adapters import exchange, exchange_authors, exchange_files, exchange_peft
from cnext.adapters.exchange import Branches
from cnext.adapters.exchange_authors import LANGUAGE_MODEL
from cnext.adapters.logit_check import Reference, deviation
from cnext.adapters.saving import ALIKE, REFERENCE, SAME
from cnext.backbones.base import Backbone, outer_model
from cnext.config import init_source
from cnext.config.init_source import InitSource
from cnext.config.plan import Plan
from cnext.errors import UserError, listed
from cnext.methods.base import Method
from cnext.runs import checkpoint, checkpoint_fit, results_file, schemas
from cnext.runs.checkpoint import EXTRAS
from cnext.tasks.base import Task, stand_in
from cnext.training import merged_model
from cnext.training.precision import autocast

BESIDE = "backbone."
"""Begins the names of what is trained beside the method's parameters."""


@dataclass
class Initial:
    """The state that a run starts from.

    Attributes:
        tensors: values of saved parameters, by name.
        state: of the method; None where there is none.
        notes: what the user should know of it.
        merged: folder of the model whose weights replace the frozen ones; None: these are as pretrained.
        source: of the tensors, for messages.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)
    merged: Path | None = None
    source: Path = Path()

    def put_merged(self, backbone: Backbone) -> None:
        """Replaces the frozen weights, and what is trained beside the branches. Saved values are put after it."""
        if self.merged is not None:
            merged_model.put(self.merged, backbone)

    def compare_merged(self, backbone: Backbone, precision: str) -> None:
        """Compares with the reference logits of the merged model, while all branches are zero.

        Raises:
            UserError: they differ, so that it is for another backbone, or was changed.
        """
        if self.merged is not None:
            try:
                _compare_logits(self.merged, backbone, precision)
            except UserError as error:
                raise UserError(f"--init-from {self.merged}: {error}") from error

    @torch.no_grad()
    def put(self, parameters: Mapping[str, nn.Parameter], method: Method) -> None:
        """Replaces the values of parameters and the method's state."""
        for name, tensor in self.tensors.items():
            parameters[name].copy_(tensor)
        if self.state is not None:
            checkpoint_fit.restore(self.source, method, self.state)


def tasks_of(planned: Plan) -> list[Task]:
    """The tasks that the method is set up for: the run's, or where nothing is trained those of the source's."""
    source = planned.source
    if source is not None and source.run is not None and source.run.tasks and not planned.trains:
        return [stand_in(name) for name in source.run.tasks]
    return [planned.suite.task(name) for name in planned.order]


def read(planned: Plan, backbone: Backbone, method: Method, parameters: Mapping[str, nn.Parameter]) -> Initial | None:
    """What a run starts from, None for the pretrained state. Nothing is changed.

    Args:
        parameters: all that a checkpoint stores, by name.

    Raises:
        UserError: it cannot be read or does not fit the run; says what does not.
    """
    source = planned.source
    if source is None:
        return None
    try:
        _check_method(planned, source, method)
        load = _of_adapter if source.run is None else _of_run
        initial = Initial({}) if source.kind == "merged" else load(planned, source, backbone, method)
        if source.merged is not None:
            initial.merged = Path(source.merged.path)
            initial.notes += merged_model.check(initial.merged, backbone)
        if source.kind != "merged":
            _check_names(initial.tensors, parameters, planned, backbone)
        if source.kind in ("peft", "released"):
            with adapters.holding(parameters, initial.tensors):
                _compare_logits(source.path, backbone, planned.recipe.precision)
    except UserError as error:
        raise UserError(f"--init-from {planned.config.init_from}: {error}") from error
    initial.notes += _notes(planned, source, method, parameters, initial.tensors)
    return initial


def _check_method(planned: Plan, source: InitSource, method: Method) -> None:
    name, given = planned.config.method, planned.config.init_tasks
    if source.kind == "merged" and not planned.trains:
        return
    if not method.adapter_parameters():
        raise UserError(f"{name} trains nothing and can start from nothing; leave --init-from out")
    if method.by_task and source.run is None:
        there = "merged model" if source.kind == "merged" else "adapter file"
        raise UserError(f"{name} has parts for each task, which no {there} holds; give the folder of a run of it")
    if source.run is None or not planned.trains:
        unseen = [task for task in planned.order if task not in source.learnt]
        if method.card.task_id_at_test and source.run is not None and unseen:
            raise UserError(f"{name} is told the task at test, and has not learnt {', '.join(unseen)}")
        return
    if method.by_task and len(source.run.tasks) != len(planned.order):
        there, here = len(source.run.tasks), len(planned.order)
        raise UserError(f"{name} has parts for each task: {there} there, {here} here; give an order of as many tasks")
    if method.by_task and source.learnt != given:
        learnt = " ".join(source.learnt) or "none"
        raise UserError(f"{name} has parts for each task, and this run of it has learnt {learnt}: give --init-tasks so")


def _of_run(planned: Plan, source: InitSource, backbone: Backbone, method: Method) -> Initial:
    tensors, values = checkpoint.load(source.path)
    results_file.check_stage(source.path, values)
    extras: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.get(EXTRAS, {}).items():
        kind, _, name = key.partition(".")
        extras.setdefault(kind, {})[name] = tensor
    return Initial(tensors["adapters"] | dict(_named(backbone, extras)), tensors["method"], source=source.path)


def _of_adapter(planned: Plan, source: InitSource, backbone: Backbone, method: Method) -> Initial:
    outer, name = outer_model(backbone), planned.config.method
    if not adapters.layers(outer):
        raise UserError(f"{name} has no low-rank branches, and no adapter file holds what it trains; give a run of it")
    own, peft, zero = exchange.branches_of(outer), source.kind == "peft", []
    if peft:
        exchange.refuse_routed(outer, "a PEFT adapter")
    found, _ = exchange_files.read(source.path, "lora" if peft else exchange_authors.kind_of(outer))
    branches = found.branches
    _check_branches(branches, own, name)
    if peft:
        zero = exchange_peft.layers_without(source.path, branches, adapters.layers(outer))
        branches = exchange.with_zero_branches(outer, branches, zero)
    pairs = [*exchange.fitted(outer, branches), *exchange_authors.fitted_routers(outer, found.routers)]
    names = {id(parameter): label for label, parameter in method.adapter_parameters().items()}
    tensors = {names[id(parameter)]: tensor for parameter, tensor in pairs}
    notes = [f"it is not for {len(zero)} layers, whose branches are zero: {listed(zero)}"] if zero else []
    return Initial(tensors | dict(_named(backbone, found.extras)), None, notes)


def _check_branches(found: Branches, own: Branches, method: str) -> None:
    if found.ranks != own.ranks:
        there, here = (", ".join(f"{name} (rank {rank})" for name, rank in each.ranks.items()) for each in (found, own))
        raise UserError(f"it has branches {there}; {method} has {here}: set its rank, or choose another --method")
    if not math.isclose(found.scale, own.scale, rel_tol=1e-6):
        raise UserError(
            f"its scale is {found.scale:g}, here it is {own.scale:g}; give --{method}.scale {found.scale:g}"
        )


def _named(backbone: Backbone, extras: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Extra tensors of a file, see `exchange_authors.Released`, with the names that checkpoints have for them."""
    if not extras:
        return
    own = {id(parameter): name for name, parameter in backbone.named_parameters()}
    inside = dict(outer_model(backbone).named_parameters())
    for kind, part in extras.items():
        for name, tensor in part.items():
            parameter = inside.get(name) if kind in LANGUAGE_MODEL else None
            yield f"{BESIDE}{name if parameter is None else own[id(parameter)]}", tensor


def _check_names(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], planned: Plan, backbone: Backbone
) -> None:
    """Raises UserError for tensors that the run does not train or has not, and for parameters of the method without."""
    strange = sorted(name for name in tensors if name not in parameters)
    known = {f"{BESIDE}{name}" for name, _ in backbone.named_parameters()}
    frozen = [name.removeprefix(BESIDE) for name in strange if name in known]
    problems = []
    if frozen:
        problems.append(
            f"it has layers that the run does not train ({planned.recipe.trainable}): {listed(frozen)}; give "
            "--trainable connections or released"
        )
    if unknown := [name for name in strange if name not in known]:
        problems.append(f"the run has no {listed(unknown)}")
    if missing := sorted(name for name in parameters if name not in tensors and not name.startswith(BESIDE)):
        problems.append(f"it lacks {listed(missing)}")
    wrong = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}"
        for name, tensor in tensors.items()
        if name in parameters and tensor.shape != parameters[name].shape
    ]
    wrong += [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    problems += [listed(wrong)] if wrong else []
    if problems:
        raise UserError("; ".join(problems))


def _compare_logits(path: Path, backbone: Backbone, precision: str) -> None:
    """Compares with the reference logits of an export. Raises UserError where the backbone is another."""
    file = (path if path.is_dir() else path.parent) / REFERENCE
    if not file.is_file():
        return
    with autocast(precision, backbone.device):
        found = deviation(backbone.logits_model(), schemas.read(file, Reference))
    if found > (SAME if precision == "float32" else ALIKE):
        raise UserError(
            f"backbone {backbone.name} with it gives other logits than {file} has: it is for another backbone or other "
            f"weights, or was changed; delete {REFERENCE} to take it anyway"
        )


def _notes(
    planned: Plan,
    source: InitSource,
    method: Method,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    notes, config, run = [], planned.config, source.run
    if run is not None:
        given = config.method, config.backbone, planned.hyperparameters
        changed = init_source.differences(run, *given)["training"] if planned.trains else []
        notes += [f"its run was trained otherwise: {listed(changed)}"] if changed else []
        weights = None if config.weights is None else str(config.weights)
        notes += [f"its run had --weights {run.weights}, here {weights}"] if run.weights != weights else []
    own = () if source.merged else parameters
    if still := sorted(name.removeprefix(BESIDE) for name in own if name not in tensors):
        notes.append(f"it has no {listed(still)}, which start as pretrained")
    if planned.trains and config.init_tasks and not source.learnt and method.card.keeps != "nothing":
        notes.append(
            f"it has none of what {config.method} keeps ({method.card.keeps}): later training is not held to "
            f"{', '.join(config.init_tasks)} by it"
        )
    return notes


def described(planned: Plan, notes: list[str]) -> dict[str, Any]:
    """``init`` of results.json; {} for a run that starts from the pretrained state."""
    source = planned.source
    if source is None:
        return {}
    known = {"name": source.name, "kind": source.kind, "sha256": source.sha256}
    return {"init": known | {"tasks": list(planned.config.init_tasks), "notes": notes}}
