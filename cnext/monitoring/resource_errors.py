"""What a machine runs out of: memory, and room on the disk. Each is one message that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cnext.errors import GO_ON, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How the errors of torch's allocators are worded that are plain RuntimeErrors."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


@contextmanager
def explained(folder: Path, doing: Callable[[], str], batch_size: int) -> Iterator[None]:
    """Inside, running out of memory or of disk is a UserError. doing: what is under way, in words.

    Every file is written whole or not at all and parameters are not saved inside a step, so that whatever has been
    saved is good.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"no space left on the disk ({doing()}): {error.filename or folder}\n"
            f"what was saved is whole; make room, and {GO_ON}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"out of memory ({doing()}): {reason}\n"
            f"the last checkpoint is whole; with more memory (fewer --jobs, other programs ended) {GO_ON}; "
            f"a --micro-batch-size below {batch_size}, --checkpointing True or a lower --batch-size needs less, "
            "and another --out"
        ) from error
