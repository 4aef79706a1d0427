from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.machines import make_budget
from vramplan.api.machine import known_budget
from vramplan.calibration.published_errors import bundled_error
from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Budget, Hardware, Host, ProcessUsage
from vramplan.planner.residuals import ProjectionError
from vramplan.units import GIB, MIB

CARD = Accelerator(kind="cuda", index=0, name="Card 24", total_bytes=24 * GIB, free_bytes=20 * GIB)
HOST = Host(total_bytes=64 * GIB, available_bytes=48 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=HOST)
MAC = Accelerator(kind="mps", index=0, name="M2", total_bytes=21 * GIB, free_bytes=18 * GIB, unified=True)


def sizes(budget: Budget, memory: str) -> dict[str, int]:
    return {item.name: item.size_bytes for item in budget.deductions if item.memory == memory}


def with_card(**changes: object) -> Hardware:
    return replace(MACHINE, accelerators=(replace(CARD, **changes),))


# Five percent, so that the sums can be checked by hand; at least 200 MiB.
ERROR = ProjectionError(share=0.05, least_bytes=200 * MIB, reason="so far off in measurements")
OTHERS = 400 * MIB


def test_every_byte_between_free_and_the_budget_is_named() -> None:
    budget = make_budget(MACHINE, error=ERROR)
    rest = 20 * GIB - 512 * MIB - OTHERS
    kept = rest - int(rest / 1.05)
    assert sizes(budget, "vram") == {"driver context": 512 * MIB, "other programs": OTHERS, "margin": kept}
    assert sizes(budget, "ram") == {"reserve": int(64 * GIB * 0.05)}
    assert budget.vram_bytes == rest - kept
    assert budget.ram_bytes == 48 * GIB - int(64 * GIB * 0.05)
    assert all(item.reason for item in budget.deductions)
    assert "assumed" in budget.deductions[0].reason
    assert budget.deductions[2].reason == ERROR.reason


def test_small_memories_keep_the_least_margin_and_reserve() -> None:
    small = Hardware(
        accelerators=(replace(CARD, total_bytes=4 * GIB, free_bytes=4 * GIB),),
        host=Host(total_bytes=8 * GIB, available_bytes=6 * GIB),
    )
    budget = make_budget(small, error=ERROR)
    assert sizes(budget, "vram")["margin"] == 200 * MIB
    assert sizes(budget, "ram")["reserve"] == GIB


def test_without_more_known_the_margin_is_that_of_published_simulated_peaks() -> None:
    assert known_budget(MACHINE, CARD, {}) == make_budget(MACHINE, error=bundled_error("simulated"))


@pytest.mark.parametrize(("draws", "kept"), [(True, OTHERS), (None, OTHERS), (False, None)])
def test_other_programs_need_nothing_of_a_card_that_draws_no_desktop(draws: bool | None, kept: int | None) -> None:
    budget = make_budget(with_card(display=draws), error=ERROR)
    assert sizes(budget, "vram").get("other programs") == kept


def test_a_measured_context_takes_the_place_of_the_assumed_one() -> None:
    budget = make_budget(MACHINE, error=ERROR, context_bytes=300 * MIB)
    assert sizes(budget, "vram")["driver context"] == 300 * MIB
    assert "measured" in budget.deductions[0].reason


def test_what_the_pipeline_holds_already_is_given_back_before_the_margin_is_taken() -> None:
    """A pipeline that fills its card is no full card, and its projection may be as far off as any."""
    full = with_card(free_bytes=1 * GIB, display=False)
    budget = make_budget(full, error=ERROR, held_vram_bytes=19 * GIB, held_ram_bytes=GIB)
    rest = 20 * GIB - 512 * MIB
    assert sizes(budget, "vram")["this pipeline"] == -19 * GIB
    assert budget.vram_bytes == int(rest / 1.05)
    assert sizes(budget, "ram")["this pipeline"] == -GIB
    assert sizes(make_budget(full, vram="8GiB", ram="8GiB", held_vram_bytes=GIB, held_ram_bytes=GIB), "vram") == {}


def test_the_reserve_is_a_share_of_the_control_group_limit() -> None:
    limited = replace(MACHINE, host=replace(HOST, limit_bytes=40 * GIB, available_bytes=30 * GIB))
    assert make_budget(limited).ram_bytes == 30 * GIB - 2 * GIB


def test_a_given_margin_replaces_the_default() -> None:
    assert sizes(make_budget(MACHINE, margin="3GiB"), "vram")["margin"] == 3 * GIB
    assert sizes(make_budget(MACHINE, margin="25%"), "vram") == {"driver context": 512 * MIB, "margin": 6 * GIB}


@pytest.mark.parametrize("margin", ["0", "0%", " 0 ", "0MiB"])
def test_a_margin_may_be_nothing(margin: str) -> None:
    assert make_budget(MACHINE, margin=margin).vram_bytes == 20 * GIB - 512 * MIB


