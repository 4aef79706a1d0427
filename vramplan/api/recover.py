"""Out of memory in the middle of a call: step down to a smaller plan and make the call again.

A decode that runs out is made again in smaller pieces where it stands: the denoising before it is not lost. Anything
else starts the call anew, with its random numbers from the start, under the fastest plan for less memory.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import chain
from typing import Any

from vramplan.api.change import planned_anew
from vramplan.common.progress import Say
from vramplan.errors import NothingFitsError, VramplanError
from vramplan.pipeline.component import describe_component
from vramplan.planfile.match import vae_names
from vramplan.planfile.types import Plan, settings_text
from vramplan.runtime.applied import PLAIN_CLASS, applied_to, apply_unchecked, plain_class
from vramplan.runtime.load import release_memory
from vramplan.strategies import DECODES
from vramplan.strategies.base import Decode
from vramplan.strategies.settings import format_setting
from vramplan.units import format_bytes
from vramplan.workload import Workload

# What a plan that ran out is cut by, each time.
_STEP = 0.9
_MOST_STEPS = 5


def recovering_call(pipe: Any, arguments: Mapping[str, Any], *, say: Say = print) -> Any:
    """`pipe(**arguments)` under the plan that is applied to it, and under smaller ones where memory runs out.

    Each step down is told. The last plan stays applied.

    Raises:
        NothingFitsError: no smaller plan is left; the message says what the smallest one needs.
        VramplanError: vramplan has applied nothing to this pipeline, or what cannot be taken off again.
    """
    applied, call = applied_to(pipe), plain_class(pipe).__call__
    if applied is None:
        raise VramplanError("vramplan has applied no plan to this pipeline: there is nothing to step down from")
    if applied.changed is not None:
        warnings.warn(applied.changed, stacklevel=2)
    first, device = applied.plan, applied.device
    limit = first.projected.vram_reserved_bytes
    rewinds = _rewinds(arguments)
    for step in range(_MOST_STEPS + 1):
        try:
            with _decodes_again(pipe, first.workload, vae_names(first), say):
                return call(pipe, **arguments)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
        if step == _MOST_STEPS:
            break
        limit = int(limit * _STEP)
        say(f"out of memory ({reason}); again within {format_bytes(limit)}")
        applied.undo()
        release_memory()
        smaller = planned_anew(pipe, first, vram=str(limit))
        applied = apply_unchecked(pipe, smaller, device=device)
        say(f"now {_settings(smaller)}")
        for rewind in rewinds:
            rewind()
    tried = f"{_MOST_STEPS + 1} plans, the last within {format_bytes(limit)}"
    raise NothingFitsError(f"out of memory under {tried}: {reason}")


def recovering(pipe: Any, *, say: Say = print) -> None:
    """From now on the pipeline's own call is a `recovering_call`, until the plan that is applied to it is undone.

    Python looks a call up on the class: this one object gets a class of its own, derived from the one it has and of
    the same name. No class that others use is touched.
    """
    plain = plain_class(pipe)

    @wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if applied_to(self) is None:  # a copy of the pipeline, or its parts in a simulation
            return plain.__call__(self, *args, **kwargs)
        try:
            return recovering_call(self, _by_name(plain, self, args, kwargs), say=say)
        finally:
            if applied_to(self) is not None:  # stepping down has undone the plan that was on
                self.__class__ = own

    names = {"__call__": call, "__module__": plain.__module__, "__doc__": plain.__doc__, PLAIN_CLASS: plain}
    own = type(plain.__name__, (plain,), names)
    pipe.__class__ = own


def _by_name(cls: Any, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    names = list(inspect.signature(cls.__call__).bind_partial(pipe, *args).arguments)[1:]
    return dict(zip(names, args, strict=True)) | dict(kwargs)


def _settings(plan: Plan) -> str:
    return settings_text(plan.settings)


@contextmanager
def _decodes_again(pipe: Any, workload: Workload, names: list[str], say: Say) -> Iterator[None]:
    """While entered, a VAE that runs out of memory decodes the same latents again, in smaller and smaller pieces."""
    with ExitStack() as stack:
        for name in names:
            vae = pipe.components.get(name)
            if vae is not None and hasattr(vae, "decode"):
                stack.callback(vae.__dict__.pop, "decode", None)
                vae.__dict__["decode"] = _retry_smaller(pipe, name, vae.decode, workload, say)
        yield


def _retry_smaller(
    pipe: Any, name: str, decode: Callable[..., Any], workload: Workload, say: Say
) -> Callable[..., Any]:
    def again(*args: Any, **kwargs: Any) -> Any:
        pieces = iter(_pieces(pipe.components[name], name, workload))
        while True:
            try:
                return decode(*args, **kwargs)
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                setting = next(pieces, None)
                if setting is None:
                    raise
            release_memory()
            say(f"out of memory while decoding; the same latents again with {format_setting(setting)}")
            setting.apply(pipe, [name])

    return again


def _pieces(vae: Any, name: str, workload: Workload) -> Iterator[Decode]:
    """Every way of decoding less at once, the largest pieces first."""
    component = describe_component(name, vae)
    settings = chain.from_iterable(cls.variants(component, workload) for cls in DECODES)
    return (setting for setting in settings if setting.refusal(component, workload) is None)


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA, ROCm and XPU raise OutOfMemoryError; Metal a RuntimeError that says so."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "backend out of memory" in str(error)
    )


def _rewinds(arguments: Mapping[str, Any]) -> list[Callable[[], object]]:
    """What puts every source of random numbers back to where it is now: the call's own, and torch's without one."""
    import torch

    given = arguments.get("generator")
    listed = given if isinstance(given, list | tuple) else [given]
    own = [partial(item.set_state, item.get_state()) for item in listed if isinstance(item, torch.Generator)]
    modules: list[Any] = [torch]
    if torch.accelerator.is_available():
        modules.append(torch.get_device_module())
    return [*own, *(partial(module.set_rng_state, module.get_rng_state()) for module in modules)]
