"""Detect changes to a pipeline since a plan was applied to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vramplan.pipeline.modules import modules_of

if TYPE_CHECKING:
    import torch

# A component's object id, its number of tensors, and its number of modules with an offload hook.
State = tuple[int, int, int]


def state_of(pipe: Any) -> dict[str, State]:
    """The state of each component, which an adapter or a replaced module changes; no weight is read or held."""
    return {name: _module_state(module) for name, module in modules_of(pipe).items()}


def change_since(pipe: Any, before: Mapping[str, State]) -> str | None:
    """A sentence on how the pipeline was changed since, and what to do about it; None if it was not changed.

    diffusers 0.42 adds plain group offloading again when a LoRA is loaded. This ends partial residency, also after the
    LoRA is removed.
    """
    now = state_of(pipe)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not changed:
        return None
    text = _change_text(changed[0], before.get(changed[0]), now.get(changed[0]))
    return (
        f"{text} since the plan was applied, which no longer describes it: change a pipeline inside "
        "`with vramplan.changing(pipe):`, or plan again by vramplan.auto_configure(pipe)"
    )


def _change_text(name: str, before: State | None, now: State | None) -> str:
    if before is None or now is None:
        return f"{name} was {'added' if before is None else 'taken out'}"
    if before[1] != now[1]:
        return f"{name} went from {before[1]} to {now[1]} tensors"
    if before[2] != now[2]:
        return f"{name} went from {before[2]} to {now[2]} offload hooks"
    return f"{name} was replaced"


def _module_state(module: torch.nn.Module) -> State:
    children = list(module.modules())
    tensors = sum(len(child._parameters) + len(child._buffers) for child in children)
    return id(module), tensors, sum(map(_is_hooked, children))


def _is_hooked(child: torch.nn.Module) -> bool:
    registry = vars(child).get("_diffusers_hook")
    return "_hf_hook" in vars(child) or (registry is not None and registry.get_hook("group_offloading") is not None)
