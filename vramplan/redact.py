"""Text without what names a person or a machine."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Identifiers as drivers, containers and batch systems write them: UUIDs, long hexadecimal numbers, numbers of users
# and jobs.
_PATTERNS = (
    (re.compile(r"(?:GPU-|MIG-)*[0-9a-fA-F]{8}(?:[-_][0-9a-fA-F]{4}){3}[-_][0-9a-fA-F]{12}(?:/\d+/\d+)?"), "<uuid>"),
    (re.compile(r"\b(?:GPU|MIG)-[0-9a-zA-Z-]+"), "<uuid>"),
    (re.compile(r"\b(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{16,}\b"), "<id>"),
    (re.compile(r"\b(uid_|user-|user@|job_|step_)\d+"), r"\1<id>"),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with UUIDs, long identifiers, and the names of host, user and home folder replaced."""
    known = {secret: "<uuid>" for secret in secrets if secret}
    known |= {name: what for name, what in _names() if len(name) > 1}
    for secret in sorted(known, key=len, reverse=True):
        text = re.sub(rf"(?<![0-9A-Za-z]){re.escape(secret)}(?![0-9A-Za-z])", known[secret], text, flags=re.IGNORECASE)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _names() -> Iterable[tuple[str, str]]:
    """What the machine and its user are called."""
    host = platform.node()
    yield host, "<host>"
    yield host.partition(".")[0], "<host>"
    with suppress(Exception):  # a container may have no name for its user
        yield getpass.getuser(), "<user>"
    with suppress(RuntimeError):
        yield str(Path.home()), "<home>"
        yield Path.home().name, "<user>"
