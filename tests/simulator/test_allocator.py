"""The caching allocator's documented rules (PyTorch, "CUDA semantics", and c10/cuda/CUDACachingAllocator.cpp)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.simulator.allocator import CachingAllocator, DeviceFullError
from vramplan.units import MIB


def test_requests_are_rounded_to_512_bytes() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated_bytes == 512 + 1024


def test_small_requests_share_a_segment_of_2_mib() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(512 * 1024)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(512)
    assert allocator.reserved_bytes == 4 * MIB


def test_requests_from_1_to_10_mib_share_a_segment_of_20_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1 * MIB + 1)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_larger_requests_get_their_own_size_rounded_to_2_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB)
    assert allocator.reserved_bytes == 12 * MIB


def test_a_small_rest_of_a_large_chunk_is_not_split_off() -> None:
    allocator = CachingAllocator()
    first = allocator.allocate(12 * MIB)
    allocator.free(first)
    again = allocator.allocate(12 * MIB - MIB // 2)
    assert again.size == 12 * MIB
    assert allocator.allocated_bytes == 12 * MIB


def test_a_freed_chunk_is_used_again_and_stays_reserved() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB))
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 64 * MIB)
    allocator.allocate(60 * MIB)
    assert allocator.reserved_bytes == 64 * MIB


def test_neighbours_are_merged_when_freed() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(100 * MIB))
    parts = [allocator.allocate(25 * MIB) for _ in range(4)]
    assert allocator.reserved_bytes == 100 * MIB
    for part in (parts[1], parts[3], parts[0], parts[2]):
        allocator.free(part)
    allocator.allocate(100 * MIB)
    assert allocator.reserved_bytes == 100 * MIB


def test_the_best_fit_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(80 * MIB), allocator.allocate(30 * MIB)
    allocator.free(large)
    allocator.free(small)
    allocator.allocate(30 * MIB)
    allocator.allocate(80 * MIB)
    assert allocator.reserved_bytes == 110 * MIB


def test_streams_do_not_share_memory() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB, stream=1))
    allocator.allocate(64 * MIB, stream=0)
    assert allocator.reserved_bytes == 128 * MIB


def test_empty_cache_gives_back_only_segments_that_are_wholly_free() -> None:
    allocator = CachingAllocator()
    whole, split = allocator.allocate(40 * MIB), allocator.allocate(60 * MIB)
    allocator.free(split)
    kept = allocator.allocate(20 * MIB)
    allocator.free(whole)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 60 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_full_device_first_gives_its_cache_back_and_then_is_out_of_memory() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(90 * MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 90 * MIB)
    with pytest.raises(DeviceFullError) as failure:
        allocator.allocate(20 * MIB)
    assert failure.value.requested_bytes == 20 * MIB
    assert allocator.allocated_bytes == 90 * MIB


def test_fragments_alone_can_make_a_device_full() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.allocate(100 * MIB))
    parts = [allocator.allocate(25 * MIB) for _ in range(4)]
    allocator.free(parts[0])
    allocator.free(parts[2])
    with pytest.raises(DeviceFullError):
        allocator.allocate(50 * MIB)


def test_expandable_segments_lose_nothing_to_segment_sizes() -> None:
    fixed, expandable = CachingAllocator(), CachingAllocator(expandable=True)
    for allocator in (fixed, expandable):
        allocator.allocate(3 * MIB)
    assert fixed.reserved_bytes == 20 * MIB
    assert expandable.reserved_bytes == 4 * MIB


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.booleans()), max_size=60), st.booleans())
def test_books_always_balance(steps: list[tuple[int, bool]], expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    held = []
    for size, freeing in steps:
        if freeing and held:
            allocator.free(held.pop(len(held) // 2))
        else:
            held.append(allocator.allocate(size))
        assert allocator.allocated_bytes == sum(chunk.size for chunk in held)
        assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    for chunk in held:
        allocator.free(chunk)
    allocator.empty_cache()
    assert allocator.allocated_bytes == 0
    assert allocator.reserved_bytes == 0 or expandable
