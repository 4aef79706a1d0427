"""The question turned round: which card a model runs on, how much of it a card can make, which models a card runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vramplan.cards import CardSize, card_sizes
from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Hardware
from vramplan.machine import choose_machine
from vramplan.planfile import Asked, Plan, Projected, Settings
from vramplan.planner.decide import Prefer
from vramplan.planner.legal import Dimension, legal_workloads
from vramplan.planning import Subject, projected
from vramplan.strategies.base import QUALITIES, Quality
from vramplan.workload import Workload

FIT_SCHEMA_VERSION = 1
Question = Literal["cards", "largest", "models"]
Try = Callable[..., "Row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model on one card: how it would run, or `reason`, why not.

    `device` is a profile's name or the driver's, None without one; `alike` are the other profiles of that memory,
    none of which has less. `confirmed` says whether the plan was simulated within the budget, or only priced.
    """

    model: str
    workload: Workload
    device: str | None
    memory_bytes: int | None
    alike: tuple[str, ...] = ()
    fits: bool
    confirmed: bool = False
    reason: str = ""
    vram_budget_bytes: int | None = None
    settings: Settings | None = None
    quality: Quality | None = None
    projected: Projected | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Smallest:
    """The smallest card that a model runs on where so much may be done to the picture, and the least VRAM that it can
    be brought down to there by preferring memory to speed. None where no card is large enough."""

    model: str
    allow: Quality
    row: Row | None
    least_vram_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """Of what the largest was looked for, and the next legal workload with what it lacks; None where the most that is
    looked for fits."""

    dimension: Dimension
    next: Row | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """The answer: a row for each card, model or largest workload, and whether anything fits at all."""

    schema_version: int = FIT_SCHEMA_VERSION
    question: Question
    asked: Asked
    fits: bool
    rows: tuple[Row, ...]
    smallest: tuple[Smallest, ...] = ()
    largest: tuple[Largest, ...] = ()

    def __str__(self) -> str:
        from vramplan.report_fit import fits_text

        return fits_text(self)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def fit(
    models: Any,
    *,
    device: str | Hardware | None = None,
    largest: Dimension | None = None,
    vram: str | None = None,
    ram: str | None = None,
    margin: str | None = None,
    allow: Quality | None = None,
    prefer: Prefer = "speed",
    dtype: str | None = None,
    settings: Mapping[str, str | Sequence[str]] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    simulate: bool = True,
    **workload: Any,
) -> Fits:
    """What fits, of one model or of a list of them; every other argument is `vramplan.plan`'s.

    Without `device` and `vram`: the cards each model runs on, of all device profiles, by the size of their memory.
    With one of them: which of the models that card runs, the most faithful and fastest first. With `largest` (`size`,
    `frames` or `batch`): the most of that which each model can make there; on this machine where no card is named.

    Raises:
        UsageError: an argument that makes no sense.
        VramplanError: a model that cannot be read.
    """
    names = list(models) if isinstance(models, list | tuple) else [models]
    if not names:
        raise UsageError("name at least one model")
    subjects = [
        Subject(
            model,
            dtype=dtype,
            variant=variant,
            revision=revision,
            allow_pickle=allow_pickle,
            settings=settings,
            simulate=simulate,
        )
        for model in names
    ]
    works = [subject.workload(workload) for subject in subjects]
    asked = Asked(allow=allow, prefer=prefer, vram=vram, ram=ram, margin=margin, settings=subjects[0].fixed)
    tries = [_try(subject, _called(model), asked) for subject, model in zip(subjects, names, strict=True)]
    if largest is None and device is None and vram is None:
        return _cards(list(zip(tries, works, strict=True)), asked)
    hardware, accelerator = choose_machine(device, vram=vram)
    at = [_on(attempt, hardware, accelerator, device) for attempt in tries]
    if largest is None:
        rows = [attempt(work) for attempt, work in zip(at, works, strict=True)]
        return _answer("models", asked, sorted(rows, key=_merit))
    ladders = [
        legal_workloads(largest, subject.spec, subject.described.defaults, work)
        for subject, work in zip(subjects, works, strict=True)
    ]
    found = [_largest(attempt, ladder) for attempt, ladder in zip(at, ladders, strict=True)]
    beyond = tuple(Largest(dimension=largest, next=following) for _, following in found)
    return _answer("largest", asked, [row for row, _ in found], largest=beyond)


def _answer(question: Question, asked: Asked, rows: Sequence[Row], **more: Any) -> Fits:
    return Fits(question=question, asked=asked, fits=any(row.fits for row in rows), rows=tuple(rows), **more)


