"""Continual learning of dual-to-dual multimodal models. Importing this package imports nothing heavy."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnext.adapters import attach_mage, load
    from cnext.config.run_config import RunConfig
    from cnext.results import RunResult, StudyResult, open_run, open_study
    from cnext.studies.in_python import study
    from cnext.training.runner import run

__version__ = "0.1.0"

_LAZY = {
    "RunConfig": "cnext.config.run_config",
    "RunResult": "cnext.results",
    "StudyResult": "cnext.results",
    "attach_mage": "cnext.adapters",
    "load": "cnext.adapters",
    "open_run": "cnext.results",
    "open_study": "cnext.results",
    "run": "cnext.training.runner",
    "study": "cnext.studies.in_python",
}
__all__ = [
    "RunConfig",
    "RunResult",
    "StudyResult",
    "__version__",
    "attach_mage",
    "load",
    "open_run",
    "open_study",
    "run",
    "study",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'cnext' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, and the modules that are imported already."""
    return sorted({*__all__, *(name for name, value in globals().items() if _is_part(value))})


def _is_part(value: object) -> bool:
    return isinstance(value, ModuleType) and value.__name__.startswith("cnext.")
