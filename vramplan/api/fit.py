"""Find the cards a model runs on, the models a card runs, or the largest workload that fits."""

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
    """Find what fits, for one model or a list of models. `request` and `options` are those of `vramplan.plan`.

    Without `device` and `vram`: the cards each model runs on, among all device profiles, by memory size.
    With one of them: the models that this card runs, the most faithful and fastest first. With `largest` (`size`,
    `frames` or `batch`): the largest value that each model can make there, by default on this machine.

    Raises:
        UsageError: an argument is not valid.
        VramplanError: a model cannot be read.
    """
    request = make_request(options, request)
    names = list(models) if isinstance(models, list | tuple) else [models]
    if not names:
        raise UsageError("name at least one model")
    subjects = [Subject(model, request) for model in names]
    works = [subject.workload() for subject in subjects]
    tries = [_row_planner(subject, _model_name(model)) for subject, model in zip(subjects, names, strict=True)]
    device = request.device
    with step_progress("fit") as show_step:
        if largest is None and device is None and request.vram is None:
            return _fit_cards(list(zip(subjects, tries, works, strict=True)), request, show_step)
        hardware, accelerator = choose_machine(device, vram=request.vram)
        attempts = [_bind_card(attempt, hardware, accelerator, device, show_step) for attempt in tries]
        if largest is None:
            rows = [attempt(work) for attempt, work in zip(attempts, works, strict=True)]
            return _make_fits("models", request, sorted(rows, key=_ranking_key))
        shortfalls = [_shortfall_function(subject, hardware, accelerator, show_step) for subject in subjects]
        found = [_largest_rows(largest, *case) for case in zip(subjects, attempts, shortfalls, works, strict=True)]
    next_rows = tuple(Largest(dimension=largest, next=following) for _, following in found)
    return _make_fits("largest", request, [row for row, _ in found], largest=next_rows)


def _make_fits(question: Question, request: PlanRequest, rows: Sequence[Row], **more: Any) -> Fits:
    return Fits(
        question=question, asked=request.preferences, fits=any(row.fits for row in rows), rows=tuple(rows), **more
    )


def _model_name(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _ranking_key(row: Row) -> tuple[bool, int, float]:
    """A sort key, lower is better: rows that fit first, then by quality, then by speed."""
    if row.quality is None or row.projected is None:
        return True, 0, 0.0
    return False, QUALITIES.index(row.quality), row.projected.seconds_per_call


def _row_planner(subject: Subject, model: str) -> Try:
    """Return a function that plans the model for a workload and a card, and returns the row."""

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
        return _fitting_row(base, plan, confirm=confirm)

    return attempt


def _fitting_row(row: Row, plan: Plan, *, confirm: bool) -> Row:
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


def _bind_card(
    attempt: Try, hardware: Hardware, accelerator: Accelerator | None, device: Any, show_step: Callable[[str], object]
) -> Try:
    """Bind the planning function to one card, so that it takes a workload only."""
    from vramplan.workload import workload_text

    name = device if isinstance(device, str) else None

    def try_at(work: Workload, **options: Any) -> Row:
        show_step(workload_text(work))
        return attempt(work, hardware, accelerator, device=name, **options)

    return try_at


def _largest_rows(
    dimension: Dimension, subject: Subject, attempt: Try, shortfall: Shortfall, work: Workload
) -> tuple[Row, Row | None]:
    """The last workload that fits (or the first one if none does), and the next one with its shortfall.

    The first search is by price, with the smallest decode, up from the given workload. The place found and the next
    are then planned in full and simulated, and their neighbours too if the limit is not between them.
    """
    ladder = legal_workloads(dimension, subject.spec, subject.described.defaults, work)
    amounts = [pixel_count(item) for item in ladder]
    start = max(0, bisect_right(amounts, pixel_count(work)) - 1)
    priced = last_within_limit(amounts, lambda place: shortfall(ladder[place]), 0, start)

    @cache
    def row_at(place: int) -> Row:
        return attempt(ladder[place])

    top = last_fitting(len(ladder), lambda place: row_at(place).fits, priced)
    return row_at(max(top, 0)), None if top + 1 == len(ladder) else row_at(top + 1)


def _shortfall_function(
    subject: Subject,
    hardware: Hardware,
    accelerator: Accelerator | None,
    show_step: Callable[[str], object],
) -> Shortfall:
    """Return a function for the VRAM a workload is short of, in bytes: not positive if it fits, None if RAM is short.

    The smallest decode is found for the first workload with one picture and with several, then reused for others.
    """
    from vramplan.workload import workload_text

    decodes: dict[bool, tuple[Decode, ...]] = {}

    def short(work: Workload) -> float | None:
        show_step(workload_text(work))
        several = work.num_images_per_prompt > 1
        try:
            least = subject.least_memory(work, hardware, accelerator, decode=decodes.get(several))
        except UsageError:
            if several not in decodes:
                raise
            least = subject.least_memory(work, hardware, accelerator)  # too small to be decoded so
        if least is None:
            return None
        decodes.setdefault(several, least.decode)
        return 0 if least.limit_bytes is None else least.vram_bytes - least.limit_bytes

    return short


def _fit_cards(
    subjects: Sequence[tuple[Subject, Try, Workload]], request: PlanRequest, show_step: Callable[[str], object]
) -> Fits:
    """A row for each model and card size, by price, and the smallest card at each quality, simulated."""
    sizes = card_sizes()
    rows: list[Row] = []
    smallest: list[Smallest] = []
    for subject, attempt, work in subjects:
        cards = [_make_card(subject, attempt, work, size, show_step) for size in sizes]
        cards[-1].attempt(confirm=False, strict=True)  # an argument not valid on the largest card is a usage error
        priced = rows_by_size(cards)
        rows += [row for _, row in priced]
        smallest += smallest_cards(priced, rows[-1].model, request.allow)
    return _make_fits("cards", request, rows, smallest=tuple(smallest))


def _make_card(subject: Subject, attempt: Try, work: Workload, size: CardSize, show_step: Callable[[str], Any]) -> Card:
    """The least card of a size; a card with no usable memory counts as too small."""
    hardware, accelerator = choose_machine(size.name)

    def try_at(**options: Any) -> Row:
        show_step(f"{subject.spec.family or subject.spec.class_name} on {size.name}")
        given = {"strict": False, "device": size.name, "alike": size.alike} | options
        return attempt(work, hardware, accelerator, **given)

    def least(allow: Quality | None) -> int | None:
        found = subject.least_memory(work, hardware, accelerator, replace(subject.request, allow=allow))
        return found.vram_bytes if found else None

    return Card(size=size, attempt=cache(try_at), least=cache(least))
