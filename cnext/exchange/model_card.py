"""The README.md of an exported folder: what the model is, what it scores, and how to tell that it was loaded right."""

from __future__ import annotations

from typing import Any

from cnext.runs import environment

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


def _scores(results: dict[str, Any] | None, stages: int, last: bool) -> list[str]:
    """The score matrix up to a stage, and the metrics where that is the run's last."""
    if results is None:
        return ["No scores: the adapter was not trained here."]
    tasks = results["tasks"]
    lines = [
        f"Percent, profile {results['profile']}, {results['split']} items; a row after each task, in training order.",
        "",
        f"| after | {' | '.join(tasks)} |",
        f"|---|{'---|' * len(tasks)}",
        f"| zero-shot | {' | '.join(map(_cell, results['zero_shot']))} |",
    ]
    for task, row in list(zip(tasks, results["score_matrix"], strict=True))[:stages]:
        if any(value is not None for value in row):
            lines.append(f"| {task} | {' | '.join(map(_cell, row))} |")
    if last and results["finished"]:
        metrics = {name: value for name, value in results["metrics"].items() if isinstance(value, int | float)}
        lines += ["", "| metric | value |", "|---|---|", *(f"| {k} | {v:.2f} |" for k, v in metrics.items())]
    else:
        lines += ["", "The metrics are of a finished run's last checkpoint alone."]
    return lines


def card(
    format: str, config: dict[str, Any], results: dict[str, Any] | None, told: dict[str, Any], kept: dict[str, Any]
) -> str:
    """The card as Markdown.

    Args:
        format: of the export.
        config, results: the run's config.json and results.json.
        told: of the export: checkpoint, stages learnt and whether that is the last, branches and scale, the model's
            class, notes.
        kept: reference.json.
    """
    order = ", ".join(config["tasks"]) if config.get("tasks") else None
    facts = {
        "method": config["method"],
        **{f"{config['method']}.{name}": value for name, value in config["hyperparameters"].items()},
        "backbone": f"{config['backbone']} ({told['model']})",
        "suite": config.get("suite"),
        "budget": config.get("budget"),
        "order": order and f"{config['order']}: {order}",
        "seed": config.get("seed"),
        "imported from": config.get("imported"),
        "checkpoint": told["checkpoint"],
        "branches": ", ".join(f"{name} (rank {rank})" for name, rank in told["ranks"].items()),
        "scale": told["scale"],
    }
    names = list(told["ranks"])
    kind = config["method"] if config["method"] in ("moelora", "lora") else "lora" if len(names) == 1 else "mage"
    loading = LOADING[format].format(names=names, backbone=config["backbone"], model=told["model"], kind=kind)
    versions = {name: version for name, version in environment.versions().items() if version}
    lines = [
        "---",
        *(["library_name: peft"] if format.startswith("peft") else []),
        *(["library_name: transformers"] if format == "merged" else []),
        "tags: [continual-learning, continual-next, cnext]",
        "---",
        "",
        f"# {config['method']} on {config['backbone']}, {format}",
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
        f"SHA-256 `{kept['sha256']}`, decimals {kept['decimals']}; the numbers are in `reference.json`. {kept['rule']}",
        "`cnext import` compares them.",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "\n".join(lines) + "\n"
