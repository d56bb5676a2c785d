"""Public ops. Each has a reference in plain torch and compiled implementations; see `cnext.ops.dispatch`."""

from cnext.ops.averaging import fisher_accumulate_, pema_merge_, sums
from cnext.ops.dispatch import last_path

__all__ = ["fisher_accumulate_", "last_path", "pema_merge_", "sums"]
