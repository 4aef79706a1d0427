"""The tensors of a block: where they live in host memory, and their copies as views of one buffer on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from vramplan.streaming.division import aligned

# Tensors smaller than this lie side by side in a buffer and in page-locked memory, so that one copy brings them all.
# Fitted on the transformers of FLUX.1, Qwen-Image, Wan and SDXL: above it chunks have gaps of more than 2 %.
_SMALL_BYTES = 8 << 20


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

    def places(self) -> list[Any]:
        """Where its plain tensors lie and how: other data in place of them lie elsewhere, or otherwise."""
        return [_place(self.tensor)]

    def version(self) -> int:
        """A number that in-place changes raise; 0 for tensors made in inference mode, which have none."""
        try:
            return self.tensor._version
        except RuntimeError:
            return 0


class _Nested(Leaf):
    """A tensor that consists of several."""

    __slots__ = ()

    def places(self) -> list[Any]:
        """Those of all of them."""
        return list(map(_place, self.plain()))


class WrapperLeaf(_Nested):
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


class PackedLeaf(_Nested):
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
            state = getattr(state, "state2", None)  # not there without nested scales
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
    of `size` bytes. `buffer` is the one on the device while the block is there, else None. Leaves consist of views of
    it while the block is `active`, that is while it runs, and of their masters at any other time: whoever reads or
    changes weights between forwards meets the masters.
    """

    def __init__(self, name: str, tensors: Iterable[torch.Tensor], roots: Sequence[torch.nn.Module] = ()) -> None:
        self.name = name
        self.leaves = [leaf_of(tensor) for tensor in tensors]
        own = [leaf.tensor for leaf in self.leaves]
        # SDXL has 1680 tensors, each looked at in every forward: plain ones without calls of Python for each
        self._plain = own if all(type(leaf) is Leaf for leaf in self.leaves) else None
        self._counted = own if self._plain is not None and not any(tensor.is_inference() for tensor in own) else None
        self._layers = [item for root in roots for item in root.modules() if "merged_adapters" in vars(item)]
        self.buffer: Any = None
        self.slot: Any = None
        self.ticket: Any = None
        self.active = 0
        self.segments: list[tuple[Any, int, int, int]] = []  # page-locked: chunk, offset there, offset here, bytes
        self._views = Views([])
        self._shown = False
        self._copied: Any = None
        self.adopt()

    def adopt(self) -> None:
        """Take the tensors as they are now for the masters, and lay them out anew."""
        self.masters = [leaf.plain() for leaf in self.leaves]
        self._at_home = _places(self.masters)
        self.segments = []
        sizes = [tensor.numel() * tensor.element_size() for tensor in self.tensors]
        self.offsets = [0] * len(sizes)
        self.size = 0
        for number in sorted(range(len(sizes)), key=lambda number: is_small(self.tensors[number])):
            self.offsets[number] = self.size
            self.size += aligned(sizes[number])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All masters."""
        return [tensor for several in self.masters for tensor in several]

    def replace_master(self, number: int, tensor: torch.Tensor) -> None:
        """Let this tensor be the master with this number among all of them. It has the same value."""
        for leaf, several in zip(self.leaves, self.masters, strict=True):
            if number < len(several):
                several[number] = tensor
                leaf.put(several)
                self._at_home = _places(self.masters)
                return
            number -= len(several)

    def set_locked(self, places: Sequence[tuple[Any, int]]) -> None:
        """Note the page-locked chunk of each master, and its offset there: neighbours are copied in one piece."""
        segments: list[tuple[Any, int, int, int]] = []
        tensors = self.tensors
        for number in sorted(range(len(places)), key=lambda number: self.offsets[number]):
            (chunk, there), here = places[number], self.offsets[number]
            size = aligned(tensors[number].numel() * tensors[number].element_size())
            last = segments[-1] if segments else None
            if last is not None and last[0] is chunk and last[1] + last[3] == there and last[2] + last[3] == here:
                segments[-1] = (chunk, last[1], last[2], last[3] + size)
            else:
                segments.append((chunk, there, here, size))
        self.segments = segments

    def locked_places(self) -> dict[int, tuple[Any, int]]:
        """The chunk and the offset in it of each page-locked master, by its address."""
        found: dict[int, tuple[Any, int]] = {}
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            for chunk, there, here, size in self.segments:
                if here <= offset < here + size:
                    found[tensor.data_ptr()] = chunk, there + offset - here
        return found

    @property
    def moved(self) -> bool:
        """Whether the user has put other data in place of a master, while the block does not run."""
        return not self._shown and self._places() != self._at_home

    @property
    def outdated(self) -> bool:
        """Whether masters were changed since they were copied, as far as version counters of torch tell, and the
        merged adapters of PEFT, which adds to `weight.data`."""
        return not self._shown and (self._copied != self._state() or self.moved)

    def replace_masters(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let these tensors be the masters, which hold the same values."""
        given = iter(tensors)
        self.masters = [[next(given) for _ in several] for several in self.masters]
        self._at_home = _places(self.masters)
        self._put(self.masters)

    def on_device(
        self, buffer: Any, view: Callable[[Any, int, torch.Tensor], torch.Tensor], earlier: dict[Block, Any]
    ) -> None:
        """Note that the masters as they are now are on their way to a buffer: `view(buffer, offset, like)`.

        `earlier` keeps the views of this buffer by blocks that were there.
        """
        masters, views = earlier.get(self, (None, None))
        if masters is not self.masters:
            offsets = iter(self.offsets)
            views = Views([[view(buffer, next(offsets), like) for like in several] for several in self.masters])
            earlier[self] = self.masters, views
        self._views = views
        self._copied = self._state()
        self.buffer = buffer

    def off_device(self) -> None:
        """Forget the buffer."""
        self.hide()
        if self.slot is not None:
            self.slot.block = self.slot = None
        self.buffer, self._views = None, Views([])

    def show(self) -> None:
        """Let every leaf consist of its views of the buffer."""
        if not self._shown:
            self._shown = True
            self._put(self._views.tensors)

    def hide(self) -> None:
        """Let every leaf consist of its masters again, and keep what was changed while it did not."""
        if not self._shown:
            return
        state, replaced = self._state(), False
        if self._copied != state or self._places() != self._views.places:
            replaced = self._copy_back()
        self._put(self.masters)
        self._shown = False
        if replaced:
            self.adopt()
        self._copied = None if replaced else state

    def refuse_later_backward(self) -> None:
        """Let torch refuse a backward pass through weights that are no longer there (`increment_version`)."""
        if not torch.is_grad_enabled():
            return
        for leaf in self.leaves:
            if type(leaf) is Leaf:
                with suppress(RuntimeError):  # made in inference mode
                    torch.autograd.graph.increment_version(leaf.tensor)
        if self._copied is not None:
            self._copied = self._state()

    def _put(self, tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        if self._plain is not None:
            for tensor, (data,) in zip(self._plain, tensors, strict=True):
                tensor.data = data
            return
        for leaf, several in zip(self.leaves, tensors, strict=True):
            leaf.put(several)

    def _places(self) -> list[Any]:
        if self._plain is not None:
            return [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in self._plain]
        return [place for leaf in self.leaves for place in leaf.places()]

    def _copy_back(self) -> bool:
        """Write what was changed on the device into the masters, which are memory of the process from then on: a
        mapped file is private. Other data in place of the views become masters themselves; return whether any did."""
        replaced = False
        with torch.no_grad(), torch.inference_mode(False):
            for leaf, masters, views in zip(self.leaves, self.masters, self._views.tensors, strict=True):
                places, of_views = leaf.places(), list(map(_place, views))
                if places == list(map(_place, masters)):  # interrupted in `show` or `hide`
                    continue
                if places == of_views:
                    for master, now in zip(masters, leaf.plain(), strict=True):
                        with torch.inference_mode(master.is_inference()):
                            master.copy_(now)
                else:
                    device = masters[0].device
                    masters[:] = [torch.empty_like(now, device=device).copy_(now) for now in leaf.plain()]
                    replaced = True
        return replaced

    def _state(self) -> Any:
        merged = [tuple(vars(layer)["merged_adapters"]) for layer in self._layers]
        if self._counted is not None:
            return [tensor._version for tensor in self._counted], merged
        return [leaf.version() for leaf in self.leaves], merged


class Views:
    """The tensors that a block's leaves consist of on the device, and where these lie."""

    __slots__ = ("places", "tensors")

    def __init__(self, tensors: list[list[torch.Tensor]]) -> None:
        self.tensors = tensors
        self.places = _places(tensors)


def _places(tensors: Iterable[Iterable[torch.Tensor]]) -> list[Any]:
    return [_place(tensor) for several in tensors for tensor in several]


def _place(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def is_small(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies beside other small ones of its block."""
    return tensor.numel() * tensor.element_size() < _SMALL_BYTES


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
