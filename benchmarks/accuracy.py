"""Simulated peaks against peaks that others measured and published (`published_peaks.yaml`).

    python benchmarks/accuracy.py [--rows FILE] [--libraries DIR] [-o FILE.md] [--residuals profiles/residuals.json]

A row that was measured on other versions of diffusers is simulated on the releases of its day, in a process of its own.
They are installed under DIR with pip when they are not there yet; without DIR such rows are left out, and it says so.
FILE is one of `vramplan calibrate --export`, instead of the published rows.

`--residuals` writes what the margin of a budget is worked out from: projected and measured bytes of every row that
nothing was fitted on. By basis: `simulated` as above; `derived` and `assumed` are the prices that the planner falls
back to (components traced one by one, rules of thumb), on the libraries installed here.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import yaml

ROWS = Path(__file__).with_name("published_peaks.yaml")
SHOWN = ("diffusers", "transformers", "accelerate")
GIB = 1 << 30
EXPLAIN_FROM = 0.05
KINDS_OF_ROWS = ("rows", "unstated", "bounds")

Row = Mapping[str, Any]


# ---- in the process that has a row's libraries


def parts_as_loaded(row: Row) -> Any:
    """The model's hollow parts, in the dtypes that the row's script and transformers left them in."""
    from vramplan.pipeline.dtypes import torch_dtype
    from vramplan.profiles.catalogue import load_pipeline_profile
    from vramplan.simulator.parts import parts_from_profile

    profile = load_pipeline_profile(row["model"])
    dtypes = {name: row.get("loads") or part.dtype or profile.dtype for name, part in profile.components.items()}
    parts = parts_from_profile(row["model"], dtypes)
    for name, module in parts.modules.items():
        loads = dtypes[name]
        # transformers 4 kept its float32 modules only when it loaded float16
        transformers4 = type(module).__module__.startswith("transformers.") and int(version("transformers")[0]) < 5
        told = row.get("converts") or (loads if transformers4 and loads != "float16" else None)
        if told:
            module.to(torch_dtype(told))
    return parts


def simulated_gib(row: Row) -> float:
    """The row's peak on the simulated device, with the libraries of this process."""
    import torch

    from vramplan.pipeline.describe import describe
    from vramplan.profiles.catalogue import compute_capability
    from vramplan.simulator.allocator import CachingAllocator
    from vramplan.simulator.kernels import Kernels
    from vramplan.simulator.model import settings_applier
    from vramplan.simulator.run import call_inputs, simulate_call
    from vramplan.strategies.settings import grouped, parse_decode, parse_placement
    from vramplan.units import MIB
    from vramplan.workload import make_workload

    described = describe(row["model"])
    told = row["placement"]
    texts = {part.name: told if isinstance(told, str) else told[part.name] for part in described.spec.components}
    placed = {name: parse_placement(text).complete(described.spec.component(name)) for name, text in texts.items()}
    put_on = settings_applier(grouped(placed), [(parse_decode(text), ["vae"]) for text in row.get("decode", ())])
    work = make_workload(described.defaults, row.get("workload", {}))

    def place(pipe: Any) -> None:
        for name, text in row.get("weights", {}).items():
            pack_weights(pipe.components[name], text)
            if text.startswith("bitsandbytes"):
                pipe.components[name].to("cuda:0")  # where it is quantized, and stays until the plan is applied
            if text == "bitsandbytes:type=int8" and told == "model_cpu_offload":
                mark_8_bit(pipe.components[name])
        for name in row.get("layerwise_casting", ()):
            pipe.components[name].enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        put_on(pipe)
        for method in row.get("before", ()):
            attrgetter(method)(pipe)()

    def call(pipe: Any) -> None:
        inputs = call_inputs(pipe, work)
        for _ in range(row.get("calls", 1)):
            pipe(**inputs | {"output_type": row.get("output_type", "pt")})

    gpu = row.get("gpu", "")
    hopper = gpu.startswith("H") or (compute_capability(gpu) or 0) >= 9  # sources name families, drivers cards
    kernels = Kernels(cublas_bytes=(32 if hopper else 8) * MIB)
    result = simulate_call(parts_as_loaded(row), place, call, CachingAllocator(), kernels)
    peak = result.peak_reserved_bytes if row["metric"] == "reserved" else result.peak_allocated_bytes
    return peak / GIB


