"""What can go wrong, and the exit code each kind of failure has on the command line."""

from __future__ import annotations


class VramplanError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it."""

    exit_code = 1


class UsageError(VramplanError):
    """An option or argument that makes no sense."""

    exit_code = 2


class NothingFitsError(VramplanError):
    """No candidate fits the budget. The message says by how much the nearest one is short."""

    exit_code = 3


class MismatchError(VramplanError):
    """The plan does not match this machine, or this pipeline, any more."""

    exit_code = 4