def _called(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _merit(row: Row) -> tuple[bool, int, float]:
    """Lower is better: what fits, then what changes the picture least, then what is fastest."""
    if row.quality is None or row.projected is None:
        return True, 0, 0.0
    return False, QUALITIES.index(row.quality), row.projected.seconds_per_call


def _try(subject: Subject, model: str, asked: Asked) -> Try:
    """What makes a row of a workload and a card."""

    def attempt(
        work: Workload,
        hardware: Hardware,
        accelerator: Accelerator | None,
        *,
        device: str | None = None,
        alike: tuple[str, ...] = (),
        confirm: bool = True,
        strict: bool = True,
        **changes: Any,
    ) -> Row:
        base = Row(
            model=model,
            workload=work,
            device=device or (accelerator.name if accelerator else None),
            memory_bytes=accelerator.total_bytes if accelerator else None,
            alike=alike,
            fits=False,
        )
        try:
            plan = subject.plan(work, hardware, accelerator, replace(asked, **changes), confirm=confirm)
        except (NothingFitsError, UsageError) as error:
            if strict and isinstance(error, UsageError):
                raise
            return replace(base, reason=str(error))
        return _filled(base, plan, confirm=confirm)

    return attempt


def _filled(row: Row, plan: Plan, *, confirm: bool) -> Row:
    price = plan.projected
    return replace(
        row,
        fits=True,
        confirmed=confirm and price.basis in ("simulated", "measured"),
        reason=plan.reason,
        vram_budget_bytes=plan.machine.budget.vram_bytes,
        settings=plan.settings,
        quality=plan.quality,
        projected=projected(price),
    )


def _on(attempt: Try, hardware: Hardware, accelerator: Accelerator | None, device: Any) -> Try:
    """The same for one card."""
    called = device if isinstance(device, str) else None
    return lambda work, **options: attempt(work, hardware, accelerator, device=called, **options)


def _largest(attempt: Try, ladder: Sequence[Workload]) -> tuple[Row, Row | None]:
    """The last workload that fits, or the first one where none does; and the next one, with what it lacks.

    Halved by price first, which needs no simulation within the budget and rules out what the planner would; then the
    last one is confirmed, and those below it where it is not.
    """

    @cache
    def tried(place: int, confirm: bool) -> Row:
        return attempt(ladder[place], confirm=confirm)

    top = _last(len(ladder), lambda place: tried(place, confirm=False).fits)
    if top >= 0 and not tried(top, confirm=True).fits:
        top = _last(top, lambda place: tried(place, confirm=True).fits)
    following = None if top + 1 == len(ladder) else tried(top + 1, confirm=True)
    return (tried(top, confirm=True) if top >= 0 else tried(0, confirm=True)), following


def _last(count: int, fits: Callable[[int], bool]) -> int:
    """The last of so many places that fits, where all before one that fits do; -1 where none does."""
    low, high = -1, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _cards(asking: Sequence[tuple[Try, Workload]], asked: Asked) -> Fits:
    """A row for each size of card and model, by price, and the smallest card at each quality, simulated.

    Of each kind of card the rows end with the first size that holds all of a model: larger ones differ in speed only.
    """
    sizes = card_sizes()
    rows: list[Row] = []
    smallest: list[Smallest] = []
    for attempt, work in asking:
        at = [_at_size(attempt, work, size) for size in sizes]
        at[-1](confirm=False, strict=True)  # what makes no sense on the largest is a mistake in the question
        roomy: set[object] = set()
        for try_at, size in zip(at, sizes, strict=True):
            if size.kind not in roomy:
                rows.append(try_at(confirm=False))
                roomy |= {size.kind} if _holds_all(rows[-1]) else set()
        limits = QUALITIES if asked.allow is None else (asked.allow,)
        smallest += [_smallest(at, rows[-1].model, limit) for limit in limits]
    return _answer("cards", asked, rows, smallest=tuple(smallest))


def _holds_all(row: Row) -> bool:
    """Whether nothing is offloaded and the picture is decoded as one."""
    chosen = row.settings
    return chosen is not None and set(chosen.placement.values()) == {"resident"} and not chosen.decode


def _at_size(attempt: Try, work: Workload, size: CardSize) -> Try:
    """The same for the least card of a size; one with no memory left to use is a card that is too small."""
    hardware, accelerator = choose_machine(size.name)
    return lambda **options: attempt(
        work, hardware, accelerator, **{"strict": False, "device": size.name, "alike": size.alike} | options
    )


def _smallest(at: Sequence[Try], model: str, allow: Quality) -> Smallest:
    """The first card that runs it when that is simulated, and the least it can be brought down to there."""
    priced = (try_at for try_at in at if try_at(confirm=False, allow=allow).fits)
    for try_at in priced:
        row = try_at(allow=allow)
        if row.fits:
            least = try_at(allow=allow, prefer="memory").projected
            size = least.vram_reserved_bytes if least else None
            return Smallest(model=model, allow=allow, row=row, least_vram_bytes=size)
    return Smallest(model=model, allow=allow, row=None, least_vram_bytes=None)
