from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.hardware.visible_devices import visible_positions

UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("0,1,2", [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("1,-1,2", [1]),
        ("-1", []),
        ("0,7,1", [0]),
        ("0,x,1", [0]),
        ("0,,1", [0]),
        ("1gpu2,2nd", [1, 2]),
        ("+1", [1]),
        ("1,0,1", []),
        ("GPU-bb33,GPU-aa11", [2, 0]),
        ("GPU-b", [2]),
        ("GPU-aa1,GPU-aa2", [0, 1]),
        ("GPU-aa", []),
        ("GPU-bb33,GPU-aa", [2]),
        ("GPU-bb33,0", [2]),
        ("0,GPU-bb33", [0]),
        ("GPU-b,GPU-bb", []),
        ("MIG-1234", []),
        ("MIG-GPU-aa11/1/0", []),
        ("GPU-aa11,MIG-cc44", [0]),
        ("0" * 400, []),
        ("NoDevFiles", []),
    ],
)
def test_the_list_is_read_as_the_driver_reads_it(text: str | None, positions: list[int]) -> None:
    assert visible_positions(text, UUIDS) == positions


@pytest.mark.parametrize(
    ("text", "positions"),
    [("MIG-bb,MIG-aa", [1, 0]), ("MIG-aa11,GPU-cc", [0]), ("MIG-aa11,0", [0]), ("MIG-GPU-cc/1/0", [3]), ("1", [1])],
)
def test_instances_are_named_likewise(text: str, positions: list[int]) -> None:
    assert visible_positions(text, ["MIG-aa11", "MIG-bb22", "GPU-cc33", "MIG-GPU-cc/1/0"]) == positions


def test_a_device_without_identifier_cannot_be_named() -> None:
    assert visible_positions("GPU-bb", [None, "GPU-bb33"]) == [1]


ENTRIES = st.sampled_from(["0", "1", "2", "3", "-1", " 1", "x", "2a", ""])


@settings(deadline=None)  # the first call imports torch
@given(st.lists(ENTRIES, max_size=5))
def test_numbers_are_read_as_torch_reads_them(entries: list[str]) -> None:
    torch_cuda = pytest.importorskip("torch.cuda")
    text = ",".join(entries)
    with mock.patch.dict("os.environ", CUDA_VISIBLE_DEVICES=text):
        parsed = torch_cuda._parse_visible_devices()
    expected = [position for position in parsed if position < 3]
    if expected == parsed:  # torch cuts the list at the first number too high, elsewhere in its code
        assert visible_positions(text, UUIDS) == expected
