"""Simulate every pipeline that diffusers' own tests can build offline, under every placement; or run it for real.

    python benchmarks/conformance.py --diffusers-tests DIR [--only NAME] [--json FILE]
                                     [--strategies resident,model,sequential,group,block,disk,stream,phase]
                                     [--limit N] [--jobs N] [--part 1/4]

`--strategies bits` makes each pipeline's call for real on the CPU under every lossless plan instead: see
`conformance_bits.py`. `--part` takes every so many files of tests, to run in pieces, and `--merge FILES` puts what
`--json` kept of them together.

DIR is the `tests` folder of a checkout of diffusers. It may be of another version than the library that is
installed: files that cannot be imported are told of and left out.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from conformance_bits import BITS, outcomes
from conformance_machine import accelerator, all_streamed

STRATEGIES = ("resident", "model", "sequential", "group", "block", "disk", "stream", "phase")
_SECONDS = 180  # of the CPU, for one call
_HF_IDS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu"}
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


class TimedOutError(Exception):
    """A simulated call did not end in time."""


def main() -> None:
    args = _arguments()
    if args.merge:
        Path(args.json).write_text(json.dumps(_merged(args.merge), indent=1) + "\n")
        return
    folder = Path(args.diffusers_tests).resolve()
    files = sorted(path.relative_to(folder) for path in folder.glob("pipelines/**/test_*.py"))
    part, parts = map(int, args.part.split("/"))
    files = files[part - 1 :: parts]
    strategies = list(BITS) if args.strategies == "bits" else args.strategies.split(",")
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    jobs = ((folder, file, args.only, strategies, args.limit, args.trace) for file in files)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for made in pool.map(_file_rows, jobs):
            for row in made:
                if row["pipeline"] in seen:
                    continue
                if row["built"]:
                    seen.add(row["pipeline"])
                rows.append(row)
                _show(row)
            _keep(args, rows, seen, strategies)
            if args.limit and len(seen) >= args.limit:
                pool.shutdown(cancel_futures=True)
                break
    rows = [row for row in rows if row["built"] or row["pipeline"] not in seen]
    print(_summary(rows, strategies))
    print(f"{time.perf_counter() - started:.0f} s")
    _keep(args, rows, seen, strategies)


def _keep(args: argparse.Namespace, rows: Sequence[dict[str, Any]], seen: set[str], strategies: Sequence[str]) -> None:
    """Write what is known so far: a run that is cut off is not lost."""
    if args.json:
        told = [row for row in rows if row["built"] or row["pipeline"] not in seen]
        Path(args.json).write_text(json.dumps(_record(told, strategies, args.note), indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--diffusers-tests", metavar="DIR")
    what.add_argument("--merge", nargs="+", metavar="FILE", help="records of parts, the first with the words to keep")
    parser.add_argument("--only", help="pipelines or files whose name has this in it")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="several of these, or bits")
    parser.add_argument("--json")
    parser.add_argument("--note", default="", help="words to keep with the results, such as the version of the tests")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="such as 2/5: the second of five")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="print the traceback of each failure")
    return parser.parse_args()


# ---- one file of tests


def _file_rows(job: tuple[Path, Path, str | None, Sequence[str], int, bool]) -> list[dict[str, Any]]:
    """A row for each pipeline of one file of tests."""
    folder, file, only, strategies, limit, trace = job
    if only and limit == 0 and not _mentions(folder / file, only):
        return []
    os.environ.update(_HF_IDS)
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    from conformance_standins import stand_ins

    with stand_ins():
        name = ".".join(("tests", *file.with_suffix("").parts))
        try:
            with _quiet():
                module = importlib.import_module(name)
        except BaseException as error:
            return [{"pipeline": str(file), "built": False, "reason": _line(error)}]
        rows = [_row(cls, strategies, trace) for cls in _configs(module) if not only or _wanted(cls, file, only)]
    return _distinct(rows)


def _distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each pipeline class, one that was built if there is one."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["pipeline"] not in best or (row["built"] and not best[row["pipeline"]]["built"]):
            best[row["pipeline"]] = row
    return list(best.values())


def _mentions(path: Path, only: str) -> bool:
    return only in str(path) or only in path.read_text()


def _wanted(cls: type, file: Path, only: str) -> bool:
    return only in str(file) or only == cls.pipeline_class.__name__  # type: ignore[attr-defined]


def _configs(module: Any) -> Iterator[type]:
    """The classes that say how to build and call a pipeline: one for each pipeline class."""
    done: set[Any] = set()
    for cls in vars(module).values():
        if not inspect.isclass(cls) or inspect.getattr_static(cls, "get_dummy_components", None) is None:
            continue
        pipeline = inspect.getattr_static(cls, "pipeline_class", None)
        if inspect.isclass(pipeline) and pipeline not in done:
            done.add(pipeline)
            yield cls


def _row(cls: type, strategies: Sequence[str], trace: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"pipeline": _name(cls.pipeline_class), "built": False}  # type: ignore[attr-defined]
    try:
        with _quiet(), _alarm():
            pipe, inputs = _built(cls)
    except BaseException as error:
        if trace:
            traceback.print_exc()
        return row | {"reason": _line(error)}
    row["built"] = True
    bits = [strategy for strategy in strategies if strategy in BITS]
    if bits:
        with _quiet():
            found = dict(outcomes(pipe, inputs, bits, _alarm))
        return row | {name: {"status": status, "reason": reason} for name, (status, reason) in found.items()}
    for strategy in strategies:
        status, reason = _outcome(pipe, inputs, strategy, trace)
        if status == "failed":
            status, reason = _judged(pipe, inputs, reason)
        row[strategy] = {"status": status, "reason": reason}
    return row


def _name(pipeline: type) -> str:
    """The name of the library's class, where the test wraps it in one of its own."""
    return next((cls.__name__ for cls in pipeline.__mro__ if cls.__module__.startswith("diffusers.")), str(pipeline))


