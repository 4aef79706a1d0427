"""The Markdown of `regret.py`: tables of cases."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regret_peers import PEERS

from vramplan.strategies.base import Quality

# The levels of quality tried in turn where none is allowed.
LEVELS: tuple[Quality, ...] = ("lossless", "near_lossless")
# Idle VRAM that is forgiven while something is streamed: this much, this share of the budget, or the smallest block.
IDLE_GIB, IDLE_SHARE = 0.5, 0.05
# Page-locked bytes of those that are copied from them.
LOCKED_SHARE = 1.02
# A ratio below this is faster: of prices that agree in the third digit the planner takes the simpler plan.
FASTER = 0.995
Cases = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What the cases were made from."""

    card: str
    vram_gib: Sequence[int]
    ram_gib: Sequence[int]
    confirmed_ram_gib: int


def ratios(cases: Cases, of: Callable[[Mapping[str, Any]], float | None]) -> list[float]:
    """By how much what `of` gives is slower than the choice, where both are."""
    pairs = ((of(case), case["chosen"]) for case in cases)
    return [seconds / chosen["seconds"] for seconds, chosen in pairs if seconds and chosen]


def mean_and_worst(values: Sequence[float]) -> list[str]:
    """Geometric mean, the least and the largest."""
    if not values:
        return ["-", "-", "-"]
    return [f"{math.exp(statistics.fmean(map(math.log, values))):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]


def by_pipeline(cases: Cases) -> list[str]:
    lines = [
        "| pipeline | cases | something fits | failures | fastest stock / chosen: mean | least | largest |"
        " only ours fits | something is streamed | seconds a decision, median, largest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in (*dict.fromkeys(case["pipeline"] for case in cases), "all"):
        own = [case for case in cases if name in ("all", case["pipeline"])]
        fits = [case for case in own if case["chosen"]]
        took = [case["planning_seconds"] for case in own]
        cells = [name, len(own), len(fits), sum(bool(case["failures"]) for case in own)]
        cells += mean_and_worst(ratios(own, _stock_seconds))
        cells += [sum(not case["stock"] for case in fits), sum(bool(case["blocks_gib"]) for case in fits)]
        cells += [f"{statistics.median(took):.3f}, {max(took):.3f}"]
        lines.append(_line(cells))
    return lines


def _stock_seconds(case: Mapping[str, Any]) -> float | None:
    return case["stock"]["seconds"] if case["stock"] else None


def by_peer(cases: Cases) -> list[str]:
    lines = [
        "| rule | fits plainly | only with tiles set by hand | out of memory or refuses, where ours fits |"
        " its seconds / chosen: mean | least | largest | a step: least |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    fits = [case for case in cases if case["chosen"]]
    for name in PEERS:
        found = [case["peers"][name] for case in fits]
        able = [item for item in found if "seconds" in item]
        tiled = sum(item["tiled"] for item in able)
        cells = [name, len(able) - tiled, tiled, len(found) - len(able)]
        step = mean_and_worst([item["step"] / case["chosen"]["step"] for case, item in _steps(fits, name)])[1]
        lines.append(_line([*cells, *mean_and_worst(ratios(fits, _seconds_of(name))), step]))
    return lines


def _steps(cases: Cases, peer: str) -> Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The cases in which both have steps to compare."""
    found = ((case, case["peers"][peer]) for case in cases)
    return ((case, item) for case, item in found if item.get("step") and case["chosen"]["step"])


def _seconds_of(peer: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Its seconds, where it changes the picture no more than the choice may: tiles do."""

    def seconds(case: Mapping[str, Any]) -> float | None:
        found = case["peers"][peer]
        as_faithful = not found.get("tiled") or case["allow"] or case["chosen"]["quality"] != "lossless"
        return found.get("seconds") if as_faithful else None

    return seconds


def by_stock_call(cases: Cases) -> list[str]:
    """How often each stock call runs out of memory where the choice fits."""
    fits = [case for case in cases if case["chosen"]]
    short: dict[str, int] = {}
    fastest: dict[str, int] = {}
    for case in fits:
        for call in case["stock_short"]:
            short[call] = short.get(call, 0) + 1
        if case["stock"]:
            fastest[case["stock"]["call"]] = fastest.get(case["stock"]["call"], 0) + 1
    lines = ["| stock call | out of memory where ours fits | the fastest that fits |", "|---|--:|--:|"]
    return lines + [_line([call, short.get(call, 0), fastest.get(call, 0)]) for call in sorted({*short, *fastest})]


def by_run(cases: Cases, grid: Grid) -> list[str]:
    """What ran on the simulated device."""
    ran = [case for case in cases if "simulated" in case]
    ours = [case for case in ran if case["simulated"]["chosen"]]
    tries = [case["simulated"]["tries"] for case in ours]
    stock = [case["simulated"]["stock_runs"] for case in ran if case["stock"]]
    worse = [case["simulated"]["chosen"]["seconds"] / case["chosen"]["seconds"] for case in ours if case["chosen"]]
    names = ", ".join(dict.fromkeys(case["pipeline"] for case in ran))
    lines = [
        f"{len(ran)} cases were run within their capacity ({names}, {grid.confirmed_ram_gib} GiB of RAM). A plan was "
        f"confirmed in {len(ours)}, after {statistics.fmean(tries):.1f} simulations on average and {max(tries)} at "
        f"most; it takes at most {max(worse):.2f} times as long as the unconfirmed one. The fastest stock call ran in "
        f"{stock.count(True)} of the {len(stock)} that had one.",
        "",
        "| rule | runs plainly | only with tiles set by hand | out of memory, where ours runs | not simulated |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in PEERS:
        found = [case["simulated"]["peers"][name] for case in ours]
        counted = [found.count(kind) for kind in ("plain", "tiled", "out of memory")]
        lines.append(_line([name, *counted, len(found) - sum(counted)]))
    return lines


def listed(cases: Cases, wanted: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """One line for each remark, with the budgets it was made at."""
    found: dict[str, list[str]] = {}
    for case in cases:
        remark = wanted(case)
        if remark:
            allow = "" if case["allow"] is None else f" {case['allow']}"
            found.setdefault(remark, []).append(f"{case['vram_gib']}/{case['ram_gib']}{allow}")
    return [f"* {remark}: {', '.join(places)}" for remark, places in found.items()]


def _failure_remark(case: Mapping[str, Any]) -> str:
    if not case["failures"]:
        return ""
    chosen = f"{case['chosen']['seconds']:g} s" if case["chosen"] else "nothing"
    stock = f", {case['stock']['call']} {case['stock']['seconds']:g} s" if case["stock"] else ""
    best = f"{case['best_seconds']:g} s" if case["best_seconds"] else "nothing"
    return f"{case['pipeline']}: {'; '.join(case['failures'])} (chosen {chosen}, best candidate {best}{stock})"


def is_idle(case: Mapping[str, Any], *, in_loop: bool) -> bool:
    """Whether more VRAM is idle while denoising than is forgiven, with blocks streamed in each step or only before."""
    if not case.get("blocks_gib") or case["in_loop"] != in_loop:
        return False
    forgiven = max(IDLE_GIB, IDLE_SHARE * case["vram_gib"], min(case["blocks_gib"].values()))
    return bool(case["idle_gib"] > forgiven)


def is_usable(case: Mapping[str, Any]) -> bool:
    """Whether what is idle could be used: by blocks that are streamed in each step, which need room in denoising alone,
    or by one that stays for the whole call and fits into the fullest phase too."""
    return bool(case["in_loop"] or case["tightest_gib"] >= case["keepable_gib"])


def _idle_remark(case: Mapping[str, Any]) -> str:
    if not any(is_idle(case, in_loop=in_loop) for in_loop in (True, False)):
        return ""
    placed = case["chosen"]["placement"]
    away = ", ".join(f"{name} {setting}" for name, setting in placed.items() if setting != "resident")
    full = (
        "could be used"
        if is_usable(case)
        else f"{case['tightest_phase']} has {case['tightest_gib']:g} GiB left and the least that could stay takes "
        f"{case['keepable_gib']:g} GiB"
    )
    worth = f"room for everything would save {case['idle_worth']:.1%}"
    return f"{case['pipeline']}: {case['idle_gib']:g} GiB idle, with {away}; {full}; {worth}"


def idle_and_locked(cases: Cases) -> list[str]:
    """VRAM idle in denoising, and page-locked memory, where anything is streamed."""
    streamed = [case for case in cases if case.get("blocks_gib")]
    if not streamed:
        return ["Nothing is streamed."]
    return [_idle_sentences(streamed), "", _locked_sentences(cases)]


def _idle_sentences(streamed: Cases) -> str:
    loop = [case for case in streamed if case["in_loop"]]
    begun = f"Blocks are streamed in {len(streamed)} cases, in {len(loop) or 'none'} of them in each step of denoising."
    idle = [case["idle_gib"] for case in loop]
    beyond = [case for case in streamed if is_idle(case, in_loop=False)]
    usable = [case for case in beyond if is_usable(case)]
    of_loop = (
        f" Idle in the denoising phase of those: {statistics.median(idle):.2f} GiB in the median, {max(idle):.2f} at "
        f"most; {sum(is_idle(case, in_loop=True) for case in loop)} are beyond max({IDLE_GIB} GiB, {IDLE_SHARE:.0%}, "
        "the smallest block that is streamed)."
    )
    return (
        f"{begun}{of_loop if loop else ''} Of the others, whose denoiser is on the device as a whole while it "
        f"runs, {len(beyond)} leave more than that; in {len(beyond) - len(usable)} of these it cannot be used: what is "
        "copied once a call saves time only where it stays for the whole call, and another phase is fuller than the "
        f"least that could stay. {len(usable)} could use it."
    )


def _locked_sentences(cases: Cases) -> str:
    locked = [case for case in cases if case.get("locked_used_gib")]
    shares = [case["locked_gib"] / case["copied_gib"] for case in locked]
    used = [case["locked_gib"] / case["locked_used_gib"] for case in locked]
    beyond = sum(share > LOCKED_SHARE for share in shares)
    most = max((case["locked_gib"] - case["locked_used_gib"] for case in locked), default=0.0)
    return (
        f"Page-locked memory, buffers included, is {statistics.median(shares):.3f} times the weights that are copied "
        f"from it and through it in the median of {len(locked)} cases, {max(shares):.3f} times at most; {beyond} cases "
        f"are above {LOCKED_SHARE}. It is at most {max(used):.3f} times the weights that stay in it, and never more "
        f"than {most:.3f} GiB beyond them."
    )


def faster_peers(cases: Cases) -> list[str]:
    """The cases in which a rule is faster than the choice, a line for each rule and pipeline."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name in PEERS:
        for case in cases:
            seconds = _seconds_of(name)(case) if case["chosen"] else None
            ratio = seconds / case["chosen"]["seconds"] if seconds else 1.0
            if ratio < FASTER:
                where = f"{case['vram_gib']}/{case['ram_gib']}{'' if case['allow'] is None else ' ' + case['allow']}"
                sure = ", surely" if case["peers"][name]["surely_faster"] else ""
                found.setdefault((name, case["pipeline"]), []).append((ratio, f"{where} ({ratio:.3f}{sure})"))
    return [
        f"* {name}, {pipeline}: {', '.join(text for _, text in sorted(each))}"
        for (name, pipeline), each in found.items()
    ]


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def summary(
    cases: Cases, speeds: Mapping[str, float], left_out: Mapping[str, str], named: Sequence[str], grid: Grid
) -> str:
    failed = listed(cases, _failure_remark)
    idle = listed(cases, _idle_remark)
    faster = faster_peers(cases)
    lines = [
        f"{len(cases)} cases: {len(speeds)} pipelines at their default workload on the rates of an {grid.card}, with "
        f"{', '.join(map(str, grid.vram_gib))} GiB of VRAM and {', '.join(map(str, grid.ram_gib))} GiB of RAM, "
        "lossless with the last resort, and near lossless allowed. All times are the planner's own prices: they rank "
        f"choices, none was measured. {sum(bool(case['failures']) for case in cases)} failures. "
        "Until 27 November there were 10, 32 and 80 GiB of VRAM and 128 GiB of RAM too: left out to save time, not for "
        "what they would show.",
        "",
        *by_pipeline(cases),
        "",
        f"Candidates priced in a second: {min(speeds.values()):.0f} to {max(speeds.values()):.0f} (target 1000).",
        "",
        *(["## Before and after weight streaming", "", *named, ""] if named else []),
        "## Other tools' rules",
        "",
        "As `regret_peers.py` has them, without quantising. A rule decodes plainly, in tiles only where nothing else "
        "fits, and counts in tiles only where the choice may use them too: a user sets that by hand, no rule but "
        f"AirCanvas does. A ratio below {FASTER} is a choice that is faster by its price: {len(faster) or 'none'} is.",
        "",
        *by_peer(cases),
        "",
        *([*faster, ""] if faster else []),
        *(["## On the simulated device", "", *by_run(cases, grid), ""] if any("simulated" in c for c in cases) else []),
        "## Stock calls",
        "",
        *by_stock_call(cases),
        "",
        "## Idle VRAM and page-locked memory",
        "",
        *idle_and_locked(cases),
        "",
        *(idle or ["None is idle beyond that."]),
        "",
        "## Failures",
        "",
        *(failed or ["None."]),
    ]
    lines += ["", "## Left out", "", *(f"* {name}: {why}" for name, why in left_out.items())] if left_out else []
    return "\n".join(lines) + "\n"
