"""What the page asks of its worker, a process of its own: a plan, and then its picture or what would make one fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from vramplan.api.machine import choose_machine
from vramplan.api.plan import Subject
from vramplan.errors import NothingFitsError, UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware
from vramplan.pipeline.latents import smaller_size
from vramplan.planfile.types import Plan, PlanRequest
from vramplan.profiles.catalogue import DeviceProfile, device_profiles
from vramplan.strategies.base import QUALITIES
from vramplan.ui.choices import Wish
from vramplan.units import GIB
from vramplan.workload import Workload

_RAM = ("32GiB", "64GiB", "128GiB")  # what machines have


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan as the page shows it, or the `error` that there is none, `short` where nothing fits.

    `bar` is the name, bytes and colour of each part of the memory; `picture` the candidates as a plotly figure in
    JSON; `reasons` a row for each candidate; `workload` what is generated, with the pipeline's own for what was left
    out, and whether it is a `video`.
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
class Further:
    """What takes longer: the memory over the call as a plotly figure in JSON and in words, or, where nothing fits, what
    would help."""

    picture: str = ""
    words: str = ""
    helps: tuple[str, ...] = ()


def answer(wish: Wish) -> Answer:
    """The plan for it, or why there is none: in one line, never as an exception."""
    try:
        subject = _subject(wish.model)
        work = subject.workload(dict(wish.counts))
        known: dict[str, Any] = {"workload": work, "video": subject.spec.video}
        return _shown(_plan(wish), known)
    except VramplanError as error:
        short = isinstance(error, NothingFitsError)
        return Answer(error=str(error), short=short, **(known if short else {}))
    except Exception as error:  # a page is no place for a traceback either
        return Answer(error=f"{type(error).__name__}: {' '.join(str(error).split())}")


def further(wish: Wish) -> Further:
    """The memory over the call under the plan, or what would make one fit; nothing where neither can be told."""
    try:
        return _memory(_plan(wish))
    except NothingFitsError:
        return Further(helps=tuple(_helps(wish)))
    except VramplanError as error:
        return Further(words=f"no picture: {error}")


@lru_cache(maxsize=4)
def _subject(model: str) -> Subject:
    return Subject(model)


@lru_cache(maxsize=8)
def _plan(wish: Wish) -> Plan:
    subject = _subject(wish.model)
    hardware, accelerator = _machine(wish)
    return subject.plan(subject.workload(dict(wish.counts)), hardware, accelerator, _asked(wish))


def _machine(wish: Wish) -> tuple[Hardware, Accelerator | None]:
    return choose_machine(wish.device, vram=dict(wish.amounts).get("vram"))


def _asked(wish: Wish) -> PlanRequest:
    return PlanRequest(allow=wish.allow, **dict(wish.amounts))  # type: ignore[arg-type]


def _shown(plan: Plan, known: dict[str, Any]) -> Answer:
    from vramplan.api.code import plan_code
    from vramplan.planfile.types import settings_text
    from vramplan.units import format_bytes, format_seconds
    from vramplan.view.bars import plan_bar
    from vramplan.view.plan import plan_rows
    from vramplan.view.plot.candidates import candidates_picture
    from vramplan.view.plot.with_plotly import candidates_figure

    bar = plan_bar(plan)
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
                format_seconds(item.projected.seconds_per_call),
                settings_text(item.settings),
                item.reason,
            )
            for item in plan.candidates
        ),
        code=plan_code(plan),
        **known,
    )


def _memory(plan: Plan) -> Further:
    from vramplan.api.simulate import simulate
    from vramplan.planfile.types import load_options
    from vramplan.view.plot.memory import memory_picture
    from vramplan.view.plot.with_plotly import memory_figure, memory_words

    if plan.machine.accelerator is None:
        return Further(words="Without an accelerator no call is simulated: the plan rests on rules of thumb.")
    model = plan.model.source.removeprefix("profile:")
    limit = plan.machine.budget.vram_bytes
    picture = memory_picture(simulate(model, plan, capacity_bytes=limit, timeline=True, **load_options(plan)))
    return Further(picture=memory_figure(picture).to_json(), words=memory_words(picture))


def _helps(wish: Wish) -> Iterator[str]:
    """Single changes of the wish, as phrases, under which something fits by its price."""
    from vramplan.workload import workload_text

    subject = _subject(wish.model)
    work = subject.workload(dict(wish.counts))
    hardware, card = _machine(wish)
    asked = _asked(wish)

    def fits(work: Workload = work, device: str | None = None, **changes: Any) -> bool:
        machine, accelerator = (hardware, card) if device is None else choose_machine(device)
        try:
            subject.plan(work, machine, accelerator, replace(asked, **changes), confirm=False)
        except (NothingFitsError, UsageError):
            return False
        return True

    allowed = QUALITIES.index(wish.allow or "lossless") + 1
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
    if wish.device and asked.vram and fits(device=wish.device, vram=None):
        yield "all of the card's memory"
    if card is not None:
        yield from _larger(card, lambda name: fits(device=name, vram=None))


def _larger(card: Accelerator, fits: Callable[[str], bool]) -> Iterator[str]:
    """The smallest of the larger cards of this kind on which it fits: of each whole GiB the one with least memory."""
    sizes: dict[int, DeviceProfile] = {}
    for profile in sorted(device_profiles(), key=lambda profile: (profile.memory_bytes, profile.name)):
        alike = profile.kind == card.kind and (profile.pool_bytes is not None) == card.unified
        if alike and profile.memory_bytes > card.total_bytes:
            sizes.setdefault(round(profile.memory_bytes / GIB), profile)
    larger = list(sizes.values())
    first = bisect_left(larger, True, key=lambda profile: fits(profile.name))
    if first < len(larger):
        yield f"a larger card: {larger[first].title}, {larger[first].memory_bytes / GIB:.0f} GiB"