def pack_weights(module: Any, text: str) -> None:
    """The module's linear layers as the library of this setting packs them, whatever the release of transformers."""
    from vramplan.pipeline.packed_linear import BitsandbytesInt8, BitsandbytesNf4, GgufLinear, pack
    from vramplan.strategies.settings import parse_setting

    if text.startswith("gguf "):  # what stands outside of blocks is not quantized in such files
        cls = partial(GgufLinear, quant_type=text.removeprefix("gguf "))
        pack(module, cls, lambda path, _: "transformer_blocks." in path)
        return
    setting = parse_setting("weights", text)
    if setting.name != "bitsandbytes":
        setting.lighten(module)
        return
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    cls = BitsandbytesInt8 if setting.type == "int8" else BitsandbytesNf4
    pack(module, cls, lambda path, _: kept.isdisjoint(path.split(".")))
    if type(module).__module__.startswith("transformers.") and int(version("transformers")[0]) < 5:
        for path, part in module.named_modules():  # transformers 4 kept these in float32 beside bitsandbytes
            if not kept.isdisjoint(path.split(".")):
                part.float()


def mark_8_bit(module: Any) -> None:
    """Let the release of diffusers decide whether weights in 8 bits may leave the card, by the marks that it reads."""
    from diffusers.quantizers.quantization_config import QuantizationMethod

    module.is_loaded_in_8bit, module.quantization_method = True, QuantizationMethod.BITS_AND_BYTES


def take_older_group_offloading() -> None:
    """Before `block_modules` was an option of it, blocks inside another module were never found."""
    try:
        from diffusers import hooks
    except ImportError:
        return
    original = getattr(hooks, "apply_group_offloading", None)
    if original and "block_modules" not in inspect.signature(original).parameters:

        def apply(*args: Any, block_modules: Any = None, **kwargs: Any) -> None:
            original(*args, **kwargs)

        hooks.apply_group_offloading = apply


def work_off() -> None:
    """Read rows as JSON lines, write for each its peak or what stopped it, and the versions it ran on."""
    versions = {name: version(name) for name in SHOWN}
    for newer in ("torchao", "peft"):  # older releases of diffusers do not import beside newer ones of these
        sys.modules[newer] = None  # type: ignore[assignment]
    take_older_group_offloading()
    for line in sys.stdin:
        row = json.loads(line)
        try:
            found: dict[str, Any] = {"gib": simulated_gib(row)}
        except Exception as error:
            found = {"stopped": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(found | {"id": row["id"], "versions": versions}), flush=True)


# ---- in the process that was started


def paths_of(sets: Mapping[str, Sequence[str]], folder: Path) -> dict[str, Path]:
    """Where each set of libraries is, installed now if it is not there yet."""
    found = {name: (folder / name).resolve() for name in sets}
    for name, path in found.items():
        if not path.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(path)]
            subprocess.run([*pip, *sets[name]], check=True)
    return found


def is_installed(requirement: str) -> bool:
    """Whether this version of a library is installed here."""
    name, _, wanted = requirement.partition("==")
    return bool(wanted) and version(name) == wanted


