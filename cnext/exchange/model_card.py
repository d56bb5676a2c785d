"""The README.md of an exported folder: what the model is, what it scores, and how to tell that it was loaded right."""

from __future__ import annotations

from typing import Any

from msgspec import field

from cnext.exchange.logit_check import Reference
from cnext.records import FileName, Record
from cnext.runs import environment
from cnext.runs.schemas import ResolvedRecipe, Results


class RestorableConfig(Record):
    """config.json of a run, or of an imported adapter, whose model can be loaded again."""

    method: str
    hyperparameters: dict[str, Any]
    backbone: str
    tasks: list[FileName]
    recipe: ResolvedRecipe = field(default_factory=ResolvedRecipe)
    suite: str | None = None
    budget: str | None = None
    order: str = ""
    seed: int | None = None
    weights: str | None = None
    imported: str | None = None


class FinalResults(Results):
    """results.json with all that a model card shows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.split or self.zero_shot is None:
            raise ValueError("Expected `split` and `zero_shot`")


LOADING = {
    "peft": """    from peft import PeftModel
    names = {names}
    model = PeftModel.from_pretrained(base, f"{{folder}}/{{names[0]}}", adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(f"{{folder}}/{{name}}", adapter_name=name)
    model.base_model.set_adapter(names)   # all at once: their sum is the model""",
    "peft-merged-rank": """    from peft import PeftModel
    model = PeftModel.from_pretrained(base, folder)""",
    "authors": """    torch.load("pytorch_model.bin", weights_only=True)   # the released code's layout, or:
    cnext import FOLDER --to DIR --backbone {backbone} --method {kind}""",
    "merged": """    from transformers import {model}
    model = {model}.from_pretrained(folder)""",
}


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _scores(results: FinalResults | None, stages: int, last: bool) -> list[str]:
    """The score matrix up to a stage, and the metrics where that is the run's last."""
    if results is None:
        return ["No scores: the adapter was not trained here."]
    tasks = results.tasks
    lines = [
        f"Percent, profile {results.profile}, {results.split} items; a row after each task, in training order.",
        "",
        f"| after | {' | '.join(tasks)} |",
        f"|---|{'---|' * len(tasks)}",
        f"| zero-shot | {' | '.join(map(_cell, results.zero_shot or []))} |",
    ]
    for task, row in list(zip(tasks, results.score_matrix, strict=True))[:stages]:
        if row and any(value is not None for value in row):
            lines.append(f"| {task} | {' | '.join(map(_cell, row))} |")
    if last and results.finished:
        metrics = {name: value for name, value in results.metrics.items() if value is not None}
        lines += ["", "| metric | value |", "|---|---|", *(f"| {k} | {v:.2f} |" for k, v in metrics.items())]
    else:
        lines += ["", "The metrics are of a finished run's last checkpoint alone."]
    return lines


def card(
    format: str, config: RestorableConfig, results: FinalResults | None, told: dict[str, Any], kept: Reference
) -> str:
    """The card as Markdown.

    Args:
        format: of the export.
        config, results: the run's config.json and results.json.
        told: of the export: checkpoint, stages learnt and whether that is the last, branches and scale, the model's
            class, notes.
        kept: reference.json.
    """
    order = ", ".join(config.tasks)
    facts = {
        "method": config.method,
        **{f"{config.method}.{name}": value for name, value in config.hyperparameters.items()},
        "backbone": f"{config.backbone} ({told['model']})",
        "suite": config.suite,
        "budget": config.budget,
        "order": f"{config.order}: {order}" if order else None,
        "seed": config.seed,
        "imported from": config.imported,
        "checkpoint": told["checkpoint"],
        "branches": ", ".join(f"{name} (rank {rank})" for name, rank in told["ranks"].items()),
        "scale": told["scale"],
    }
    names = list(told["ranks"])
    kind = config.method if config.method in ("moelora", "lora") else "lora" if len(names) == 1 else "mage"
    loading = LOADING[format].format(names=names, backbone=config.backbone, model=told["model"], kind=kind)
    versions = {name: version for name, version in environment.versions().items() if version}
    lines = [
        "---",
        *(["library_name: peft"] if format.startswith("peft") else []),
        *(["library_name: transformers"] if format == "merged" else []),
        "tags: [continual-learning, continual-next, cnext]",
        "---",
        "",
        f"# {config.method} on {config.backbone}, {format}",
        "",
        "Written by `cnext export`. Loading it, where `base` is the backbone's own model without adapters:",
        "",
        loading,
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items() if value is not None),
        "",
        *([line for note in told["notes"] for line in (note, "")]),
        "## Scores",
        "",
        *_scores(results, told["stages"], told["last"]),
        "",
        "## Reference logits",
        "",
        f"SHA-256 `{kept.sha256}`, decimals {kept.decimals}; the numbers are in `reference.json`. {kept.rule}",
        "`cnext import` compares them.",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "\n".join(lines) + "\n"
