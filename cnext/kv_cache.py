"""Name of the key-value cache argument of a transformers decoder, across versions.

transformers 5 renames ``past_key_values`` to ``cache`` and removes the old name in 5.40: from then on it would be
dropped among a decoder's ``**kwargs`` without an error, and every position computed without those before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from cnext.errors import UserError

NAMES = ("cache", "past_key_values")
"""What transformers calls the argument, the newest name first."""


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