def simulate(rows: Sequence[Row], path: Path | None) -> list[dict[str, Any]]:
    """What was found for each row, with the libraries at a path before those installed."""
    before = os.environ.get("PYTHONPATH")
    searched = os.pathsep.join(filter(None, [str(path) if path else None, before]))
    done = subprocess.run(
        [sys.executable, __file__, "--work-off"],
        input="\n".join(json.dumps(row) for row in rows),
        env=os.environ | {"PYTHONPATH": searched},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def all_found(rows: Sequence[Row], sets: Mapping[str, Sequence[str]], folder: Path | None) -> dict[str, dict[str, Any]]:
    """Findings by row. A row without one needs libraries that are not here."""
    wanted = sorted({row["with"] for row in rows if "with" in row})
    paths: dict[str | None, Path | None] = {None: None}
    paths |= {name: None for name in wanted if all(map(is_installed, sets[name]))}
    wanted = [name for name in wanted if name not in paths]
    if folder:
        paths.update(paths_of({name: sets[name] for name in wanted}, folder))
    found: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        here = [row for row in rows if row.get("with") == name]
        found |= {item["id"]: item for item in (simulate(here, path) if here else [])}
    return found


# Kinds of strategy, in the order of the table: the first that fits a row.
QUANTIZED, SEVERAL = "quantized weights", "several pictures at once"
KINDS = {
    "resident": "everything resident",
    "model_cpu_offload": "model offload",
    "sequential_cpu_offload": "sequential offload",
    "": "group offload",
}
# Kinds of call that have a margin of their own (vramplan.planner.residuals.CallKind).
MARGIN_KINDS = {QUANTIZED: "quantized", SEVERAL: "several"}


def kind_of(row: Row) -> str:
    """The kind of strategy that a row is of: what is done to weights, else the batch, else the placement."""
    if row.keys() & {"weights", "layerwise_casting"}:
        return QUANTIZED
    if row.get("workload", {}).get("num_images_per_prompt", 1) > 1:
        return SEVERAL
    return KINDS.get(row["placement"] if isinstance(row["placement"], str) else "", KINDS[""])


def by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each kind of strategy that has any."""
    kinds = (*KINDS.values(), SEVERAL, QUANTIZED)
    return {kind: found for kind in kinds if (found := [row for row in rows if kind_of(row) == kind])}


def table(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| row | placement | diffusers, transformers, accelerate | metric | published GiB | simulated GiB | error |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for kind, of_kind in by_kind(rows).items():
        lines += [f"| **{kind}** | | | | | | |", *_lines(of_kind, found)]
    return lines


def placement_text(row: Row) -> str:
    placed = row["placement"] if isinstance(row["placement"], str) else "by component"
    placed += "".join(f" + {text}" for text in (*row.get("decode", ()), *row.get("before", ())))
    placed += "".join(f" + {text} {name}" for name, text in row.get("weights", {}).items())
    return placed + (" + layerwise casting" if "layerwise_casting" in row else "")


def _lines(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        item = found[row["id"]]
        cells = [row["id"], placement_text(row), ", ".join(item["versions"].values()), row["metric"], f"{row['gib']:g}"]
        cells += [f"{item['gib']:.2f}", f"{item['gib'] / row['gib'] - 1:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---- what margins are worked out from


def priced_bytes(row: Row, basis: str) -> int | None:
    """The row's peak as the planner prices it without simulating the call; None for what has no such price."""
    from vramplan.hardware.types import Accelerator
    from vramplan.pipeline.describe import describe
    from vramplan.planner.demand import Pricer
    from vramplan.planner.footprint import AssumedFootprint
    from vramplan.simulator.model import SimulatedModel, traced_footprint
    from vramplan.strategies.settings import parse_decode, parse_placement
    from vramplan.workload import make_workload

    if row.keys() & {"layerwise_casting", "before", "weights"}:
        return None
    described = describe(row["model"], dtype=row.get("loads"))
    spec, work = described.spec, make_workload(described.defaults, row.get("workload", {}))
    card = Accelerator(kind="cuda", index=0, name=row.get("gpu", "any"), total_bytes=80 * GIB, free_bytes=None)
    told = row["placement"]
    texts = {part.name: told if isinstance(told, str) else told[part.name] for part in spec.components}
    placed = {name: parse_placement(text).complete(spec.component(name)) for name, text in texts.items()}
    assumed = AssumedFootprint(spec=spec, workload=work)
    footprint = assumed if basis == "assumed" else traced_footprint(SimulatedModel(spec), work, card)
    decode = tuple(parse_decode(text) for text in row.get("decode", ()))
    demand = Pricer(spec, work, footprint, card)(placed, decode)
    return demand.vram_reserved_bytes if row["metric"] == "reserved" else demand.vram_allocated_bytes


def residuals(rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Projected and measured bytes of every row that counts for the margin, by basis and kind of call."""
    projections = []
    for basis in ("simulated", "derived", "assumed"):
        for row in rows:
            if not row.get("margin", not row.get("fitted")) or "gib" not in found.get(row["id"], {}):
                continue
            click.echo(f"{basis} {row['id']}", err=True)
            projected = found[row["id"]]["gib"] * GIB if basis == "simulated" else priced_bytes(row, basis)
            if projected is not None:
                item = {"basis": basis, "projected_bytes": round(projected), "measured_bytes": round(row["gib"] * GIB)}
                item |= {"kind": MARGIN_KINDS.get(kind_of(row), "plain"), "fitted": row.get("fitted", False)}
                projections.append(item | {"row": row["id"], "metric": row["metric"], "source": row["source"]})
    return {
        "about": "Peaks that others measured and published, and what was projected for them. Made by "
        "`python benchmarks/accuracy.py --libraries DIR --residuals FILE` from benchmarks/published_peaks.yaml.",
        "torch": version("torch"),
        "projections": projections,
    }


def write_residuals(path: Path, content: Mapping[str, Any]) -> None:
    """One projection to a line."""
    lines = ",\n".join(f"    {json.dumps(item)}" for item in content["projections"])
    head = {key: value for key, value in content.items() if key != "projections"}
    path.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "projections": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def report(told: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    rows, unstated, bounds = (told[kind] for kind in KINDS_OF_ROWS)
    ran = {name: item for name, item in found.items() if "gib" in item}
    shown = [row for row in rows if row["id"] in ran]
    errors = {row["id"]: abs(ran[row["id"]]["gib"] / row["gib"] - 1) for row in shown if not row.get("fitted")}
    lines = [
        f"Simulated with torch {version('torch')}, "
        "each row on the releases of its day: few sources state their versions.",
        "",
    ]
    lines += [*table(shown, ran), ""]
    if errors:
        worst = max(errors, key=errors.__getitem__)
        lines += [
            f"{len(errors)} rows that nothing was fitted on: median error {statistics.median(errors.values()):.1%}, "
            f"nine of ten within {quantile(list(errors.values()), 0.9):.1%}, largest {errors[worst]:.1%} ({worst}).",
            "",
            *short_lines(shown, ran),
            *kinds_table(shown, ran),
        ]
    remarks = [f"* {row['id']}: {row['remark']}" for row in shown if "remark" in row]
    remarks += [
        f"* {row['id']}: NOT EXPLAINED"
        for row in shown
        if errors.get(row["id"], 0) > EXPLAIN_FROM and "remark" not in row
    ]
    lines += ["Remarks:", "", *remarks, ""] if remarks else []
    apart = [row for row in unstated if row["id"] in ran]
    if apart:
        lines += ["Published without saying enough, so not judged:", "", *table(apart, ran), ""]
        lines += [*(f"* {row['id']}: {row['unknown']}" for row in apart), ""]
    lines += bounds_table([row for row in bounds if row["id"] in ran], ran)
    left = [row["id"] for row in (*rows, *unstated, *bounds) if row["id"] not in ran]
    lines += [f"* left out: {name} ({_why(found.get(name))})" for name in left]
    if told.get("not_taken"):
        lines += ["", "Published, and no row here:", ""]
        lines += [f"* {item['peaks']}: {item['why'].strip()}" for item in told["not_taken"]]
    return "\n".join(lines).rstrip()


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def short_lines(rows: Sequence[Row], ran: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows whose published peak is above the simulated one by more than the margin of a plan of their kind."""
    from vramplan.calibration.published_errors import bundled_error

    short = []
    for row in rows:
        simulated, kind = ran[row["id"]]["gib"] * GIB, MARGIN_KINDS.get(kind_of(row))
        error = bundled_error("simulated", [kind] if kind else ())
        if row["gib"] * GIB > simulated + max(error.least_bytes, error.share * simulated) + 1:  # a byte of rounding
            short.append(row["id"])
    return [f"Too low by more than the margin of a plan of their kind: {', '.join(short) or 'none'}.", ""]


def bounds_table(rows: Sequence[Row], ran: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Bounds that tests assert, in 10^9 bytes, and whether the simulation keeps them."""
    if not rows:
        return []
    lines = ["Bounds that diffusers' own tests assert, in GB of 10^9 bytes:", ""]
    lines += ["| row | placement | bound | simulated GB | kept |", "|---|---|---|--:|---|"]
    for row in rows:
        side, limit = row["bound"].split()
        size = ran[row["id"]]["gib"] * GIB / 1e9
        kept = size < float(limit) if side == "below" else size > float(limit)
        cells = [row["id"], placement_text(row), row["bound"], f"{size:.2f}", "yes" if kept else "**no**"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def kinds_table(rows: Sequence[Row], ran: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far off the rows of each kind are, and by how much one was too low at most; rows that were fitted on too."""
    lines = [
        "| kind of strategy, fitted rows included | rows | median error | largest error | most too low |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind, of_kind in by_kind(rows).items():
        errors = [ran[row["id"]]["gib"] / row["gib"] - 1 for row in of_kind]
        sizes = [abs(error) for error in errors]
        low = max(0.0, -min(errors))
        lines.append(f"| {kind} | {len(sizes)} | {statistics.median(sizes):.1%} | {max(sizes):.1%} | {low:.1%} |")
    return [*lines, ""]


def _why(item: Mapping[str, Any] | None) -> str:
    return str(item["stopped"]) if item else "its libraries are not here: --libraries DIR installs them"


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--libraries", type=click.Path(file_okay=False, path_type=Path), help="Where older libraries are kept.")
@click.option("--residuals", "residuals_path", type=click.Path(dir_okay=False, path_type=Path), help="Write them here.")
@click.option("--rows", "rows_path", type=click.Path(dir_okay=False, exists=True, path_type=Path), default=ROWS)
@click.option("--only", multiple=True, help="Rows whose name has this in it.")
@click.option("--work-off", "working", is_flag=True, hidden=True)
def main(
    output: Path | None,
    libraries: Path | None,
    residuals_path: Path | None,
    rows_path: Path,
    only: tuple[str, ...],
    working: bool,
) -> None:
    if working:
        work_off()
        return
    told = yaml.safe_load(rows_path.read_text(encoding="utf-8"))
    for kind in KINDS_OF_ROWS:
        told[kind] = [row for row in told.get(kind, ()) if not only or any(part in row["id"] for part in only)]
    found = all_found([row for kind in KINDS_OF_ROWS for row in told[kind]], told["libraries"], libraries)
    text = report(told, found)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    if residuals_path:
        write_residuals(residuals_path, residuals(told["rows"], found))


if __name__ == "__main__":
    main()
