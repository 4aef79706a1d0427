"""The tensors of a block: where they live in host memory, and their copies as views of one buffer on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

# Offsets within a buffer are multiples of this, as those of torch's own allocations: kernels choose by alignment, and
# another kernel may round differently (torch 2.13, `kMinBlockSize` of CUDACachingAllocator).
_ALIGNMENT = 512


class Leaf:
    """One parameter or buffer, as the plain tensors it consists of."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def plain(self) -> list[torch.Tensor]:
        """The plain tensors it consists of now, in a fixed order."""
        return [self.tensor.data]

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let it consist of these tensors from now on. It stays the same object."""
        self.tensor.data = tensors[0]

    def version(self) -> int:
        """A number that in-place changes raise. Tensors of inference mode have none."""
        return 0 if self.tensor.is_inference() else self.tensor._version


class WrapperLeaf(Leaf):
    """A tensor without memory of its own around others, such as torchao's (`__tensor_flatten__`)."""

    __slots__ = ()

    def plain(self) -> list[torch.Tensor]:
        """The inner tensors, those of nested wrappers included."""
        return list(_flat(self.tensor))

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Swap in a wrapper around these tensors: a wrapper's own device cannot be changed."""
        made = _rebuilt(self.tensor, iter(tensors))
        if isinstance(self.tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.tensor.requires_grad)
        torch.utils.swap_tensors(self.tensor, made)  # type: ignore[no-untyped-call]

    def version(self) -> int:
        """0: quantized weights are not edited in place."""
        return 0


class PackedLeaf(Leaf):
    """A 4-bit parameter of bitsandbytes, whose scales are attributes of its `quant_state`."""

    __slots__ = ()

    def plain(self) -> list[torch.Tensor]:
        """The packed weights, then the scales."""
        return [self.tensor.data, *(getattr(state, name) for state, name in self._scales())]

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace weights and scales; the module shares the state object."""
        self.tensor.data = tensors[0]
        for (state, name), tensor in zip(self._scales(), tensors[1:], strict=True):
            setattr(state, name, tensor)

    def _scales(self) -> list[tuple[Any, str]]:
        found, state = [], getattr(self.tensor, "quant_state", None)
        while state is not None:
            found += [(state, name) for name in ("absmax", "code", "offset") if getattr(state, name, None) is not None]
            state = state.state2
        return found


def leaf_of(tensor: torch.Tensor) -> Leaf:
    """The leaf of a parameter or buffer, by the kind of its memory."""
    if type(tensor).__name__ == "Params4bit":
        return PackedLeaf(tensor)
    return WrapperLeaf(tensor) if hasattr(tensor, "__tensor_flatten__") else Leaf(tensor)


def _flat(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _flat(getattr(tensor, name))


def _rebuilt(like: Any, tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    if not hasattr(like, "__tensor_flatten__"):
        return next(tensors)
    names, context = like.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(like, name), tensors) for name in names}
    made: torch.Tensor = type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())
    return made


class Block:
    """Leaves that are on the device together.

    `masters` are their plain tensors in host memory, one list for each leaf. `offsets` places each of them in a buffer
    of `size` bytes. `buffer` is the one on the device while the block is there, else None.
    """

    def __init__(self, name: str, tensors: Iterable[torch.Tensor], modules: Iterable[torch.nn.Module] = ()) -> None:
        self.name = name
        self.leaves = [leaf_of(tensor) for tensor in tensors]
        self.layers: list[Any] = [module for module in modules if hasattr(module, "merged_adapters")]
        self.buffer: Any = None
        self.slot: Any = None
        self.ticket: Any = None
        self.active = 0
        self.segments: list[tuple[Any, int, int, int]] = []  # page-locked: chunk, offset there, offset here, bytes
        self._seen: Any = None
        self.adopt()

    def adopt(self) -> None:
        """Take the tensors as they are now for the masters, and lay them out anew."""
        self.masters = [leaf.plain() for leaf in self.leaves]
        self.segments = []
        self.offsets: list[int] = []
        end = 0
        for tensor in self.tensors:
            self.offsets.append(end)
            end += aligned(tensor.numel() * tensor.element_size())
        self.size = end

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All masters."""
        return [tensor for several in self.masters for tensor in several]

    @property
    def moved(self) -> bool:
        """Whether the user has put other data in place of a master, while the block is not on the device."""
        return any(
            type(leaf) is Leaf and leaf.tensor.data_ptr() != several[0].data_ptr()
            for leaf, several in zip(self.leaves, self.masters, strict=True)
        )

    def replace_masters(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let these tensors be the masters, which hold the same values."""
        given = iter(tensors)
        self.masters = [[next(given) for _ in several] for several in self.masters]
        self.show_masters()

    def show_masters(self) -> None:
        """Let every leaf consist of its masters."""
        for leaf, several in zip(self.leaves, self.masters, strict=True):
            leaf.put(several)

    def show(self, view: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        """Let every leaf consist of views of the device's buffer: `view(offset, like)`."""
        offsets = iter(self.offsets)
        for leaf, several in zip(self.leaves, self.masters, strict=True):
            leaf.put([view(next(offsets), like) for like in several])
        self._seen = self._state()

    @property
    def edited(self) -> bool:
        """Whether the tensors were changed in place since `show`, as far as torch's version counters and the merged
        adapters of PEFT tell, which adds to `weight.data`."""
        return bool(self._seen != self._state())

    def _state(self) -> Any:
        return [leaf.version() for leaf in self.leaves], [tuple(layer.merged_adapters) for layer in self.layers]


def aligned(size: int) -> int:
    """The size in bytes, rounded up to a whole number of alignments."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride != expected:
                return False
            expected *= length
    return True


def move(tensor: torch.Tensor, device: torch.device | str) -> None:
    """Move the data of a tensor, which stays the same object, as `Module.to` does."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if tensor.device == torch.device(device):
        return
    with torch.no_grad():
        moved = tensor.to(device)  # and not the data alone: quantized ones take their scales along
    if is_traceable_wrapper_subclass(tensor):
        torch.utils.swap_tensors(tensor, moved)
    else:
        tensor.data = moved
