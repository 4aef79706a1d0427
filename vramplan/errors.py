"""Exceptions of the package, each with its exit code on the command line."""

from __future__ import annotations


class VramplanError(Exception):
    """An error the user can correct. The message is one line: what is wrong, and what to do about it."""

    exit_code = 1


class UsageError(VramplanError):
    """An option or argument is not valid."""

    exit_code = 2


class NothingFitsError(VramplanError):
    """No candidate fits the budget. The message says by how much the nearest one exceeds it."""

    exit_code = 3


class MismatchError(VramplanError):
    """The plan no longer matches this machine or this pipeline."""

    exit_code = 4
