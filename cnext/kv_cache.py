"""Name of the key-value cache argument of transformers decoders, across versions.

transformers 5 renames ``past_key_values`` to ``cache`` and removes the old name in 5.40. From then on a decoder would
silently ignore the old name among its ``**kwargs``, and compute every position without those before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from cnext.errors import UserError

NAMES = ("cache", "past_key_values")
"""Names of the argument in transformers, the newest first."""


def cache_argument(decoder: nn.Module) -> str:
    """The name of the key-value cache among the arguments of ``decoder.forward``: "cache" or "past_key_values".

    Raises:
        UserError: it has neither.

    Example:
        decoder(inputs_embeds=x, use_cache=True, **{cache_argument(decoder): DynamicCache()})
    """
    parameters = inspect.signature(decoder.forward).parameters
    for name in NAMES:
        if name in parameters:
            return name
    raise UserError(
        f"{type(decoder).__name__}.forward takes no key-value cache: expected an argument {' or '.join(NAMES)}, "
        f"got {', '.join(parameters) or 'none'}; cnext needs a decoder of transformers"
    )


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among a decoder's keyword arguments under either name, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
