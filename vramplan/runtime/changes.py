"""Whether a pipeline is still what a plan was put on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vramplan.pipeline.modules import modules_of

if TYPE_CHECKING:
    import torch

# Of a component: which object it is, how many tensors it has, how many of its modules have an offload hook.
State = tuple[int, int, int]


def state_of(pipe: Any) -> dict[str, State]:
    """What of each component an adapter or another module in its place would change; no weight is read or held."""
    return {name: _state(module) for name, module in modules_of(pipe).items()}


def change_since(pipe: Any, before: Mapping[str, State]) -> str | None:
    """What has been done to the pipeline behind the plan's back, and what to do about it; None for nothing.

    diffusers 0.42 puts group offloading on anew when a LoRA is loaded, all of it alike: partial residency is then none
    any more, also once the LoRA is gone.
    """
    now = state_of(pipe)
    other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not other:
        return None
    told = _told(other[0], before.get(other[0]), now.get(other[0]))
    return (
        f"{told} since the plan was applied, which no longer describes it: change a pipeline inside "
        "`with vramplan.changing(pipe):`, or plan again by vramplan.auto_configure(pipe)"
    )


def _told(name: str, before: State | None, now: State | None) -> str:
    if before is None or now is None:
        return f"{name} was {'added' if before is None else 'taken out'}"
    if before[1] != now[1]:
        return f"{name} went from {before[1]} to {now[1]} tensors"
    if before[2] != now[2]:
        return f"{name} went from {before[2]} to {now[2]} offload hooks"
    return f"{name} was replaced"


def _state(module: torch.nn.Module) -> State:
    children = list(module.modules())
    tensors = sum(len(child._parameters) + len(child._buffers) for child in children)
    return id(module), tensors, sum(map(_is_hooked, children))


def _is_hooked(child: torch.nn.Module) -> bool:
    registry = vars(child).get("_diffusers_hook")
    return "_hf_hook" in vars(child) or (registry is not None and registry.get_hook("group_offloading") is not None)
