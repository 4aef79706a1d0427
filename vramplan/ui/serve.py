"""Serve the page to this machine only, with a worker process that plans, until interrupted."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vramplan.common.progress import CHATTY_LOGGERS
from vramplan.errors import UsageError, VramplanError
from vramplan.ui.choices import Selection

_ADDRESS = "127.0.0.1"


def serve(folder: Path | None, port: int | None, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM, and say its address once it can be opened. `port` None takes a free one.

    Raises:
        VramplanError: dash is not installed, or the port is taken.
        UsageError: the folder does not exist.
    """
    if find_spec("dash") is None:
        raise VramplanError("vramplan ui needs dash: pip install 'vramplan[ui]'")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    from vramplan.ui.page import make_page

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    app = make_page(folder, Worker().ask)
    server = _server(app.server, port)
    guard(app, server.port)
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's background processes ignore SIGINT by default
        signal.signal(number, signal.default_int_handler)
    say(f"http://{_ADDRESS}:{server.port}/")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        for child in multiprocessing.active_children():
            child.terminate()


def _server(application: Any, port: int | None) -> Any:
    """Werkzeug's server, not meant for the internet but enough for one user on this machine."""
    from werkzeug.serving import make_server

    try:
        listening = socket.create_server((_ADDRESS, port or 0))  # werkzeug's own would exit the process on failure
    except OSError as error:
        raise VramplanError(f"port {port} cannot be had: choose another `port`, or leave it out") from error
    with listening:
        return make_server(_ADDRESS, port or 0, application, threaded=True, fd=listening.fileno())


def guard(app: Any, port: int) -> None:
    """Refuse requests that do not come from the page itself, and let the page load nothing from elsewhere.

    Another site can make a browser send requests to this server: by a form or script, with that site's `Origin`, or by
    a host name of its own that resolves to this machine, sent as the `Host` (DNS rebinding).
    """
    from flask import abort, request

    hosts = {f"{name}:{port}" for name in (_ADDRESS, "localhost")}
    origins = {f"http://{host}" for host in hosts}
    scripts = " ".join(app.csp_hashes())
    policy = (
        f"default-src 'self'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    @app.server.before_request
    def refuse() -> None:
        if request.headers.get("Host") not in hosts or request.headers.get("Origin") not in {None, *origins}:
            abort(403)

    @app.server.after_request
    def protect(response: Any) -> Any:
        response.headers["Content-Security-Policy"] = policy
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


class Worker:
    """A separate process that plans, so that the page stays responsive. It takes one selection at a time, as a
    simulation needs a process of its own; of the waiting selections of one page only the last is run."""

    def __init__(self) -> None:
        self._pool = _pool()
        self._lock = threading.Lock()
        self._turns: dict[str, int] = {}

    def ask(self, page: str, call: Callable[[Selection], Any], selection: Selection) -> Any:
        """Return the result of `call`; None if the page has asked again meanwhile.

        Raises:
            VramplanError: the process ended.
        """
        turn = self._turns[page] = self._turns.get(page, 0) + 1
        with self._lock:
            if self._turns[page] != turn:
                return None
            try:
                return self._pool.submit(call, selection).result()
            except BrokenProcessPool:
                self._pool = _pool()
                raise VramplanError("the planning process ended, as it does where memory runs out: try again") from None


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=_log_levels()
    )


def _log_levels() -> tuple[dict[str, int]]:
    """The current level of each chatty logger, for the worker."""
    return ({name: logging.getLogger(name).level for name in CHATTY_LOGGERS},)


def _start_worker(levels: Mapping[str, int]) -> None:
    """Set up the worker: ignore Ctrl-C, which the server handles, and exit when the server has exited."""
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    tqdm.set_lock(threading.RLock())  # the default lock is shared between processes, and leaks if this one is killed
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def can_open_browser() -> bool:
    """Whether a browser opened here would be seen: on a terminal with a display, not over SSH."""
    if not sys.stdout.isatty() or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
