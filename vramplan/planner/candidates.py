"""Enumerate candidates: one setting per axis, without those that a strategy refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from vramplan.errors import UsageError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.fixed import Fixed, by_component, not_stock
from vramplan.planner.other_components import other_placements
from vramplan.planner.pool import CandidatePool, ComponentPlacements
from vramplan.planner.streaming import streaming_pool
from vramplan.strategies import AXES, DECODES, EXECUTIONS, PLACEMENTS, WEIGHTS, Decode, Execution, Placement, Weights
from vramplan.strategies.base import QUALITIES, Quality
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import format_setting
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """An impossible setting, and the reason."""

    setting: str
    component: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRow:
    """Candidates with one kind of setting for the denoiser: one row of an explanation."""

    pools: tuple[CandidatePool, ...]
    decode: tuple[Decode, ...]
    weights: Mapping[str, Weights] = field(default_factory=dict)
    execution: Mapping[str, tuple[Execution, ...]] = field(default_factory=dict)

    @property
    def placements(self) -> tuple[ComponentPlacements, ...]:
        """All candidates of all pools."""
        return tuple(placement for pool in self.pools for placement in pool.placements)


def weight_settings(spec: PipelineSpec, fixed: Fixed, allow: Quality | None) -> list[dict[str, Weights]]:
    """Return the settings of weights to consider: those the user fixed, else those within `allow`.

    One setting is for every denoiser, or for those and every large text encoder.
    """
    if fixed.weights is not None:
        return [dict(fixed.weights)] if fixed.weights else []
    able: dict[Weights, list[Component]] = {}
    for cls in WEIGHTS:
        for component in spec.components:
            for setting in cls.variants(component):
                if setting.refusal(component) is None and is_allowed(setting.quality, allow):
                    able.setdefault(setting, []).append(component)
    found: list[dict[str, Weights]] = []
    for setting, components in able.items():
        denoisers = {component.name: setting for component in components if component.role != "text_encoder"}
        found += [form for form in (denoisers, {c.name: setting for c in components}) if form and form not in found]
    return found


def is_allowed(quality: Quality, allow: Quality | None) -> bool:
    """Whether the user allows this quality of weights; with None, no change at all."""
    return allow is not None and QUALITIES.index(quality) <= QUALITIES.index(allow)


def execution_settings(
    spec: PipelineSpec, fixed: Fixed, accelerator: Accelerator | None
) -> list[dict[str, tuple[Execution, ...]]]:
    """Return the settings to try in addition to the fixed ones, the same for every denoiser, on axes that are open."""
    if fixed.weights or accelerator is None:
        return []
    by_setting: dict[Execution, dict[str, Execution]] = {}
    for cls in (cls for cls in EXECUTIONS if cls.axis not in fixed.executions):
        for component in spec.components:
            for setting in cls.variants(component, accelerator):
                by_setting.setdefault(setting, {})[component.name] = setting
    return [by_component({**fixed.executions, setting.axis: placed}) for setting, placed in by_setting.items()]


def rows(
    spec: PipelineSpec,
    workload: Workload,
    fixed: Fixed,
    accelerator: Accelerator | None,
    *,
    ram_bytes: int | None = None,
) -> tuple[list[CandidateRow], list[Refused]]:
    """Return the candidates, and the refused settings with a reason each. `ram_bytes` of RAM may be used, None for
    plenty."""
    refused: dict[tuple[str, str], Refused] = {}
    groups = _placement_groups(spec, fixed, accelerator, refused, ram_bytes)
    decodes = _decodes(spec, workload, fixed, refused)
    found = [CandidateRow(pools=tuple(group), decode=decode) for group in groups for decode in decodes if group]
    return found, list(refused.values())


def why_impossible(refused: Sequence[Refused], fixed: Fixed) -> str:
    """Give the reasons against the settings that the user fixed, or all reasons if none concerns those."""
    given = [fixed.everywhere, *fixed.placement.values(), *(fixed.decode or ())]
    texts = {format_setting(setting) for setting in given if setting is not None}
    concerned = [item for item in refused if item.setting in texts] or refused
    reasons = dict.fromkeys(f"{item.setting}: {item.reason}" for item in concerned)
    return "; ".join(reasons) or "no combination of these settings is possible"


def _placement_groups(
    spec: PipelineSpec,
    fixed: Fixed,
    accelerator: Accelerator | None,
    refused: dict[tuple[str, str], Refused],
    ram_bytes: int | None,
) -> Iterable[list[CandidatePool]]:
    def allowed(component: Component, setting: Placement) -> bool:
        own = not_stock(setting.name) if fixed.stock and not setting.stock else None
        reason = own or setting.refusal(component, spec, accelerator)
        conflicts = (other.conflict_with(setting) for other in fixed.execution.get(component.name, ()))
        reason = reason or next(filter(None, conflicts), None)
        if reason is not None:
            text = format_setting(setting)
            refused.setdefault((text, reason), Refused(setting=text, component=component.name, reason=reason))
        return reason is None

    if accelerator is None:
        _refuse_offload_on_cpu(fixed)
        yield [_uniform(spec, Resident())]
        return
    for cls in PLACEMENTS:
        setting = fixed.everywhere or cls()
        if cls.whole_pipeline and isinstance(setting, cls) and not fixed.placement:
            verdicts = [allowed(component, setting) for component in spec.components]
            yield [_uniform(spec, setting)] if all(verdicts) else []
    if fixed.everywhere is not None and fixed.everywhere.whole_pipeline:
        return
    given = (fixed.everywhere, *fixed.placement.values())
    if not any(isinstance(setting, WeightStreaming) for setting in given):
        yield from _mixed(spec, fixed, allowed)
    streamed = streaming_pool(spec, fixed, allowed, _denoisers(spec), ram_bytes)
    yield [streamed] if streamed is not None else []


def _uniform(spec: PipelineSpec, setting: Placement) -> CandidatePool:
    """A pool whose only candidate has one setting for all components."""
    return CandidatePool(axes=((dict.fromkeys((component.name for component in spec.components), setting),),))


def _refuse_offload_on_cpu(fixed: Fixed) -> None:
    wanted = [*([fixed.everywhere] if fixed.everywhere else []), *fixed.placement.values()]
    for setting in wanted:
        if not isinstance(setting, Resident):
            raise UsageError(f"{setting.name} needs an accelerator, and none was found; plan with `device=NAME`")


def _mixed(
    spec: PipelineSpec, fixed: Fixed, allowed: Callable[[Component, Placement], bool]
) -> Iterable[list[CandidatePool]]:
    """Place component by component: the denoisers share one setting, the others take every combination."""
    denoisers = _denoisers(spec)

    def options(component: Component) -> list[Placement]:
        chosen = fixed.placement.get(component.name) or fixed.everywhere
        wanted = [chosen.complete(component)] if chosen else _variants(component)
        usable = [setting for setting in wanted if allowed(component, setting)]
        # A setting for all components applies where it is possible: no VAE can be grouped by block.
        if not usable and component.name not in fixed.placement and component not in denoisers:
            usable = [setting for setting in _variants(component) if allowed(component, setting)]
        return usable

    others = [component for component in spec.components if component not in denoisers]
    pools = other_placements([(component, options(component)) for component in others], spec)
    pools = [axes for axes in pools if all(axes)]  # a component without any possible placement leaves no candidate
    choices = {component.name: options(component) for component in denoisers}
    for setting in choices[denoisers[0].name]:
        placed = _all_denoisers(setting, choices)
        if placed is not None:
            yield [CandidatePool(axes=((placed,), *axes)) for axes in pools]


def _denoisers(spec: PipelineSpec) -> list[Component]:
    """The components that run in every step, or the first one of a pipeline without any."""
    found = [component for component in spec.components if component.role in ("denoiser", "control")]
    return found or list(spec.components[:1])


def _all_denoisers(leading: Placement, choices: Mapping[str, Sequence[Placement]]) -> dict[str, Placement] | None:
    """Place every denoiser as the first one; None if one of them cannot be."""
    placed = {name: _matching(leading, settings) for name, settings in choices.items()}
    return None if None in placed.values() else placed  # type: ignore[return-value]


def _variants(component: Component) -> list[Placement]:
    return [setting for cls in PLACEMENTS if not cls.whole_pipeline for setting in cls.variants(component)]


def _matching(leading: Placement, choices: Sequence[Placement]) -> Placement | None:
    """Return the same setting for another denoiser, or its only choice if that is fixed or differs in detail."""
    if leading in choices:
        return leading
    return choices[0] if len(choices) == 1 else None


def _decodes(
    spec: PipelineSpec, workload: Workload, fixed: Fixed, refused: dict[tuple[str, str], Refused]
) -> list[tuple[Decode, ...]]:
    """Return the decode settings, plain first. Videos combine slicing and tiling, pictures take each alone and both."""
    if not spec.vaes:
        return [()]
    vae = next((component for component in spec.vaes if component.name == "vae"), spec.vaes[0])
    must_tile = vae.tiling is not None and vae.tiling.required
    if fixed.decode is not None:
        found = [fixed.decode] if not _decode_refusals(fixed.decode, vae, workload, refused) else []
        return _tiled(found, vae, refused) if must_tile else found
    options = [list(cls.variants(vae, workload)) for cls in DECODES]
    usable = [[s for s in settings if not _decode_refusals((s,), vae, workload, refused)] for settings in options]
    joined = _combined(usable)
    if must_tile:
        return _tiled(joined, vae, refused)
    if spec.video:
        return [(), *joined]
    alone = [(setting,) for settings in usable for setting in settings]
    if workload.num_images_per_prompt == 1:  # slicing a single picture changes nothing
        return [(), *(combination for combination in alone if combination[0].quality != "lossless")]
    return list(dict.fromkeys([(), *alone, *joined]))


def _combined(usable: Sequence[Sequence[Decode]]) -> list[tuple[Decode, ...]]:
    """Combine one setting of each lossless strategy with one lossy setting: a second one would save little."""
    lossless = [settings for settings in usable if settings and settings[0].quality == "lossless"]
    changing: list[tuple[Decode, ...]] = [
        (setting,) for settings in usable for setting in settings if setting.quality != "lossless"
    ]
    return [(*first, *last) for last in changing or [()] for first in product(*lossless)] if any(usable) else []


def _tiled(
    found: Sequence[tuple[Decode, ...]], vae: Component, refused: dict[tuple[str, str], Refused]
) -> list[tuple[Decode, ...]]:
    """Keep the combinations with tiling, for a VAE that decodes in tiles or not at all."""
    kept = [combination for combination in found if any(isinstance(setting, VaeTiling) for setting in combination)]
    plain = AXES["decode"].nothing
    if len(kept) < len(found):
        reason = f"{vae.class_name} decodes in tiles or not at all: keep {VaeTiling.name}"
        refused.setdefault((plain, reason), Refused(setting=plain, component=vae.name, reason=reason))
    return kept


def _decode_refusals(
    settings: Sequence[Decode], vae: Component, workload: Workload, refused: dict[tuple[str, str], Refused]
) -> bool:
    reasons = [(setting, setting.refusal(vae, workload)) for setting in settings]
    for setting, reason in reasons:
        if reason is not None:
            text = format_setting(setting)
            refused.setdefault((text, reason), Refused(setting=text, component=vae.name, reason=reason))
    return any(reason for _, reason in reasons)
