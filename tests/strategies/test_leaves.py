"""Every attribute that a setting leaves on a pipeline is one that its strategy names: undoing knows of no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.calls import workload_of
from tests.support.specs import card
from tests.support.vaes import small_vae
from vramplan.pipeline.describe import describe
from vramplan.pipeline.modules import modules_of
from vramplan.runtime import snapshot
from vramplan.simulator import placing
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.types import SimulationError
from vramplan.strategies import DECODES, EXECUTIONS, REGISTRY
from vramplan.strategies.base import ON_PIPE, AtLoad
from vramplan.strategies.framewise_decoding import FramewiseDecoding

# The containers of a module, whose contents belong to the strategy's tensors and not to its attributes.
CONTENTS = {"_parameters", "_buffers", "_modules"}
OPTIONS = {"group_offload": {"type": "leaf"}, "encode_first": {"leaf": True}}
SETTLED = [cls for cls in REGISTRY if cls not in EXECUTIONS and not isinstance(cls(), AtLoad)]  # kernels are objects


def owners(pipe: Any) -> Iterator[tuple[str, Any]]:
    yield ON_PIPE, pipe
    for module in modules_of(pipe).values():
        for child in module.modules():
            yield "", child


def changed(pipe: Any, apply: Callable[[], None]) -> set[str]:
    """The attributes of the pipeline and its modules that are other objects afterwards, or new."""
    before = [(prefix, thing, dict(vars(thing))) for prefix, thing in owners(pipe)]
    apply()
    return {
        prefix + name
        for prefix, thing, attributes in before
        for name, value in vars(thing).items()
        if name not in CONTENTS and (name not in attributes or attributes[name] is not value)
    }


class EnoughError(Exception):
    """The settings are on: the call itself need not be simulated."""


@pytest.mark.parametrize("cls", SETTLED, ids=lambda cls: cls.name)
def test_a_strategy_names_what_it_leaves(small_pipeline, monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    spec = describe(small_pipeline("sd15-small")).spec
    real, found = placing.apply_settings, set()

    def watched(pipe: Any, *given: Any, **options: Any) -> None:
        if cls is FramewiseDecoding:
            pipe.vae = small_vae("AutoencoderKLHunyuanVideo")
        found.update(changed(pipe, lambda: real(pipe, *given, **options)))
        raise EnoughError(EnoughError.__name__)

    monkeypatch.setenv("VRAMPLAN_CACHE", "0")
    monkeypatch.setattr(placing, "apply_settings", watched)
    names = [part.name for part in spec.components]
    roles = {"encode_first": "text_encoder"} | dict.fromkeys([decode.name for decode in DECODES], "vae")
    if not getattr(cls, "whole_pipeline", False):
        names = [part.name for part in spec.components if part.role == roles.get(cls.name, "denoiser")]
    setting = cls(**OPTIONS.get(cls.name, {}))
    placed, decodes = ([], [(setting, names)]) if cls in DECODES else ([(setting, names)], [])
    with pytest.raises((EnoughError, SimulationError), match=EnoughError.__name__):
        SimulatedModel(spec).run(workload_of("sd15-small"), placed, decodes, accelerator=card())
    leaves = getattr(cls, "leaves", ())
    assert {name for name in found if not name.startswith(leaves)} == set()
    assert bool(found) == bool(leaves)


def test_undoing_knows_all_that_strategies_name() -> None:
    known = {*snapshot._HOOK_ATTRIBUTES, *snapshot._DECODE_ATTRIBUTES}
    known |= {ON_PIPE + name for name in snapshot._PIPE_ATTRIBUTES}
    assert known == {name for cls in REGISTRY for name in getattr(cls, "leaves", ())}
