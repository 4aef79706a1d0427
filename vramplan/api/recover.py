"""Retry a call that runs out of memory, under a smaller plan.

A decode that runs out of memory is retried in smaller pieces, so the denoising before it is not lost. Otherwise the
whole call is retried with the same random numbers, under the fastest plan for less memory.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import chain
from typing import Any

from vramplan.api.change import plan_again
from vramplan.common.progress import Say
from vramplan.errors import NothingFitsError, VramplanError
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.own_class import give_class, plain_class
from vramplan.planfile.match import vae_names
from vramplan.planfile.types import Plan, settings_text
from vramplan.runtime.applied import applied_to, apply_unchecked
from vramplan.runtime.load import release_memory
from vramplan.strategies import DECODES
from vramplan.strategies.base import Decode
from vramplan.strategies.settings import format_setting
from vramplan.units import format_bytes
from vramplan.workload import Workload

# After each failure the VRAM limit is multiplied by this.
_SHRINK_FACTOR = 0.9
_MAX_RETRIES = 5


def recovering_call(pipe: Any, arguments: Mapping[str, Any], *, say: Say = print) -> Any:
    """Call `pipe(**arguments)` under its applied plan, and retry under smaller plans if memory runs out.

    `say` is called at each retry. The last plan stays applied.

    Raises:
        NothingFitsError: no smaller plan is left; the message says what the smallest one needs.
        VramplanError: vramplan has applied nothing to this pipeline, or a plan that cannot be undone.
    """
    from vramplan.streaming.attach import running

    applied, call = applied_to(pipe), plain_class(pipe).__call__
    if applied is None:
        raise VramplanError("vramplan has applied no plan to this pipeline: there is nothing to step down from")
    if applied.changed is not None:
        warnings.warn(applied.changed, stacklevel=2)
    first, device = applied.plan, applied.device
    limit = first.projected.vram_reserved_bytes
    restorers = _random_state_restorers(arguments)
    for attempt in range(_MAX_RETRIES + 1):
        try:
            with running(pipe), _retry_decodes(pipe, first.workload, vae_names(first), say):
                return call(pipe, **arguments)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
        if attempt == _MAX_RETRIES:
            break
        limit = int(limit * _SHRINK_FACTOR)
        say(f"out of memory ({reason}); again within {format_bytes(limit)}")
        applied.undo()
        release_memory()
        smaller = plan_again(pipe, first, vram=str(limit))
        applied = apply_unchecked(pipe, smaller, device=device)
        say(f"now {_settings(smaller)}")
        for restore in restorers:
            restore()
    tried = f"{_MAX_RETRIES + 1} plans, the last within {format_bytes(limit)}"
    raise NothingFitsError(f"out of memory under {tried}: {reason}")


def make_recovering(pipe: Any, *, say: Say = print) -> None:
    """Make the pipeline's own call a `recovering_call`, until its applied plan is undone."""
    plain = plain_class(pipe)

    @wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if applied_to(self) is None:  # a copy of the pipeline, or its parts in a simulation
            return plain.__call__(self, *args, **kwargs)
        try:
            return recovering_call(self, _named_arguments(plain, self, args, kwargs), say=say)
        finally:
            if applied_to(self) is not None and type(self).__call__ is not call:  # a retry has undone the earlier plan
                give_class(self, {"__call__": call})

    give_class(pipe, {"__call__": call})


def _named_arguments(cls: Any, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, all by name."""
    names = list(inspect.signature(cls.__call__).bind_partial(pipe, *args).arguments)[1:]
    return dict(zip(names, args, strict=True)) | dict(kwargs)


def _settings(plan: Plan) -> str:
    return settings_text(plan.settings)


@contextmanager
def _retry_decodes(pipe: Any, workload: Workload, names: list[str], say: Say) -> Iterator[None]:
    """Context manager: a VAE that runs out of memory decodes the same latents again, in ever smaller pieces."""
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
    def retry(*args: Any, **kwargs: Any) -> Any:
        smaller_decodes = iter(_smaller_decodes(pipe.components[name], name, workload))
        while True:
            try:
                return decode(*args, **kwargs)
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                setting = next(smaller_decodes, None)
                if setting is None:
                    raise
            release_memory()
            say(f"out of memory while decoding; the same latents again with {format_setting(setting)}")
            setting.apply(pipe, [name])

    return retry


def _smaller_decodes(vae: Any, name: str, workload: Workload) -> Iterator[Decode]:
    """Yield all settings that decode in smaller pieces, the largest pieces first."""
    component = describe_component(name, vae)
    settings = chain.from_iterable(cls.variants(component, workload) for cls in DECODES)
    return (setting for setting in settings if setting.refusal(component, workload) is None)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: CUDA, ROCm and XPU raise OutOfMemoryError, Metal a RuntimeError with its message."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "backend out of memory" in str(error)
    )


def _random_state_restorers(arguments: Mapping[str, Any]) -> list[Callable[[], object]]:
    """Return functions that restore the present state of the call's generators and of torch's global ones."""
    import torch

    given = arguments.get("generator")
    listed = given if isinstance(given, list | tuple) else [given]
    own = [partial(item.set_state, item.get_state()) for item in listed if isinstance(item, torch.Generator)]
    modules: list[Any] = [torch]
    if torch.accelerator.is_available():
        modules.append(torch.get_device_module())
    return [*own, *(partial(module.set_rng_state, module.get_rng_state()) for module in modules)]
