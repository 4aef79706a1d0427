"""Serve the page: to this machine alone, with a worker that plans, until it is interrupted."""

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

from vramplan.common.progress import TALKING
from vramplan.errors import UsageError, VramplanError
from vramplan.ui.choices import Wish

_ADDRESS = "127.0.0.1"


def serve(folder: Path | None, port: int | None, say: Callable[[str], None]) -> None:
    """Serves the page until Ctrl-C or SIGTERM, and says its address when it can be opened. `port` None: a free one.

    Raises:
        VramplanError: the packages it is made with are not installed, or the port is taken.
        UsageError: no such folder.
    """
    if find_spec("dash") is None:
        raise VramplanError("vramplan ui needs dash: pip install 'vramplan[ui]'")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    from vramplan.ui.page import make_page

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    app = make_page(folder, Worker().ask)
    server = _server(app.server, port)
    guard(app, server.port)
    for number in (signal.SIGINT, signal.SIGTERM):  # what a script starts in the background ignores the first
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
    """Werkzeug's server is no match for the internet, and need not be: one person on this machine uses it."""
    from werkzeug.serving import make_server

    try:
        listening = socket.create_server((_ADDRESS, port or 0))  # werkzeug's own ends the process where it cannot
    except OSError as error:
        raise VramplanError(f"port {port} cannot be had: choose another `port`, or leave it out") from error
    with listening:
        return make_server(_ADDRESS, port or 0, application, threaded=True, fd=listening.fileno())


def guard(app: Any, port: int) -> None:
    """Refuse what does not come from the page itself.

    A page of another site can make a browser send requests here: by a form or script of its own, with its `Origin`, or
    by a name of its own that it lets point here, which is then the `Host` (DNS rebinding). And the page may load
    nothing from elsewhere.
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
    """A process of its own that plans, so that the page stays alive: one wish after another, as a simulation has its
    process to itself. Of the wishes of one page only the last that waits is worked on."""

    def __init__(self) -> None:
        self._pool = _pool()
        self._lock = threading.Lock()
        self._turns: dict[str, int] = {}

    def ask(self, page: str, call: Callable[[Wish], Any], wish: Wish) -> Any:
        """What the call returns; None where the page has asked for something else meanwhile.

        Raises:
            VramplanError: the process ended.
        """
        turn = self._turns[page] = self._turns.get(page, 0) + 1
        with self._lock:
            if self._turns[page] != turn:
                return None
            try:
                return self._pool.submit(call, wish).result()
            except BrokenProcessPool:
                self._pool = _pool()
                raise VramplanError("the planning process ended, as it does where memory runs out: try again") from None


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=_told())


def _told() -> tuple[dict[str, int]]:
    """From which level on each library talks here."""
    return ({name: logging.getLogger(name).level for name in TALKING},)


def _begin(levels: Mapping[str, int]) -> None:
    """In the worker: Ctrl-C is the server's, and where the server is gone the worker goes too."""
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and missed where this one is ended
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def can_open() -> bool:
    """Whether somebody sits before a screen here who would see a browser open."""
    if not sys.stdout.isatty() or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
