"""The request for a plan: everything a user specifies in addition to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypedDict, get_args

from vramplan.errors import UsageError
from vramplan.hardware.types import Hardware
from vramplan.planfile.types import Plan, Preferences, load_options
from vramplan.planner.fixed import check_settings
from vramplan.planner.order import Prefer
from vramplan.strategies.base import QUALITIES, Quality
from vramplan.strategies.settings import is_stock


class PlanOptions(TypedDict, total=False):
    """The keyword arguments of `plan`, `fit` and `auto_configure`. `vramplan.plan` explains them."""

    device: str | Hardware | None
    vram: str | None
    ram: str | None
    margin: str | None
    allow: Quality | None
    prefer: Prefer
    settings: Mapping[str, str | Sequence[str]] | None
    stock: bool
    dtype: str | None
    variant: str | None
    revision: str | None
    allow_pickle: bool
    simulate: bool
    height: int | None
    width: int | None
    num_frames: int | None
    frames: int | None
    num_images_per_prompt: int | None
    num_videos_per_prompt: int | None
    batch: int | None
    num_inference_steps: int | None
    steps: int | None
    guidance_scale: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest(Preferences):
    """The preferences, the machine, the loading options, and the workload as given."""

    device: str | Hardware | None = None
    dtype: str | None = None
    variant: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    simulate: bool = True
    workload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preferences(self) -> Preferences:
        """The preferences alone, which a plan file stores."""
        return Preferences(**{item.name: getattr(self, item.name) for item in fields(Preferences)})

    @property
    def loading(self) -> dict[str, Any]:
        """The loading options, as arguments of `describe`."""
        return {name: getattr(self, name) for name in ("dtype", "variant", "revision", "allow_pickle")}

    @property
    def amounts(self) -> dict[str, str | None]:
        """The memory amounts as given, as arguments of `make_budget`."""
        return {"vram": self.vram, "ram": self.ram, "margin": self.margin}


_OWN = {item.name for item in fields(PlanRequest)} - {"workload"}


def make_request(options: Mapping[str, Any], request: PlanRequest | None = None) -> PlanRequest:
    """Make a request from keyword arguments, unless a whole one is given.

    Names that are not fields of a request belong to the workload.

    Raises:
        UsageError: a request and options, or a value that is none of an option's.
    """
    if request is not None:
        if options:
            raise UsageError(
                f"`{next(iter(options))}`: a request holds all options; change it with dataclasses.replace"
            )
        return request
    own = {name: value for name, value in options.items() if name in _OWN}
    for name, values in (("allow", QUALITIES), ("prefer", get_args(Prefer))):
        if own.get(name) is not None and own[name] not in values:
            raise UsageError(f"`{name}`: {own[name]!r} is none of {', '.join(values)}")
    given = own.get("settings") or {}
    if not isinstance(given, Mapping) or not all(isinstance(value, str | Sequence) for value in given.values()):
        raise UsageError('`settings`: give them by axis and component, as {"placement.vae": "resident"}')
    own["settings"] = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in given.items()}
    check_settings(own["settings"])
    return PlanRequest(**own, workload={name: value for name, value in options.items() if name not in _OWN})


def stock_request(request: PlanRequest) -> PlanRequest:
    """Return the request restricted to stock settings, without those fixed by hand that are not."""
    kept = {
        key: texts
        for key, texts in request.settings.items()
        if all(is_stock(key.partition(".")[0], text) for text in texts)
    }
    return replace(request, stock=True, settings=kept)


def request_of(plan: Plan) -> PlanRequest:
    """Return the request a plan was made for, including its workload, on the machine's first device."""
    preferences = {item.name: getattr(plan.asked, item.name) for item in fields(Preferences)}
    # An older plan without recorded preferences can be lossy only if that was allowed.
    preferences["allow"] = plan.asked.allow or ("lossy" if plan.quality == "lossy" else None)
    workload = {name: value for name, value in asdict(plan.workload).items() if value is not None}
    return PlanRequest(**preferences, **load_options(plan), workload=workload)
