"""Continual learning of dual-to-dual multimodal models. Importing this package imports nothing heavy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnext.adapters import attach_mage, load
    from cnext.config.run_config import RunConfig
    from cnext.training.runner import run

__version__ = "0.1.0"

_LAZY = {
    "RunConfig": "cnext.config.run_config",
    "attach_mage": "cnext.adapters",
    "load": "cnext.adapters",
    "run": "cnext.training.runner",
}
__all__ = ["RunConfig", "__version__", "attach_mage", "load", "run"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'cnext' has no attribute {name!r}")