def _built(cls: Any) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """The pipeline of a test class, and a function that makes the arguments of a call."""
    import torch

    case = cls()
    torch.manual_seed(0)
    pipe = cls.pipeline_class(**_called(case.get_dummy_components))

    def inputs() -> dict[str, Any]:
        torch.manual_seed(0)
        return _called(case.get_dummy_inputs)  # type: ignore[no-any-return]

    inputs()
    return pipe, inputs


def _called(method: Callable[..., Any]) -> Any:
    takes = inspect.signature(method).parameters
    required = {name for name, parameter in takes.items() if parameter.default is parameter.empty}
    options = {"device": "cpu", "adapter_type": "full_adapter"}
    return method(**{name: value for name, value in options.items() if name in required})


# ---- one simulated call


def _outcome(pipe: Any, inputs: Callable[[], dict[str, Any]], strategy: str, trace: bool) -> tuple[str, str]:
    """`ok`, `refused` or `failed`, and why."""
    from vramplan.errors import VramplanError

    try:
        with _quiet(), _alarm():
            place = _PLACES[strategy](pipe)
            if isinstance(place, str):
                return "refused", place
            _simulate(pipe, inputs(), place)
    except VramplanError as error:
        if trace:
            traceback.print_exc()
        return "failed", _line(error)
    except BaseException as error:
        if trace:
            traceback.print_exc()
        return "failed", f"outside of the simulation: {_line(error)}"
    return "ok", ""


def _judged(pipe: Any, inputs: Callable[[], dict[str, Any]], reason: str) -> tuple[str, str]:
    """A failure of the real pipeline on the CPU is none of the simulation's: `unfit`."""
    try:
        with _quiet(), _alarm():
            pipe(**inputs())
    except BaseException as error:
        return "unfit", f"the real call fails too: {_line(error)}"
    return "failed", reason


def _simulate(pipe: Any, inputs: Mapping[str, Any], place: Callable[[Any], None]) -> None:
    from vramplan.simulator.allocator import CachingAllocator
    from vramplan.simulator.kernels import Kernels
    from vramplan.simulator.parts import parts_from_live
    from vramplan.simulator.run import simulate_call

    def call(hollow: Any) -> None:
        hollow(**_on_device(inputs))

    simulate_call(parts_from_live(pipe), place, call, CachingAllocator(), Kernels())


def _on_device(given: Any) -> Any:
    """The same arguments with every tensor on the simulated device, where upstream's tests have theirs."""
    import torch

    if isinstance(given, torch.Tensor):
        return given.to("cuda:0")
    if isinstance(given, dict):
        return {key: _on_device(item) for key, item in given.items()}
    if type(given) in (list, tuple):
        return type(given)(_on_device(item) for item in given)
    return given


Place = Callable[[Any], None] | str


def _resident(pipe: Any) -> Place:
    return lambda hollow: hollow.to("cuda:0")


def _whole(setting: Any) -> Callable[[Any], Place]:
    """A placement of the whole pipeline, or why some component refuses it."""

    def choose(pipe: Any) -> Place:
        spec = _spec(pipe)
        for component in spec.components:
            reason = setting.refusal(component, spec, accelerator())
            if reason:
                return str(reason)
        names = [component.name for component in spec.components]
        return lambda hollow: setting.apply(hollow, names, "cuda:0")

    return choose


