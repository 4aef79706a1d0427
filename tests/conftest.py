"""Real pipelines with random weights, made once per session and loaded afresh by every test that asks."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Before any library reads them. The variable and not torch.set_num_threads alone: the processes that tests
# start inherit it, and tests that need no torch need not import it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Through a pipe nothing is wrapped; xdist tells its workers how wide its own terminal is.
os.environ.pop("COLUMNS", None)
# Simulations are kept for the session, never in the cache of whoever runs the tests. Workers of xdist inherit the
# variable and share them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["VRAMPLAN_CACHE"] = tempfile.mkdtemp(prefix="vramplan-tests-")
# Nor does what was measured on this machine play a part, or what tests measure.
os.environ["VRAMPLAN_CALIBRATION"] = tempfile.mkdtemp(prefix="vramplan-tests-")
# The profiles of whoever runs the tests would stand in for bundled ones.
os.environ["VRAMPLAN_PROFILES"] = str(Path(os.environ["VRAMPLAN_CACHE"]) / "profiles")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests marked `diagonal(a, b)`, as few pairs as bring every `a` and every `b`; all where VRAMPLAN_TESTS=all."""
    if os.environ.get("VRAMPLAN_TESTS") == "all":
        return
    values: dict[tuple[object, str], list[object]] = {}  # of each parameter, in their order
    marked = {item: mark.args for item in items if (mark := item.get_closest_marker("diagonal"))}

    def of(item: pytest.Item, name: str) -> tuple[object, list[object]]:
        value = item.callspec.params[name]  # type: ignore[attr-defined]
        return value, values.setdefault((item.function, name), [])  # type: ignore[attr-defined]

    for item, names in marked.items():
        for value, seen in (of(item, name) for name in names):
            if value not in seen:
                seen.append(value)
    left = set()
    for item, names in marked.items():
        pair = [of(item, name) for name in names]
        fewest = min(len(seen) for _, seen in pair)
        if len({seen.index(value) % fewest for value, seen in pair}) > 1:
            left.add(item)
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]
    _left_out.update(item.nodeid for item in left)


_left_out: set[str] = set()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist tells the controller which pairs it left out: every worker collects all tests."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = sorted(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """What a worker told is kept for the summary."""
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The summary says when pairs were left out."""
    if _left_out:
        terminalreporter.write_line(f"{len(_left_out)} pairs of parameters left out (VRAMPLAN_TESTS=all runs them)")


@pytest.fixture(scope="session")
def _quiet_libraries() -> None:
    import diffusers
    import make_pipeline  # noqa: F401 - the classes of the small pipelines
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


_imported = 0


@pytest.fixture(autouse=True)
def _libraries_are_no_garbage() -> None:
    """Collecting garbage passes over all that libraries made when they were imported, before this test.

    Loading and undoing collect it, and so do tests of what is left over: 0.2 s and more each time.
    """
    global _imported  # noqa: PLW0603
    if len(sys.modules) > _imported:
        gc.collect()
        gc.freeze()
        _imported = len(sys.modules)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory, _quiet_libraries: None) -> Callable[[str], Path]:
    """`small_folder("sd15-small")`: the folder of that pipeline. Shared by the session: to be read only."""
    import make_pipeline

    @cache
    def folder(kind: str) -> Path:
        return make_pipeline.save(kind, tmp_path_factory.mktemp("pipelines") / kind)

    return folder


@pytest.fixture(scope="session")
def small_pipeline(small_folder: Callable[[str], Path]) -> Callable[..., DiffusionPipeline]:
    """`small_pipeline("sd15-small", **from_pretrained_options)`: a new instance of it at every call."""
    from diffusers import DiffusionPipeline

    def load(kind: str, **options: Any) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(small_folder(kind), local_files_only=True, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def address(small_folder: Callable[[str], Path]) -> Iterator[str]:
    """Where `vramplan ui` serves the page; it ends with exit code 0 and without a word when it is interrupted."""
    command = [sys.executable, "-m", "vramplan", "ui", str(small_folder("sd15-small").parent), "--no-open"]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        yield served.stdout.readline().strip()
        served.send_signal(signal.SIGINT)
        _, said = served.communicate(timeout=60)
        assert (served.returncode, said) == (0, "")
    finally:
        served.kill()
        served.communicate()
