"""The cases of `gpu_streaming.py`, and the figures that matter of what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from vramplan.units import GIB

FLUX, SDXL, VIDEO = "flux.1-dev", "stable-diffusion-xl", "cogvideox-2b"
# Few frames, as the decode of many takes minutes: a step is still bound by computing.
WORKLOADS = {VIDEO: {"num_frames": 17}}
# What `vram` leaves to a plan is less than the card has: FLUX on 12 GiB, SDXL on 4, CogVideoX-2b on 6.
PLANNED = {FLUX: 12, SDXL: 4, VIDEO: 6}
STOCK = {
    "block": "group_offload:stream=true",
    "leaf": "group_offload:type=leaf,stream=true",
    "model": "model_cpu_offload",
    "sequential": "sequential_cpu_offload",
}
PLANS = ("planned", "stock plan")
# Those that copy all weights of the denoiser in every step.
MOVES_ALL = ("block", "leaf", "sequential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pipeline under one placement of its denoiser.

    `form` is `resident`, one of diffusers' calls (`STOCK`), a plan within `PLANNED` (`planned`, or a `stock plan`), or
    what is streamed: all `blocks`, every other one (`half`), `leaves`, or none, so that the component comes as a
    `whole` and stays for its phase. `host` says from where: `locked`, `pageable`, or mapped from a `file`.
    """

    model: str
    form: str
    host: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.model, self.form, self.host)))

    @property
    def streams(self) -> bool:
        return bool(self.host)


def cases() -> list[Case]:
    """The most valuable ones first, but those of one model together; FLUX.1 copied back takes longest, and is last."""
    found = [Case(model=FLUX, form="resident")]
    found += [Case(model=FLUX, form=form, host="locked") for form in ("blocks", "leaves", "whole", "half")]
    found += [Case(model=FLUX, form="blocks", host="pageable")]
    found += [Case(model=FLUX, form=form) for form in ("block", "leaf", *PLANS)]
    found += [Case(model=SDXL, form="resident")]
    found += [Case(model=SDXL, form=form, host="locked") for form in ("blocks", "leaves", "whole")]
    found += [Case(model=SDXL, form=form, host=host) for host in ("pageable", "file") for form in ("blocks", "whole")]
    found += [Case(model=SDXL, form=form) for form in (*STOCK, *PLANS)]
    found += [Case(model=VIDEO, form="resident")]
    found += [Case(model=VIDEO, form=form, host="locked") for form in ("blocks", "leaves", "whole")]
    found += [Case(model=VIDEO, form=form) for form in ("block", "leaf", "model", *PLANS)]
    return [*found, Case(model=FLUX, form="model"), Case(model=FLUX, form="sequential")]


def derived(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """The figures that matter, of a case's own row, of the resident one and of its simulation."""
    row = found["cases"].get(case.name, {})
    resident = found["cases"].get(Case(model=case.model, form="resident").name, {})
    if "phases" not in row:
        return {}
    step = median(row["step_seconds"])
    made: dict[str, Any] = {"step_seconds": step, "call_seconds": row["call_seconds"]}
    # a plan may decode in tiles, which are blended: its latents are compared
    made["equal"] = row["latents_equal"] and (row["pictures_equal"] or bool(row.get("decode")))
    made["peak_bytes"] = max(phase["allocated"] for phase in row["phases"].values())
    compute, bare = median(resident.get("step_seconds", [0.0])), found["link"]["pinned_to_device"]["best"]
    moved = row["denoiser_bytes"] if case.form in MOVES_ALL else median(row["streamed_bytes_per_step"])
    if moved or case.streams:
        made["step_against_bound"] = step / max(compute, moved / row.get("bare_bytes_per_s", bare), 1e-9)
    if row.get("bare_bytes_per_s") and row["copy_bytes_per_s"]:
        made["link_share"] = row["copy_bytes_per_s"] / row["bare_bytes_per_s"]
    if row["locked_bytes"]:
        made["locked_against_streamed"] = row["locked_bytes"] / moved if moved else None
        made["attach_bytes_per_s"] = row["locked_bytes"] / row["apply_seconds"]
        made["undo_seconds"] = row["undo_seconds"]
    projected = row.get("simulated", {}).get("peak_allocated_bytes")
    if projected:
        made["projected_error"] = projected / made["peak_bytes"] - 1
    if "projected_peak_bytes" in row:
        reserved = max(phase["reserved"] for phase in row["phases"].values())
        made["projected_error"] = row["projected_peak_bytes"] / reserved - 1
        made["idle_in_denoise_bytes"] = row["budget_bytes"] - row["phases"]["denoise"]["allocated"]
    return made


def summary(found: dict[str, Any], wanted: list[Case]) -> str:
    lines = [f"{'case':38} {'step s':>8} {'x bound':>8} {'x link':>7} {'GiB':>7} {'sim':>7} {'idle':>6}  bits"]
    for case in wanted:
        row, figures = found["cases"].get(case.name), found["figures"].get(case.name)
        if row is not None and not figures:
            lines.append(f"{case.name:38} {row.get('error') or row.get('out_of_memory')}"[:120])
        elif figures:
            bound, share, error = (figures.get(key) for key in ("step_against_bound", "link_share", "projected_error"))
            idle = figures.get("idle_in_denoise_bytes")
            cells = [
                f"{figures['step_seconds']:8.3f}",
                f"{bound:8.3f}" if bound else " " * 8,
                f"{share:7.1%}" if share else " " * 7,
                f"{figures['peak_bytes'] / GIB:7.2f}",
                f"{error:+7.1%}" if error is not None else " " * 7,
                f"{idle / GIB:6.2f}" if idle is not None else " " * 6,
            ]
            lines.append(" ".join([f"{case.name:38}", *cells, " equal" if figures["equal"] else " DIFFERENT"]))
    return "\n".join(lines)
