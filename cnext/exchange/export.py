"""``cnext export``: write a run's adapters in formats of other tools, with a model card and reference logits."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec import to_builtins
from torch import Tensor, nn

from cnext import backbones, durable, methods, packages
from cnext.adapters import exchange, exchange_authors, exchange_peft, export_sums
from cnext.adapters.logit_check import reference
from cnext.backbones.base import outer_model
from cnext.config import init_source
from cnext.config.init_source import CONNECTIONS
from cnext.config.plan import as_words, loading_options
from cnext.errors import UserError, listed, unknown
from cnext.exchange.model_card import FinalResults, RestorableConfig, card
from cnext.methods.base import Method
from cnext.runs import checkpoint, checkpoint_fit, results_file, schemas
from cnext.runs.checkpoint import EXTRAS
from cnext.tasks.base import stand_in
from cnext.training import merged_model
from cnext.training.setup import trained_beside

FORMATS = ("peft", "peft-merged-rank", "authors", "merged")
REFERENCE = "reference.json"
WITH_A_MODEL = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"),
    *("processor_config.json", "chat_template.json", "chat_template.jinja"),
)
"""Files that transformers loads from a model's folder beside its weights."""


@dataclass
class Restored:
    """The model of a run at a checkpoint between tasks.

    label: name of the checkpoint.  stages: tasks learnt.  last: whether these are all tasks.
    model: the transformers model around the language model.
    extras: trained tensors other than the branches, kind to name to tensor; an imported adapter may have some as well.
    """

    config: RestorableConfig
    results: FinalResults | None
    label: str
    stages: int
    last: bool
    method: Method
    model: nn.Module
    extras: dict[str, dict[str, Tensor]]


def _checkpoint(run: Path, label: str | None) -> Path:
    """The folder of the named checkpoint; None: of the last one between tasks."""
    found = [path.parent for path in sorted((run / "checkpoints").glob(f"[!.]*/{checkpoint.MANIFEST}"))]
    between = {path.name: path for path in found if not checkpoint.manifest(path)["step"]}
    if not between:
        raise UserError(f"{run} has no checkpoint of a finished task; run cnext-run until one is finished")
    if label is not None and label not in between:
        raise unknown("checkpoint (of those between tasks)", label, list(between))
    return between[label] if label else max(between.values(), key=lambda p: checkpoint.manifest(p)["tasks_done"])


def _method(config: RestorableConfig) -> Method:
    """The method of a configuration. Raises UserError for hyperparameters that it does not have."""
    kind, given = methods.load(config.method), config.hyperparameters
    defaults = dataclasses.asdict(kind())
    for name, value in given.items():
        if name not in defaults:
            raise unknown(f"hyperparameter of {config.method}", name, list(defaults))
        expected = {int: int, float: float, bool: bool, str: str}.get(type(defaults[name]), Any)
        schemas.convert(value, expected, f"hyperparameter {name} in config.json")
    return kind(**given)


