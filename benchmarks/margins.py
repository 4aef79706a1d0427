"""What the margin costs: the choice within the budget of a whole card, by this margin and by 6 %, at least 512 MiB.

    python benchmarks/margins.py [PIPELINE ...] [-o FILE.md]

The second is what was kept free before margins came from residuals. Each choice is also held against the fastest stock
diffusers call within the same budget. All times are the planner's own prices.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click
from regret import CARD, Case, fastest_stock
from regret_candidates import subject_of

from vramplan.calibration.published_errors import bundled_error
from vramplan.hardware.types import Hardware, Host
from vramplan.planner.budget import make_budget
from vramplan.profiles.catalogue import device_accelerator, load_device_profile
from vramplan.units import GIB, MIB

PIPELINES = ("stable-diffusion-xl", "flux.1-dev", "cogvideox-5b")
CARD_GIB = (8, 12, 16, 24, 48, 80)
RAM_GIB = 64


@click.command()
@click.argument("pipelines", nargs=-1)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
def main(pipelines: tuple[str, ...], output: Path | None) -> None:
    card = device_accelerator(load_device_profile(CARD))
    host = Host(total_bytes=2 * RAM_GIB * GIB, available_bytes=2 * RAM_GIB * GIB)
    lines = [
        "| pipeline | card GiB | kept free before, GiB | now | seconds before | now | fastest stock call now |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    error = bundled_error("simulated")
    slower = 0  # times count to their third digit
    for name in pipelines or PIPELINES:
        subject = subject_of(name, card)
        for size in CARD_GIB:
            whole = replace(card, total_bytes=size * GIB, free_bytes=size * GIB, display=False)
            hardware = Hardware(accelerators=(whole,), host=host)
            before = make_budget(hardware, error=error, margin=str(max(int(0.06 * size * GIB), 512 * MIB)))
            now = make_budget(hardware, error=error)
            found = []
            for budget in (before, now):
                assert budget.vram_bytes is not None
                case = Case(subject=subject, vram_gib=budget.vram_bytes / GIB, ram_gib=RAM_GIB, allow=None)
                chosen, _, _ = case.choose()
                stock = fastest_stock(case, chosen.decision.quality) if chosen else None
                kept = sum(item.size_bytes for item in budget.deductions if item.name == "margin") / GIB
                found.append((kept, chosen.demand.seconds_per_call if chosen else None, stock[1] if stock else None))
            (kept_before, seconds_before, _), (kept, seconds, stock_seconds) = found
            times = (seconds_before, seconds, stock_seconds)
            slower += seconds is None or any(
                other is not None and seconds > other * 1.01 for other in (seconds_before, stock_seconds)
            )
            told = ["-" if value is None else f"{value:.4g}" for value in times]
            lines.append(f"| {name} | {size} | {kept_before:.2f} | {kept:.2f} | {' | '.join(told)} |")
    text = "\n".join([*lines, "", f"{slower} of {len(lines) - 2} are slower than before or than a stock call."])
    click.echo(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    sys.exit(slower > 0)


if __name__ == "__main__":
    main()