def _parts(placement: str | Callable[[Any], str]) -> Callable[[Any], Place]:
    """That placement of every component that can be; what cannot stays on the device."""

    def choose(pipe: Any) -> Place:
        from vramplan.strategies.settings import parse_placement

        spec = _spec(pipe)
        texts = {c.name: placement if isinstance(placement, str) else placement(c) for c in spec.components}
        settings = {c.name: parse_placement(texts[c.name]).complete(c) for c in spec.components}
        reasons = {c.name: settings[c.name].refusal(c, spec, accelerator()) for c in spec.components}
        names = [name for name, reason in reasons.items() if reason is None]
        if not names:
            return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())

        def place(hollow: Any) -> None:
            for name, reason in reasons.items():
                if reason is None:
                    settings[name].apply(hollow, [name], "cuda:0")
                else:
                    hollow.components[name].to("cuda:0")

        return place

    return choose


def _spec(pipe: Any) -> Any:
    from vramplan.pipeline.live import spec_from_pipeline

    return spec_from_pipeline(pipe)


def _places() -> dict[str, Callable[[Any], Place]]:
    from vramplan.strategies.model_cpu_offload import ModelCpuOffload
    from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload

    return {
        "resident": _resident,
        "model": _whole(ModelCpuOffload()),
        "sequential": _whole(SequentialCpuOffload()),
        "group": _parts("group_offload:type=leaf"),
        "block": _parts("group_offload"),
        "disk": _parts("group_offload:disk=true"),
        "stream": _parts(all_streamed),
        "phase": _parts("weight_streaming"),
    }


_PLACES = _places()


# ---- what is told


@contextmanager
def _quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimedOutError(f"not done after {_SECONDS} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if type(error).__name__ == "SimulationError" else f"{type(error).__name__}: {text}"
    return text[:300]


def _show(row: Mapping[str, Any]) -> None:
    if not row["built"]:
        print(f"{row['pipeline']:48} not built   {row['reason']}", flush=True)
        return
    for strategy, found in row.items():
        if isinstance(found, dict):
            print(f"{row['pipeline']:48} {strategy:11} {found['status']:8} {found['reason']}", flush=True)


def _summary(rows: Sequence[Mapping[str, Any]], strategies: Sequence[str]) -> str:
    built = [row for row in rows if row["built"]]
    lines = ["", f"built {len(built)} pipelines; {len(rows) - len(built)} could not be built here"]
    for strategy in strategies:
        counts = Counter(row[strategy]["status"] for row in built)
        asked = len(built) - counts["refused"] - counts["unfit"]
        share = 100 * counts["ok"] / asked if asked else 0.0
        lines.append(
            f"{strategy:11} ran {counts['ok']:3} of {asked:3} ({share:.1f} %), "
            f"refused {counts['refused']}, unfit {counts['unfit']}, failed {counts['failed']}"
        )
    return "\n".join(lines)


def _record(rows: Sequence[Mapping[str, Any]], strategies: Sequence[str], note: str) -> dict[str, Any]:
    """What is worth keeping: versions, counts, and a status for each pipeline and strategy."""
    built = [row for row in rows if row["built"]]
    pipelines = {
        row["pipeline"]: {s: {key: row[s][key] for key in ("status", "reason") if row[s][key]} for s in strategies}
        for row in built
    }
    return {
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in _LIBRARIES},
        "note": note,
        "built": len(built),
        "counts": {s: dict(Counter(row[s]["status"] for row in built)) for s in strategies},
        "pipelines": pipelines,
        "not_built": {row["pipeline"]: row["reason"] for row in rows if not row["built"]},
    }


def _merged(files: Sequence[str]) -> dict[str, Any]:
    """One record of several, a pipeline by the first that has it."""
    records = [json.loads(Path(file).read_text()) for file in files]
    first = records[0]
    pipelines = {name: row for record in reversed(records) for name, row in record["pipelines"].items()}
    unbuilt = {name: reason for record in records for name, reason in record["not_built"].items()}
    strategies = list(next(iter(pipelines.values())))
    return {
        "versions": first["versions"],
        "note": first["note"],
        "built": len(pipelines),
        "counts": {s: dict(Counter(row[s]["status"] for row in pipelines.values())) for s in strategies},
        "pipelines": dict(sorted(pipelines.items())),
        "not_built": {name: reason for name, reason in unbuilt.items() if name not in pipelines},
    }


if __name__ == "__main__":
    main()
