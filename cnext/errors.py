"""The errors that are the user's to mend. The command line prints them without a traceback and exits with 2."""


class UserError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do."""


def unknown(kind: str, name: str, valid: list[str] | tuple[str, ...]) -> UserError:
    """The error for a name that is not known; lists the valid ones."""
    return UserError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")