@pytest.mark.parametrize("margin", ["-1GiB", "much", "150%", "-5%"])
def test_a_senseless_margin_is_refused(margin: str) -> None:
    with pytest.raises(UsageError):
        make_budget(MACHINE, margin=margin)


def test_without_an_accelerator_there_is_no_vram() -> None:
    budget = make_budget(Hardware(accelerators=(), host=HOST), margin="1GiB")
    assert budget.vram_bytes is None
    assert sizes(budget, "vram") == {}


def test_vram_without_an_accelerator_is_refused() -> None:
    with pytest.raises(UsageError, match="no accelerator"):
        make_budget(Hardware(accelerators=(), host=HOST), vram="8GiB")


def test_the_first_accelerator_is_taken_unless_another_is_named() -> None:
    second = replace(CARD, index=1, total_bytes=8 * GIB, free_bytes=8 * GIB)
    both = replace(MACHINE, accelerators=(CARD, second))
    assert make_budget(both) == make_budget(MACHINE)
    assert make_budget(both, accelerator=second) == make_budget(replace(MACHINE, accelerators=(second,)))


@pytest.mark.parametrize(
    ("vram", "count"), [("12GiB", 12 * GIB), ("-1GiB", 19 * GIB), ("50%", 12 * GIB), ("24GiB", 24 * GIB)]
)
def test_given_vram_is_taken_as_it_is(vram: str, count: int) -> None:
    budget = make_budget(MACHINE, vram=vram, margin="2GiB")
    assert budget.vram_bytes == count
    assert sizes(budget, "vram") == {}


def test_more_vram_than_the_card_has_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"32\.00 GiB.*Card 24 has 24\.00 GiB"):
        make_budget(MACHINE, vram="32GiB")


@pytest.mark.parametrize(
    ("ram", "count"), [("16GiB", 16 * GIB), ("-8GiB", 40 * GIB), ("50%", 32 * GIB), ("96GiB", 96 * GIB)]
)
def test_given_ram_is_taken_as_it_is(ram: str, count: int) -> None:
    budget = make_budget(MACHINE, ram=ram)
    assert budget.ram_bytes == count
    assert sizes(budget, "ram") == {}


def test_unknown_free_memory_is_said() -> None:
    budget = make_budget(with_card(free_bytes=None), error=ERROR)
    assert sizes(budget, "vram")["in use"] == 0
    assert budget.vram_bytes == int((24 * GIB - 512 * MIB - OTHERS) / 1.05)


def test_a_shared_pool_is_limited_by_the_host_and_keeps_more_free() -> None:
    shared = Hardware(accelerators=(MAC,), host=Host(total_bytes=32 * GIB, available_bytes=12 * GIB))
    budget = make_budget(shared)
    assert sizes(budget, "vram") == {"in use by the host": 6 * GIB, "margin": int(21 * GIB * 0.20)}
    assert budget.vram_bytes == 12 * GIB - int(21 * GIB * 0.20)
    assert make_budget(shared, vram="-1GiB").vram_bytes == 11 * GIB


def test_a_shared_pool_that_the_host_does_not_bind_is_not_cut() -> None:
    budget = make_budget(Hardware(accelerators=(MAC,), host=HOST))
    assert sizes(budget, "vram") == {"margin": int(21 * GIB * 0.20)}


def test_a_shared_pool_keeps_no_less_than_projections_were_off() -> None:
    shared = Hardware(accelerators=(MAC,), host=HOST)
    far = ProjectionError(share=1.0, least_bytes=0, reason="twice as much")
    budget = make_budget(shared, error=far)
    assert budget.vram_bytes == 9 * GIB
    assert budget.deductions[0].reason == "twice as much"


def test_a_full_card_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        NothingFitsError,
        match=r"no VRAM is left.*0\.50 GiB free, less driver context 0\.50 GiB, other programs 0\.39",
    ):
        make_budget(with_card(free_bytes=512 * MIB))


def test_exactly_nothing_left_is_refused_and_one_byte_is_not() -> None:
    with pytest.raises(NothingFitsError, match="no VRAM is left"):
        make_budget(with_card(free_bytes=512 * MIB), margin="0")
    assert make_budget(with_card(free_bytes=512 * MIB + 1), margin="0").vram_bytes == 1


def test_a_full_host_is_refused_with_the_numbers() -> None:
    with pytest.raises(NothingFitsError, match=r"no RAM is left.*1\.00 GiB free, less reserve 3\.20 GiB"):
        make_budget(replace(MACHINE, host=replace(HOST, available_bytes=GIB)))


