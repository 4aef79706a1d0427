"""The question turned round: which card a model runs on, how much of it a card can make, which models a card runs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Unpack

from vramplan.api.machine import choose_machine
from vramplan.api.plan import Subject
from vramplan.api.request import PlanOptions, PlanRequest, make_request
from vramplan.common.progress import step_progress
from vramplan.errors import NothingFitsError, UsageError
from vramplan.fitting.cards import CardSize, card_sizes
from vramplan.fitting.largest_workload import last_fitting, last_within_limit, pixel_count
from vramplan.fitting.smallest_card import Card, rows_by_size, smallest_cards
from vramplan.fitting.types import Fits, Largest, Question, Row, Shortfall, Smallest, Try
from vramplan.hardware.types import Accelerator, Hardware
from vramplan.planfile.record import projected
from vramplan.planfile.types import Plan
from vramplan.planner.legal import Dimension, legal_workloads
from vramplan.strategies.base import QUALITIES, Decode, Quality
from vramplan.workload import Workload


def fit(
    models: Any, request: PlanRequest | None = None, *, largest: Dimension | None = None, **options: Unpack[PlanOptions]
) -> Fits:
    """Find what fits, of one model or of a list of them. `request` and `options` are those of `vramplan.plan`.

    Without `device` and `vram`: the cards each model runs on, of all device profiles, by the size of their memory.
    With one of them: which of the models that card runs, the most faithful and fastest first. With `largest` (`size`,
    `frames` or `batch`): the most of that which each model can make there, by default on this machine.

    Raises:
        UsageError: an argument that makes no sense.
        VramplanError: a model that cannot be read.
    """
    request = request or make_request(options)
    names = list(models) if isinstance(models, list | tuple) else [models]
    if not names:
        raise UsageError("name at least one model")
    subjects = [Subject(model, request) for model in names]
    works = [subject.workload() for subject in subjects]
    tries = [_try(subject, _called(model)) for subject, model in zip(subjects, names, strict=True)]
    device = request.device
    with step_progress("fit") as told:
        if largest is None and device is None and request.vram is None:
            return _cards(list(zip(subjects, tries, works, strict=True)), request, told)
        hardware, accelerator = choose_machine(device, vram=request.vram)
        at = [_on(attempt, hardware, accelerator, device, told) for attempt in tries]
        if largest is None:
            rows = [attempt(work) for attempt, work in zip(at, works, strict=True)]
            return _answer("models", request, sorted(rows, key=_merit))
        needs = [_need(subject, hardware, accelerator, told) for subject in subjects]
        found = [_largest(largest, *case) for case in zip(subjects, at, needs, works, strict=True)]
    beyond = tuple(Largest(dimension=largest, next=following) for _, following in found)
    return _answer("largest", request, [row for row, _ in found], largest=beyond)


def _answer(question: Question, request: PlanRequest, rows: Sequence[Row], **more: Any) -> Fits:
    return Fits(
        question=question, asked=request.preferences, fits=any(row.fits for row in rows), rows=tuple(rows), **more
    )


def _called(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _merit(row: Row) -> tuple[bool, int, float]:
    """Lower is better: what fits, then what changes the picture least, then what is fastest."""
    if row.quality is None or row.projected is None:
        return True, 0, 0.0
    return False, QUALITIES.index(row.quality), row.projected.seconds_per_call


def _try(subject: Subject, model: str) -> Try:
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
            request = replace(subject.request, **changes)
            plan = subject.plan(work, hardware, accelerator, request, confirm=confirm)
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


def _on(
    attempt: Try, hardware: Hardware, accelerator: Accelerator | None, device: Any, told: Callable[[str], object]
) -> Try:
    """The same for one card."""
    from vramplan.workload import workload_text

    called = device if isinstance(device, str) else None

    def try_at(work: Workload, **options: Any) -> Row:
        told(workload_text(work))
        return attempt(work, hardware, accelerator, device=called, **options)

    return try_at


def _largest(
    dimension: Dimension, subject: Subject, attempt: Try, need: Shortfall, work: Workload
) -> tuple[Row, Row | None]:
    """The last workload that fits, or the first one where none does; and the next one, with what it lacks.

    Looked for by price first, decoded in what takes least, going up from the usual workload; then that place and the
    next are planned for in full and simulated, and those beside them where they are not the last and the first.
    """
    ladder = legal_workloads(dimension, subject.spec, subject.described.defaults, work)
    amounts = [pixel_count(item) for item in ladder]
    usual = max(0, bisect_right(amounts, pixel_count(work)) - 1)
    priced = last_within_limit(amounts, lambda place: need(ladder[place]), 0, usual)

    @cache
    def tried(place: int) -> Row:
        return attempt(ladder[place])

    top = last_fitting(len(ladder), lambda place: tried(place).fits, priced)
    return tried(max(top, 0)), None if top + 1 == len(ladder) else tried(top + 1)


def _need(
    subject: Subject,
    hardware: Hardware,
    accelerator: Accelerator | None,
    told: Callable[[str], object],
) -> Shortfall:
    """How much VRAM a workload is short of; less than nothing where it fits, None where the RAM is what lacks.

    How to decode in least is found for the first one asked for, of one picture and of several, and taken for others.
    """
    from vramplan.workload import workload_text

    known: dict[bool, tuple[Decode, ...]] = {}

    def short(work: Workload) -> float | None:
        told(workload_text(work))
        several = work.num_images_per_prompt > 1
        try:
            least = subject.least(work, hardware, accelerator, decode=known.get(several))
        except UsageError:
            if several not in known:
                raise
            least = subject.least(work, hardware, accelerator)  # too small to be decoded so
        if least is None:
            return None
        known.setdefault(several, least.decode)
        return 0 if least.limit_bytes is None else least.vram_bytes - least.limit_bytes

    return short


def _cards(
    subjects: Sequence[tuple[Subject, Try, Workload]], request: PlanRequest, told: Callable[[str], object]
) -> Fits:
    """A row for each size of card and model, by price, and the smallest card at each quality, simulated."""
    sizes = card_sizes()
    rows: list[Row] = []
    smallest: list[Smallest] = []
    for subject, attempt, work in subjects:
        cards = [_card(subject, attempt, work, size, told) for size in sizes]
        cards[-1].attempt(confirm=False, strict=True)  # what makes no sense on the largest is a mistake in the question
        priced = rows_by_size(cards)
        rows += [row for _, row in priced]
        smallest += smallest_cards(priced, rows[-1].model, request.allow)
    return _answer("cards", request, rows, smallest=tuple(smallest))


def _card(subject: Subject, attempt: Try, work: Workload, size: CardSize, told: Callable[[str], object]) -> Card:
    """The least card of a size; one with no memory left to use is a card that is too small."""
    hardware, accelerator = choose_machine(size.name)

    def try_at(**options: Any) -> Row:
        told(f"{subject.spec.family or subject.spec.class_name} on {size.name}")
        given = {"strict": False, "device": size.name, "alike": size.alike} | options
        return attempt(work, hardware, accelerator, **given)

    def least(allow: Quality | None) -> int | None:
        found = subject.least(work, hardware, accelerator, replace(subject.request, allow=allow))
        return found.vram_bytes if found else None

    return Card(size=size, attempt=cache(try_at), least=cache(least))
