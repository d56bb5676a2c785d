"""The model card of an exported adapter: the README.md with metadata, loading code, scores and reference logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import field

from cnext.adapters import MODALITIES
from cnext.adapters.hub import front_matter
from cnext.adapters.logit_check import Reference
from cnext.config.init_source import SourceRun
from cnext.report.page import environment as templates
from cnext.runs import environment
from cnext.runs.schemas import Results

KIND_OF = {"mage": "mage", "mage-paper": "mage", "moelora": "moelora", "lora": "lora"}
"""Methods whose adapters are read, each with its kind of file, see `exchange_authors.from_released`."""


class RestorableConfig(SourceRun):
    """config.json of a run, or of an imported adapter, whose model can be loaded again."""

    order: str = ""
    modalities: list[str] = field(default_factory=lambda: list(MODALITIES))
    imported: str | None = None


class FinalResults(Results):
    """results.json with what a model card shows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.split or self.zero_shot is None:
            raise ValueError("Expected `split` and `zero_shot`")


def card(
    format: str,
    config: RestorableConfig,
    results: FinalResults | None,
    export: dict[str, Any],
    reference: Reference,
) -> str:
    """The card as Markdown.

    Args:
        format: of the export.
        config, results: config.json and results.json of the run.
        export: of the checkpoint: its name (checkpoint), the number of tasks learnt (stages) and whether these are all
            (last), branches with their ranks (ranks), scale, class of the model (model), its name without branches
            (base), license and notes.
        reference: reference.json.
    """
    kind = "lora" if len(export["ranks"]) == 1 else "mage"
    kind = config.method if config.method in KIND_OF else kind
    facts = {"suite": config.suite, "budget": config.budget}
    facts["order"] = f"{config.order}: {', '.join(config.tasks)}" if config.tasks else None
    facts |= {"seed": config.seed, "imported from": config.imported}
    facts["started from"] = str(results.init) if results and results.init else None
    matrix = list(zip(results.tasks, results.score_matrix, strict=False))[: export["stages"]] if results else []
    template = templates(Path(__file__).parent).get_template("model_card.md.j2")
    versions = {name: version for name, version in environment.versions().items() if version}
    library = {"authors": None, "merged": "transformers"}.get(format, "peft")
    name = f"{config.method}-{config.backbone}"
    found = _eval_results(config, results) if results and export["last"] and results.finished else []
    return template.render(
        head=front_matter(export["base"], library=library, name=name, license=export["license"], eval_results=found),
        format=format,
        config=config,
        facts=facts,
        results=results,
        rows=[(task, row) for task, row in matrix if row and any(value is not None for value in row)],
        export=export,
        reference=reference,
        kind=kind,
        versions=versions,
    )


def _eval_results(config: RestorableConfig, results: FinalResults) -> list[Any]:
    """The final score of each task, and the metrics over all, for the card's model-index."""
    from huggingface_hub import EvalResult

    suite = str(config.suite or "unknown")
    last = results.score_matrix[-1] if results.score_matrix else None
    final = zip(results.tasks, last, strict=True) if last else ()
    scores = [(str(task), "score", "Score after the last task", value) for task, value in final]
    scores += [("all tasks", name, name, value) for name, value in results.metrics.items()]
    return [
        EvalResult(
            task_type="continual-learning",
            dataset_type=suite,
            dataset_name=f"{suite}: {task}",
            dataset_config=task,
            dataset_split=str(results.split),
            metric_type=kind,
            metric_name=f"{name} (percent, profile {results.profile})",
            metric_value=round(value, 4),
        )
        for task, kind, name, value in scores
        if value is not None
    ]
