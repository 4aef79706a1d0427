"""Remove names of people, machines and devices from text."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Identifiers of drivers, containers and batch systems: UUIDs, long hexadecimal numbers, numbers of users and jobs.
_PATTERNS = (
    (re.compile(r"(?:GPU-|MIG-)*[0-9a-fA-F]{8}(?:[-_][0-9a-fA-F]{4}){3}[-_][0-9a-fA-F]{12}(?:/\d+/\d+)?"), "<uuid>"),
    (re.compile(r"\b(?:GPU|MIG)-[0-9a-zA-Z-]+"), "<uuid>"),
    (re.compile(r"(?<![0-9A-Za-z])(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{12,}(?![0-9A-Za-z])"), "<id>"),
    (re.compile(r"\b(uid_|user-|user@|job_|step_)\d+"), r"\1<id>"),
)
_GROUP = re.compile(r"(?<=\bat )/[^\s()]*")
# Words in the control groups' names of known software; anything else may be the name of a person or a machine.
_GROUP_WORDS = frozenset(
    (
        *("system", "systemd", "user", "session", "app", "machine", "init", "slice", "scope", "service"),
        *("docker", "containerd", "cri", "crio", "podman", "libpod", "lxc", "payload", "garden"),
        *("kubepods", "burstable", "besteffort", "guaranteed", "pod"),
        *("slurm", "slurmstepd", "uid", "job", "step", "task"),
    )
)
# Paths outside the folders that every system has: they may contain names of people and projects.
_PATH = re.compile(
    r"""(?<!\bat )(?<![\w.<>:/~-])(?:[A-Za-z]:\\|/(?!(?:dev|proc|sys|usr|opt|etc)/))[^\s:;,()'"]*[/\\][^\s:;,()'"]*"""
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Replace UUIDs, long identifiers, paths, and the names of host, user, control groups and home in the text."""
    known = {secret: "<uuid>" for secret in secrets if secret}
    known |= {name: instead for name, instead in _names() if len(name) > 1}
    for secret in sorted(known, key=len, reverse=True):
        text = re.sub(rf"(?<![0-9A-Za-z]){re.escape(secret)}(?![0-9A-Za-z])", known[secret], text, flags=re.IGNORECASE)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return _PATH.sub("<path>", _GROUP.sub(lambda found: _group(found[0]), text))


def _group(path: str) -> str:
    """A control group's path with only the words of known software."""
    words = re.split(r"([/._@:-])", path)
    return "".join(word if _is_plain(word) else "<name>" for word in words)


def _is_plain(word: str) -> bool:
    return word in _GROUP_WORDS or len(word) <= 1 or word.isdigit() or re.fullmatch(r"\w*<\w+>", word) is not None


def _names() -> Iterable[tuple[str, str]]:
    """The names of the machine and its user, each with its replacement."""
    host = platform.node()
    yield host, "<host>"
    yield host.partition(".")[0], "<host>"
    with suppress(Exception):  # a container may have no name for its user
        yield getpass.getuser(), "<user>"
    with suppress(RuntimeError):
        yield str(Path.home()), "<home>"
        yield Path.home().name, "<user>"
