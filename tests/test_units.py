import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.errors import UsageError
from vramplan.units import GIB, KIB, MIB, format_bytes, format_seconds_range, parse_amount, parse_bytes

COUNTS = st.integers(min_value=0, max_value=1 << 44)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GiB", 12 * GIB),
        ("12GB", 12 * 10**9),
        ("12G", 12 * 10**9),
        ("12000M", 12 * 10**9),
        ("1.5 GiB", GIB + 512 * MIB),
        (".5gib", 512 * MIB),
        ("  640 mib ", 640 * MIB),
        ("2TiB", 2 << 40),
        ("7k", 7000),
        ("512", 512),
        ("512B", 512),
        ("0", 0),
    ],
)
def test_each_unit_has_its_true_meaning(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "12 XB", "1e3", "-1GiB", "12GiB free", "1..5G", "12GiBB", "nan"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size: write it like 12GiB"):
        parse_bytes(text)


def test_what_is_no_size_is_told_with_what_it_was_given_for() -> None:
    with pytest.raises(UsageError, match=r"^vram 'lots' is not a size"):
        parse_amount("lots", free_bytes=None, total_bytes=None, name="vram")
    with pytest.raises(UsageError, match=r"^ram 'lots' is not a size"):
        parse_amount("-lots", free_bytes=1, total_bytes=None, name="ram")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (12 * KIB, "12 KiB"),
        (64 * MIB, "64 MiB"),
        (640 * MIB, "0.62 GiB"),
        (GIB + 512 * MIB, "1.50 GiB"),
        (-GIB // 4, "-0.25 GiB"),
        (-5 * MIB, "-5 MiB"),
    ],
)
def test_format_is_what_people_read(count: int, text: str) -> None:
    assert format_bytes(count) == text


@settings(deadline=None)
@given(COUNTS)
def test_plain_bytes_survive_the_round_trip(count: int) -> None:
    assert parse_bytes(str(count)) == count


@settings(deadline=None)
@given(COUNTS)
def test_formatting_loses_less_than_a_shown_digit(count: int) -> None:
    shown = parse_bytes(format_bytes(count))
    digit = GIB // 100 if count >= GIB // 10 else MIB if count >= MIB else KIB
    assert abs(shown - count) <= digit / 2 + 1


@settings(deadline=None)
@given(COUNTS)
def test_the_sign_is_kept(count: int) -> None:
    assert format_bytes(-count).removeprefix("-") == format_bytes(count)


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=1 << 20), st.sampled_from(["KiB", "MiB", "GiB", "KB", "MB", "GB"]))
def test_units_are_read_whatever_their_case_and_spacing(number: int, unit: str) -> None:
    count = parse_bytes(f"{number}{unit}")
    assert parse_bytes(f" {number} {unit.lower()}") == parse_bytes(f"{number}{unit.upper()}") == count


def test_an_amount_is_absolute_relative_to_free_or_a_share_of_the_total() -> None:
    memory = {"free_bytes": 10 * GIB, "total_bytes": 16 * GIB}
    assert parse_amount("12GiB", **memory) == 12 * GIB
    assert parse_amount("-1GiB", **memory) == 9 * GIB
    assert parse_amount("50%", **memory) == 8 * GIB
    assert parse_amount(" 12.5 % ", **memory) == 2 * GIB


@pytest.mark.parametrize("text", ["0", "-10GiB", "-11GiB", "0%"])
def test_an_amount_that_leaves_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^vram .*nothing is left to use"):
        parse_amount(text, free_bytes=10 * GIB, total_bytes=16 * GIB, name="vram")


@pytest.mark.parametrize("text", ["101%", "-5%", "x%", "%", "nan%", "inf%"])
def test_an_impossible_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_amount(text, free_bytes=10 * GIB, total_bytes=16 * GIB)


@pytest.mark.parametrize("text", ["-1GiB", "85%"])
def test_an_amount_of_an_unknown_memory_asks_for_an_absolute_size(text: str) -> None:
    with pytest.raises(UsageError, match="give an absolute size"):
        parse_amount(text, free_bytes=None, total_bytes=None)


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=100), st.integers(min_value=1 << 20, max_value=1 << 44))
def test_a_share_is_never_more_than_the_total(share: int, total: int) -> None:
    assert 0 < parse_amount(f"{share}%", free_bytes=None, total_bytes=total) <= total


@pytest.mark.parametrize(
    ("seconds", "between", "text"),
    [
        (70, (60.4, 84.9), "60 to 85 s"),
        (70, (43.2, 110.5), "43 to 110 s"),
        (1, (0.836, 1.34), "0.84 to 1.3 s"),
        (100, (60, 180), "60 s to 3.0 min"),
        (0.01, (0.0066, 0.02), "6.6 ms to 0.02 s"),
        (300, (200, 450), "3.3 to 7.5 min"),
        (69.2, None, "69 s"),
    ],
)
def test_a_range_of_seconds_names_its_unit_once(seconds: float, between: tuple[float, float] | None, text: str) -> None:
    assert format_seconds_range(seconds, between) == text
