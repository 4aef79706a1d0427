"""Request the start of a file from the hub, within limits of bytes and time. Errors are one sentence."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vramplan.errors import VramplanError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Limits in seconds: without a byte (huggingface_hub 2.4, DEFAULT_DOWNLOAD_TIMEOUT), for one answer, before a retry, and
# for a rate limit to pass. The last three are assumed.
IDLE_S = 10.0
ANSWER_TIMEOUT_S = 30.0
RETRY_PAUSE_S = 1.0
_MAX_PAUSE_S = 10.0
_ATTEMPTS = 2
_RETRY_STATUSES = (408, 429, 500, 502, 503, 504)


class HubError(VramplanError):
    """The hub does not return the file: it is missing, needs a login, or the hub cannot be reached."""


class UnreachableError(HubError):
    """The hub does not answer, or not correctly; a later attempt may succeed."""


class RefusedError(HubError):
    """The hub requires a token, or one with access to the repository."""


class _RetryError(Exception):
    """An attempt failed, and a retry may succeed after `pause_s` seconds."""

    def __init__(self, reason: str, pause_s: float = RETRY_PAUSE_S) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def get_start(url: str, count: int, *, repo_id: str) -> tuple[bytes, int]:
    """The first `count` bytes at this address, or fewer, and the size of the whole file.

    The user's token is sent, to the hub only. If the server ignores the range, reading stops after `count` bytes.

    Raises:
        RefusedError: a token, or another one, is required. UnreachableError: no answer, a broken or a slow one.
        HubError: there is no such repository, revision or file.
    """
    if is_offline():
        raise UnreachableError(f"{repo_id}: HF_HUB_OFFLINE is set, and this is not in the cache")
    reason = ""
    for attempt in range(_ATTEMPTS):
        try:
            return _attempt(url, count, repo_id)
        except _RetryError as error:
            reason = str(error)
            if attempt + 1 == _ATTEMPTS or error.pause_s > _MAX_PAUSE_S:
                break
            time.sleep(error.pause_s)
    raise UnreachableError(f"{repo_id}: {reason}")


def _attempt(url: str, count: int, repo_id: str) -> tuple[bytes, int]:
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers() | {"range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    until = time.monotonic() + ANSWER_TIMEOUT_S
    try:
        with get_session().stream("GET", url, headers=headers, timeout=IDLE_S, follow_redirects=True) as response:
            if response.status_code == 416:  # an empty file has no byte in any range
                return b"", 0
            _check(response.status_code, response.headers, repo_id)
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= count:
                    break
                if time.monotonic() > until:
                    raise _RetryError(f"the hub's answer is too slow: {len(data):,} bytes in {ANSWER_TIMEOUT_S:.0f} s")
            size = _size(response.headers, len(data))
    except HTTPError as error:
        raise _RetryError(f"the hub cannot be reached ({_reason(error)})") from error
    if len(data) < min(count, size):
        raise _RetryError(f"the hub's answer breaks off after {len(data):,} bytes")
    return bytes(data[:count]), size


def _check(status: int, headers: Mapping[str, str], repo_id: str) -> None:
    """Raise an error unless the answer is the file, by the codes of huggingface_hub's `hf_raise_for_status`."""
    if status in (200, 206):
        return
    code, message = headers.get("x-error-code", ""), headers.get("x-error-message", "")
    if code == "GatedRepo" or status == 403:
        raise RefusedError(
            f"{repo_id} is gated: accept its terms at {_page(repo_id)} and log in (hf auth login, or HF_TOKEN)"
        )
    if status == 401 and "Invalid" in message:
        raise RefusedError(f"{repo_id}: the hub does not accept your token: hf auth login, or another HF_TOKEN")
    if code == "RevisionNotFound":
        raise HubError(f"{repo_id} has no such revision: see {_page(repo_id)}/commits/main")
    if code == "EntryNotFound":
        raise HubError(f"{repo_id}: a file that the hub lists is not there")
    if status in (401, 404):
        raise RefusedError(
            f"{repo_id}: no such folder, and no such repository on the hub, or a private one: "
            "check the name, or log in (hf auth login, or HF_TOKEN)"
        )
    if status in _RETRY_STATUSES:
        delay = headers.get("retry-after", "").strip()
        pause = float(delay) if delay.isdigit() else RETRY_PAUSE_S
        after = f"; try again in {pause:.0f} s" if delay.isdigit() else ""
        raise _RetryError(f"the hub answers {status}{' (too many requests)' * (status == 429)}{after}", pause)
    raise HubError(f"{repo_id}: the hub answers {status}")


def _page(repo_id: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def _size(headers: Mapping[str, str], received: int) -> int:
    """The size of the whole file, from the answer's range or length."""
    total = headers.get("content-range", "").rpartition("/")[2]
    length = total if total.isdigit() else headers.get("content-length", "")
    return int(length) if length.isdigit() else received


def _reason(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")
