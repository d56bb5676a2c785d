"""Cards with metadata, evaluation results in the two formats of the Hugging Face Hub, and uploads to it."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cnext.adapters.logit_check import Reference
from cnext.adapters.saving import CARD, WRITTEN_BY, Saved, move
from cnext.errors import UserError

TAGS = ("continual-learning", "continual-next", "cnext")
EVAL_RESULTS = ".eval_results"
REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def front_matter(
    base_model: str | None,
    *,
    library: str | None,
    name: str,
    license: str | None = None,
    tags: Sequence[str] = (),
    eval_results: Sequence[Any] = (),
) -> str:
    """The YAML block that begins a card.

    Args:
        base_model: name or path of the model without branches; None for a whole model.
        library: what loads it, "peft" or "transformers".
        name: of the model, in its evaluation results.
        license: its identifier on the Hub, such as "apache-2.0".
        tags: more than those of every model of cnext.
        eval_results: `huggingface_hub.EvalResult`, which become the card's model-index.
    """
    from huggingface_hub import ModelCardData

    relation: dict[str, Any] = {"base_model_relation": "adapter"} if base_model and library == "peft" else {}
    data = ModelCardData(
        base_model=base_model,
        library_name=library,
        license=license,
        model_name=name if eval_results else None,
        tags=[*TAGS, *(["lora"] if library == "peft" else []), *tags],
        eval_results=list(eval_results) or None,
        **relation,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def sorted_results(eval_results: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Evaluation results for the card's model-index, and those for files in .eval_results.

    Raises:
        UserError: one is of neither class of huggingface_hub.
    """
    import huggingface_hub

    entry = getattr(huggingface_hub, "EvalResultEntry", ())
    index = [each for each in eval_results if isinstance(each, huggingface_hub.EvalResult)]
    entries = [each for each in eval_results if isinstance(each, entry)]
    if strange := [type(each).__name__ for each in eval_results if each not in index and each not in entries]:
        raise UserError(
            "eval_results: expected huggingface_hub.EvalResult (for the card) or EvalResultEntry (for "
            f"{EVAL_RESULTS}), got {', '.join(strange)}"
        )
    return index, entries


def write_results(folder: Path, entries: Sequence[Any]) -> None:
    """Writes .eval_results/*.yaml, one file per benchmark."""
    import huggingface_hub
    import yaml

    by_file: dict[str, list[Any]] = {}
    for each in entries:
        by_file.setdefault(re.sub(r"[^\w.-]", "_", each.dataset_id.rpartition("/")[2]), []).append(each)
    for name, some in by_file.items():
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        values = huggingface_hub.eval_result_entries_to_yaml(some)
        (folder / EVAL_RESULTS / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def write_card(
    folder: Path,
    config: Saved,
    kept: Reference | None,
    *,
    license: str | None = None,
    tags: Sequence[str] = (),
    eval_results: Sequence[Any] = (),
    name: str | None = None,
) -> None:
    """Writes README.md, unless somebody else has, and .eval_results, into a folder of branches."""
    index, entries = sorted_results(eval_results)
    title = name or folder.resolve().name
    head = front_matter(config.base_model, library="peft", name=title, license=license, tags=tags, eval_results=index)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as made:
        write_results(Path(made), entries)
        file = folder / CARD
        if not file.is_file() or WRITTEN_BY in file.read_text(encoding="utf-8", errors="replace"):
            (Path(made) / CARD).write_text(f"{head}\n\n{_text(title, config, kept)}", encoding="utf-8")
        move(Path(made), folder)


def _text(title: str, config: Saved, kept: Reference | None) -> str:
    total = sum(config.branches.values())
    rows = "\n".join(f"| {name} | {rank} |" for name, rank in config.branches.items())
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    checked = f"SHA-256 `{kept.sha256}`; `reference.json` has the numbers and the rule." if kept else "None were taken."
    return f"""# {title}

{WRITTEN_BY}: {len(config.branches)} low-rank branches, scale {config.scale:g}, of {config.model}, base model
`{config.base_model}`. `base` is that model, without adapters:

{_loading(config)}
    import cnext
    handle = cnext.load(base, folder)   # the branches apart, to train on

{"" if config.per_branch else f"vLLM reads the folder with `max_lora_rank` of at least {total}."}

| branch | rank |
|---|---|
{rows}

## Reference logits

{checked}

## Versions

{versions}
"""


def _loading(config: Saved) -> str:
    if not config.per_branch:
        return """    from peft import PeftModel
    model = PeftModel.from_pretrained(base, folder)
"""
    return f"""    from peft import PeftModel
    names = {list(config.branches)}
    model = PeftModel.from_pretrained(base, f"{{folder}}/{{names[0]}}", adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(f"{{folder}}/{{name}}", adapter_name=name)
    model.base_model.set_adapter(names)   # all at once: the model uses their sum
"""


def require_hub_name(base_model: str | None) -> None:
    """Raises UserError for a base model that others cannot find."""
    if base_model is None or Path(base_model).exists() or not REPO_ID.fullmatch(base_model):
        raise UserError(
            f"push_to_hub: the base model is {base_model or 'a new model without a name'}, which nobody else can load; "
            "pass base_model= with its name on the Hub, such as 'Qwen/Qwen2.5-VL-7B-Instruct'"
        )


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder into a model repository, which is created if needed. Returns the address of the commit.

    Raises:
        UserError: the Hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload branches by cnext",
            revision=revision,
            create_pr=create_pr,
        )
    except (HfHubHTTPError, HFValidationError, OSError, *_connection_errors()) as error:
        raise UserError(f"push_to_hub: {repo_id} was not uploaded: {error}") from error
    return str(done.pr_url or done.commit_url)


def download(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a model repository on this machine, downloaded if needed.

    Raises:
        UserError: there is none, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*/*.json", "adapter_model.safetensors", "*/adapter_model.safetensors"]
    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, *_connection_errors()) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{repo_id}: no such folder, and not to be had from the Hugging Face Hub: {reason}") from error


def _connection_errors() -> tuple[type[Exception], ...]:
    """What the HTTP libraries of newer releases of huggingface_hub raise; that of older ones raises OSError."""
    found = []
    for name in ("httpx2", "httpx"):
        with suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return tuple(found)
