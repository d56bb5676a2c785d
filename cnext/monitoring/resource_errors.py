"""Convert out-of-memory and disk-full errors to UserError."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cnext.errors import RESUME, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words of the plain RuntimeErrors that torch's allocators raise."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that no memory is left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


@contextmanager
def as_user_errors(folder: Path, doing: Callable[[], str], batch_size: int) -> Iterator[None]:
    """Context in which out-of-memory and disk-full errors become a UserError that says what to do.

    Files are written atomically, so everything saved before is good.

    Args:
        folder: the run folder.
        doing: returns what is under way, in words.
        batch_size: of the run, which the advice names.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"no space left on the disk ({doing()}): {error.filename or folder}\nfree some space, then {RESUME}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"out of memory ({doing()}): {reason}\n"
            f"with more memory (fewer --jobs, other programs closed) {RESUME}; "
            f"a --micro-batch-size below {batch_size}, --checkpointing True or a lower --batch-size needs less memory, "
            "but another --out"
        ) from error
