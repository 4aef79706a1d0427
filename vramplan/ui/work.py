"""The work of the page's worker process: a plan, then its picture or the changes that would make one fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from vramplan.api.machine import choose_machine
from vramplan.api.plan import Subject
from vramplan.api.request import PlanRequest
from vramplan.common.arguments import respelled
from vramplan.errors import NothingFitsError, UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware
from vramplan.pipeline.latents import smaller_size
from vramplan.planfile.types import Plan
from vramplan.profiles.catalogue import DeviceProfile, device_profiles
from vramplan.strategies.base import QUALITIES
from vramplan.ui.choices import Selection
from vramplan.units import GIB
from vramplan.workload import Workload

_RAM = ("32GiB", "64GiB", "128GiB")  # usual sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan as the page shows it, or the `error`; `short` means that nothing fits.

    `bar` is the name, bytes and colour of each part of the memory; `picture` the candidates as a plotly figure in
    JSON; `reasons` a row for each candidate; `workload` the whole workload, with the pipeline's defaults; `video`
    whether the pipeline makes videos.
    """

    error: str = ""
    short: bool = False
    rows: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    bar: tuple[tuple[str, int, str], ...] = ()
    picture: str = ""
    reasons: tuple[tuple[str, ...], ...] = ()
    code: str = ""
    workload: Workload | None = None
    video: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """The slower results: the memory over the call as a plotly figure in JSON and in words, or, if nothing fits, the
    suggested changes."""

    picture: str = ""
    words: str = ""
    suggestions: tuple[str, ...] = ()


def answer(selection: Selection) -> Answer:
    """Plan for the selection; an error is returned as one line, never raised."""
    try:
        subject = _subject(selection.model)
        work = subject.workload(dict(selection.counts))
        known: dict[str, Any] = {"workload": work, "video": subject.spec.video}
        return _answer_of(_plan(selection), known)
    except VramplanError as error:
        short = isinstance(error, NothingFitsError)
        return Answer(error=respelled(str(error), _plainly), short=short, **(known if short else {}))
    except Exception as error:  # the page shows no traceback
        return Answer(error=f"{type(error).__name__}: {' '.join(str(error).split())}")


def details(selection: Selection) -> Details:
    """Draw the memory over the call under the plan, or suggest changes that would make one fit."""
    try:
        return _memory_details(_plan(selection))
    except NothingFitsError:
        return Details(suggestions=tuple(_suggestions(selection)))
    except VramplanError as error:
        return Details(words=f"no picture: {error}")


@lru_cache(maxsize=4)
def _subject(model: str) -> Subject:
    return Subject(model, PlanRequest())


@lru_cache(maxsize=8)
def _plan(selection: Selection) -> Plan:
    subject = _subject(selection.model)
    hardware, accelerator = _machine(selection)
    work = subject.workload(dict(selection.counts))
    return subject.plan_with_stock(work, hardware, accelerator, _request(selection))


def _machine(selection: Selection) -> tuple[Hardware, Accelerator | None]:
    return choose_machine(selection.device, vram=dict(selection.amounts).get("vram"))


def _request(selection: Selection) -> PlanRequest:
    return PlanRequest(allow=selection.allow, **dict(selection.amounts))  # type: ignore[arg-type]


def _answer_of(plan: Plan, known: dict[str, Any]) -> Answer:
    from vramplan.api.code import plan_code
    from vramplan.planfile.types import settings_text
    from vramplan.units import format_bytes
    from vramplan.view.bars import plan_bar
    from vramplan.view.plan import plan_rows, times_text
    from vramplan.view.plot.candidates import candidates_picture
    from vramplan.view.plot.plotly_figures import candidates_figure

    plan, bar = respelled(plan, _plainly), plan_bar(plan)
    return Answer(
        rows=tuple(plan_rows(plan)),
        notes=plan.notes,
        bar=tuple((part.name, part.size_bytes, part.style) for part in bar.parts if part.size_bytes > 0) if bar else (),
        picture=candidates_figure(candidates_picture(plan)).to_json(),
        reasons=tuple(
            (
                item.verdict,
                format_bytes(item.projected.vram_reserved_bytes),
                format_bytes(item.projected.ram_bytes),
                times_text(item.projected)[1],
                settings_text(item.settings),
                item.reason,
            )
            for item in plan.candidates
        ),
        code=plan_code(plan),
        **known,
    )


def _plainly(name: str, value: str) -> str:
    return f"{name} {value}".replace("_", " ").rstrip()


def _memory_details(plan: Plan) -> Details:
    from vramplan.api.simulate import simulate
    from vramplan.planfile.types import load_options
    from vramplan.view.plot.memory import memory_picture
    from vramplan.view.plot.plotly_figures import memory_figure, memory_words

    if plan.machine.accelerator is None:
        return Details(words="Without an accelerator no call is simulated: the plan rests on rules of thumb.")
    limit = plan.machine.budget.vram_bytes
    simulation = simulate(plan.model.origin, plan, capacity_bytes=limit, timeline=True, **load_options(plan))
    picture = memory_picture(simulation)
    return Details(picture=memory_figure(picture).to_json(), words=memory_words(picture))


def _suggestions(selection: Selection) -> Iterator[str]:
    """Single changes of the selection, as phrases, with which a plan fits by its price."""
    from vramplan.workload import workload_text

    subject = _subject(selection.model)
    work = subject.workload(dict(selection.counts))
    hardware, card = _machine(selection)
    request = _request(selection)

    def fits(work: Workload = work, device: str | None = None, **changes: Any) -> bool:
        machine, accelerator = (hardware, card) if device is None else choose_machine(device)
        try:
            subject.plan(work, machine, accelerator, replace(request, **changes), confirm=False)
        except (NothingFitsError, UsageError):
            return False
        return True

    allowed = QUALITIES.index(selection.allow or "lossless") + 1
    quality = next((item for item in QUALITIES[allowed:] if fits(allow=item)), None)
    if quality is not None:
        yield f"allowing {quality.replace('_', ' ')} settings"
    ram = next((size for size in _RAM if fits(ram=size)), None)
    if ram is not None:
        yield f"{ram.removesuffix('GiB')} GiB of RAM"
    size = smaller_size(subject.spec, work, 1 / 2)
    smaller = replace(work, height=size[0], width=size[1]) if size else work
    if size and fits(smaller):
        yield workload_text(smaller)
    if selection.device and request.vram and fits(device=selection.device, vram=None):
        yield "all of the card's memory"
    if card is not None:
        yield from _larger_card(card, lambda name: fits(device=name, vram=None))


def _larger_card(card: Accelerator, fits: Callable[[str], bool]) -> Iterator[str]:
    """The smallest larger card of this kind on which it fits, of each whole GiB trying the card with least memory."""
    sizes: dict[int, DeviceProfile] = {}
    for profile in sorted(device_profiles(), key=lambda profile: (profile.memory_bytes, profile.name)):
        alike = profile.kind == card.kind and (profile.pool_bytes is not None) == card.unified
        if alike and profile.memory_bytes > card.total_bytes:
            sizes.setdefault(round(profile.memory_bytes / GIB), profile)
    larger = list(sizes.values())
    first = bisect_left(larger, True, key=lambda profile: fits(profile.name))
    if first < len(larger):
        yield f"a larger card: {larger[first].title}, {larger[first].memory_bytes / GIB:.0f} GiB"