def test_a_process_limit_is_torchs_own_and_not_shared_with_driver_and_desktop() -> None:
    """Half of the 23.6 GiB that torch sees of 24: context and desktop come out of the other half."""
    own = ProcessUsage(
        has_context=False, allocated_bytes=GIB, cached_bytes=0, fraction=0.5, limit_bytes=int(0.5 * 23.6 * GIB)
    )
    exact = ProjectionError(share=0, least_bytes=0, reason="none")
    budget = make_budget(with_card(own=own), error=exact)
    assert budget.vram_bytes == int(0.5 * 23.6 * GIB) - GIB
    assert sizes(budget, "vram")["process limit"] == 20 * GIB - 512 * MIB - OTHERS - budget.vram_bytes
    untold = make_budget(with_card(own=replace(own, limit_bytes=None)), error=exact)
    assert untold.vram_bytes == 12 * GIB - GIB
    held = make_budget(with_card(own=own), error=exact, held_vram_bytes=GIB)
    assert held.vram_bytes == int(0.5 * 23.6 * GIB)
    loose = make_budget(with_card(own=replace(own, fraction=0.99, limit_bytes=23 * GIB)), error=exact)
    assert "process limit" not in sizes(loose, "vram")


BYTES = st.integers(min_value=0, max_value=1 << 40)


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    total, host_total = draw(st.integers(1 << 20, 1 << 40)), draw(st.integers(1 << 20, 1 << 42))
    limit = draw(st.none() | st.integers(1, host_total))
    card = Accelerator(
        kind=draw(st.sampled_from(["cuda", "rocm", "xpu", "mps"])),
        index=0,
        name="any",
        total_bytes=total,
        free_bytes=draw(st.none() | st.integers(0, total)),
        unified=draw(st.booleans()),
        display=draw(st.none() | st.booleans()),
    )
    available = draw(st.integers(0, limit or host_total))
    host = Host(total_bytes=host_total, available_bytes=available, limit_bytes=limit)
    return Hardware(accelerators=(card,), host=host)


def budget_or_none(machine: Hardware, **amounts: object) -> Budget | None:
    """The budget; None where nothing is left, which must be said in no other way."""
    with suppress(NothingFitsError, UsageError):
        return make_budget(machine, **amounts)
    return None


@settings(deadline=None)
@given(machines(), st.none() | st.sampled_from(["0", "1GiB", "10%"]))
def test_the_deductions_add_up_to_what_is_missing(machine: Hardware, margin: str | None) -> None:
    budget = budget_or_none(machine, margin=margin)
    if budget is None:
        return
    card = machine.accelerators[0]
    start = card.total_bytes if card.free_bytes is None else card.free_bytes
    assert budget.vram_bytes == start - sum(sizes(budget, "vram").values())
    assert budget.ram_bytes == machine.host.available_bytes - sum(sizes(budget, "ram").values())
    assert 0 < budget.vram_bytes <= start
    assert 0 < budget.ram_bytes < machine.host.available_bytes
    if card.unified:
        assert budget.vram_bytes <= machine.host.available_bytes
    assert all(item.size_bytes >= 0 for item in budget.deductions)


@settings(deadline=None)
@given(machines(), st.floats(0, 2), st.integers(0, GIB), st.integers(1, 1 << 40))
def test_what_is_accepted_fits_even_where_it_was_projected_too_low(
    machine: Hardware, share: float, least: int, projected: int
) -> None:
    error = ProjectionError(share=share, least_bytes=least, reason="measured")
    budget = budget_or_none(machine, error=error)
    if budget is None or budget.vram_bytes is None or projected > budget.vram_bytes:
        return
    card = machine.accelerators[0]
    free = card.total_bytes if card.free_bytes is None else card.free_bytes
    others = sum(size for name, size in sizes(budget, "vram").items() if name != "margin")
    assert max(projected * (1 + share), projected + least) <= (free - others) * (1 + 1e-12) + 1


@settings(deadline=None)
@given(machines(), st.floats(0, 2), st.integers(0, GIB), st.integers(0, 1 << 40))
def test_more_free_memory_never_gives_less(machine: Hardware, share: float, least: int, more: int) -> None:
    error = ProjectionError(share=share, least_bytes=least, reason="measured")
    card = machine.accelerators[0]
    if card.free_bytes is None:
        return
    freer = replace(card, free_bytes=min(card.total_bytes, card.free_bytes + more))
    less = budget_or_none(machine, error=error)
    if less is not None:
        assert make_budget(replace(machine, accelerators=(freer,)), error=error).vram_bytes >= less.vram_bytes


@settings(deadline=None)
@given(machines(), BYTES, BYTES)
def test_a_larger_margin_never_gives_more(machine: Hardware, one: int, other: int) -> None:
    less, more = (budget_or_none(machine, margin=str(size)) for size in sorted((one, other)))
    if more is not None:
        assert less is not None
        assert less.vram_bytes - more.vram_bytes == abs(one - other)


@settings(deadline=None)
@given(machines(), st.integers(min_value=1, max_value=1 << 41))
def test_a_given_amount_is_kept_to_the_byte_or_refused(machine: Hardware, count: int) -> None:
    budget = budget_or_none(machine, vram=str(count), ram=str(count))
    total = machine.accelerators[0].total_bytes
    if count > total * 1.1:
        assert budget is None
    elif count > total:  # the size in a card's name, of which its driver keeps a part
        assert budget is not None
        assert (budget.vram_bytes, budget.ram_bytes) == (total, count)
    else:
        assert budget == Budget(vram_bytes=count, ram_bytes=count)