def restore(run: Path, label: str | None = None) -> Restored:
    """Loads a run's backbone and adapters on the CPU, as of a checkpoint between tasks.

    Args:
        label: name of the checkpoint; None: the last one.

    Raises:
        UserError: no run folder, no such checkpoint, a damaged one, or one that does not fit the installed method.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"expected the folder of a run, such as runs/mage/paper/seed-0, found no config.json in {run}")
    config = schemas.read(run / "config.json", RestorableConfig)
    folder = _checkpoint(run, label)
    file = run / "results.json"
    found = results_file.read(file)
    results = None if found is None else schemas.convert(found, FinalResults, file)
    tensors, values = checkpoint.load(folder)
    results_file.check_stage(folder, values)
    packages.require_installed("cnext export", packages.MODELS)
    packages.require(*packages.MODELS)
    options = loading_options(config.backbone, as_words(config.backbone_options))
    merged = None if config.merged is None else init_source.check_merged(config.merged)
    backbone = backbones.load(config.backbone).load("cpu", config.weights and Path(config.weights), **options)
    if merged is not None:
        merged_model.put(merged, backbone)
    method = _method(config)
    tasks = [stand_in(name) for name in config.tasks]
    method.setup(backbone, tasks, torch.Generator().manual_seed(0), config.modalities)
    beside = trained_beside(backbone, config.recipe.trainable)
    held = method.adapter_parameters() | beside
    if changed := sorted(held.keys() ^ tensors["adapters"].keys()):
        raise UserError(f"{folder} does not fit {config.method} of this version: {listed(changed)}")
    checkpoint_fit.require_fit(folder, tensors, held)
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(tensors["adapters"][name])
    checkpoint_fit.restore(folder, method, tensors["method"])
    extras = _by_kind(outer_model(backbone), beside)
    for key, tensor in tensors.get(EXTRAS, {}).items():
        kind, _, name = key.partition(".")
        extras.setdefault(kind, {})[name] = tensor
    stages = values["tasks_done"]
    last = stages == len(config.tasks)
    backbone.eval()
    return Restored(config, results, folder.name, stages, last, method, outer_model(backbone), extras)


def _by_kind(model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Parameters beside the branches as `exchange_authors.Released` has its extras: kind to name to tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ends = [
        (part and part.weight, kind)
        for part, kind in ((model.get_input_embeddings(), "embeddings"), (model.get_output_embeddings(), "head"))
    ]
    found: dict[str, dict[str, Tensor]] = {}
    for label, parameter in parameters.items():
        name = names.get(id(parameter))
        kind = next((kind for weight, kind in ends if weight is parameter), "norms")
        if name is None:
            name = label.removeprefix("backbone.")
            kind = name.partition(".")[0]
        found.setdefault(kind, {})[name] = parameter.detach()
    return found


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` at the end of the block. Raises UserError where that is not empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give another --to or delete it")
    folder = folder.absolute()
    with durable.new_folder(folder) as unfinished:
        yield unfinished


def export(
    run: Path,
    to: Path,
    format: str,
    label: str | None = None,
    branches_only: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> list[Path]:
    """Writes a run's adapters into a new folder. Returns the files.

    Args:
        format: "peft" (an adapter for each active branch), "peft-merged-rank" (one of their total rank), "authors"
            (pytorch_model.bin as released) or "merged" (the transformers model with the branches in its weights).
        label: the checkpoint's name; None: the last one between tasks.
        branches_only: leaves out trained tensors other than the branches.
        base_model: name of the model without branches, for the card and PEFT. None: the folder of the run's weights, or
            "cnext:" and the name of a backbone whose weights come with the package.
        license: of what is exported, for the card, as the Hugging Face Hub writes it.

    Raises:
        UserError: the format cannot hold what was trained, or ``to`` exists and is not empty.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    with new_folder(to) as folder:
        restored = restore(run, label)
        name = restored.config.method
        if type(restored.method).answer is not Method.answer:
            raise UserError(f"{name} selects parameters by the question, which no adapter format can express")
        extras = {} if branches_only else restored.extras
        notes = []
        if branches_only and restored.extras:
            notes.append(f"Left out, though trained with the branches: {_counted(restored.extras)}.")
        if extras and format.startswith("peft"):
            raise UserError(
                f"--format {format} holds branches only, and the run also has {_counted(extras)}; "
                "--format authors and merged hold these, --branches-only leaves them out"
            )
        exchange_authors.put_extras(restored.model, extras)
        weights, merged = restored.config.weights, restored.config.merged
        if merged is not None:
            weights = merged.path
            notes.append(f"The model without branches is the merged model {merged.path}, SHA-256 {merged.sha256}.")
        base = base_model or (os.path.abspath(weights) if weights else f"cnext:{restored.config.backbone}")
        with restored.method.for_eval():
            branches = exchange.branches_of(restored.model)
            exchange.require_finite(branches.named(), "the adapter")
            notes += _write(restored, folder, format, extras, base)
            kept = reference(restored.model)
        checkpoint.write_json(folder / REFERENCE, to_builtins(kept))
        facts = {
            "checkpoint": restored.label,
            "stages": restored.stages,
            "last": restored.last,
            "ranks": branches.ranks,
            "scale": branches.scale,
            "model": type(restored.model).__name__,
            "notes": notes,
            "base": base,
            "license": license,
        }
        checkpoint.write_text(folder / "README.md", card(format, restored.config, restored.results, facts, kept))
        checkpoint.write_json(folder / export_sums.FILE, to_builtins(export_sums.of_folder(folder)))
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [to / name for name in names]


def _counted(extras: dict[str, dict[str, Tensor]]) -> str:
    return ", ".join(f"{kind} ({len(tensors)})" for kind, tensors in sorted(extras.items()))


def _write(restored: Restored, folder: Path, format: str, extras: dict[str, dict[str, Tensor]], base: str) -> list[str]:
    """Writes the weights. Returns notes for the model card."""
    from safetensors.torch import save_file

    model: Any = restored.model
    if format == "authors":
        state = exchange_authors.to_released(model, extras)
        torch.save({name: tensor.contiguous() for name, tensor in state.items()}, folder / "pytorch_model.bin")
        return []
    if format != "merged":
        exchange_peft.save_peft(model, folder, one=format == "peft-merged-rank", base_model=base)
        return []
    with exchange.merged(model):
        model.save_pretrained(str(folder))
    if (processor := getattr(restored.method.backbone, "processor", None)) is not None:
        processor.save_pretrained(str(folder))
    elif (weights := restored.config.weights) is not None:
        for name in WITH_A_MODEL:
            if (Path(weights) / name).is_file():
                shutil.copyfile(Path(weights) / name, folder / name)
    inside = exchange_authors.LANGUAGE_MODEL
    beside = {name: t for kind, part in extras.items() if kind not in inside for name, t in part.items()}
    if (merged := restored.config.merged) is not None:
        beside = merged_model.connections(Path(merged.path)) | beside
    if not beside:
        return ["Frozen parts of the backbone outside this model are as they were pretrained, and not in this folder."]
    save_file({name: tensor.contiguous() for name, tensor in beside.items()}, folder / CONNECTIONS)
    return [f"Trained parts outside this model are in `{CONNECTIONS}`."]
