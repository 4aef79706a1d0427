"""Find the smallest card that a model runs on, at each quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vramplan.fitting.cards import CardSize
from vramplan.strategies.base import QUALITIES, Quality

if TYPE_CHECKING:
    from vramplan.fitting.types import Row, Smallest, Try

LeastVram = Callable[[Quality | None], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One size of card: functions that plan the model on its least device, and find the least VRAM needed there."""

    size: CardSize
    attempt: Try
    least: LeastVram


def rows_by_size(cards: Sequence[Card]) -> list[tuple[Card, Row]]:
    """Each size with its row, by price. Each kind of card ends with the first size that holds the whole model."""
    found: list[tuple[Card, Row]] = []
    roomy: set[object] = set()
    for card in cards:
        if card.size.kind not in roomy:
            row = card.attempt(confirm=False)
            found.append((card, row))
            roomy |= {card.size.kind} if _holds_all(row) else set()
    return found


def _holds_all(row: Row) -> bool:
    """Whether nothing is offloaded and the picture is decoded in one piece."""
    chosen = row.settings
    return chosen is not None and set(chosen.placement.values()) == {"resident"} and not chosen.decode


def smallest_cards(priced: Sequence[tuple[Card, Row]], model: str, allow: Quality | None) -> list[Smallest]:
    """The smallest card at each allowed quality, confirmed by simulation.

    The answer for a stricter quality also holds for a looser one, unless a smaller card runs the model there.
    """
    limits = QUALITIES if allow is None else (allow,)
    found: list[Smallest] = []
    more: list[tuple[Card, Quality | None]] = []
    for limit in reversed(limits):  # a card that fails with everything allowed fails with less, too
        ready = [(card, allow) for card, row in priced if _within(row, limit)]
        below = [card for card, _ in priced if not ready or card.size.memory_bytes < ready[0][0].size.memory_bytes]
        open_ones = allow is None and limit != QUALITIES[0]
        if open_ones and (limit == QUALITIES[-1] or more):
            more = _usable_cards(below, limit)
        found.insert(0, _first_confirmed(model, limit, [*more, *ready] if open_ones else ready))
    return found


def _usable_cards(cards: Sequence[Card], limit: Quality) -> list[tuple[Card, Quality | None]]:
    """The cards, smallest first, that run the model if this quality is allowed.

    Each kind is tried from its largest card down, until a card is too small.
    """
    found: list[tuple[Card, Quality | None]] = []
    small: set[object] = set()
    for card in reversed(cards):
        if card.size.kind in small:
            continue
        if card.attempt(confirm=False, allow=limit).fits:
            found.insert(0, (card, limit))
        else:
            small.add(card.size.kind)
    return found


def _within(row: Row, limit: Quality) -> bool:
    return row.fits and row.quality is not None and QUALITIES.index(row.quality) <= QUALITIES.index(limit)


def _first_confirmed(model: str, limit: Quality, cards: Sequence[tuple[Card, Quality | None]]) -> Smallest:
    """The first card that runs the model when simulated, and the least VRAM it can be limited to there, by price."""
    from vramplan.fitting.types import Smallest

    for card, allow in cards:
        row = card.attempt(allow=allow)
        if _within(row, limit) and row.projected is not None:
            least = card.least(limit if limit == QUALITIES[0] else allow)
            reserved = row.projected.vram_reserved_bytes
            return Smallest(model=model, allow=limit, row=row, least_vram_bytes=min(reserved, least or reserved))
    return Smallest(model=model, allow=limit, row=None, least_vram_bytes=None)
