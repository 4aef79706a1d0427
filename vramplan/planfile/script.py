"""Write a plan as a script of plain diffusers calls that load the pipeline and, if asked or after encoding, call it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.pipeline.prompt import Encoded
from vramplan.pipeline.sources import Hub, Source
from vramplan.planfile.types import ComponentRecord, Plan
from vramplan.strategies.base import AtLoad, Decodes, Placed, Placement, freed_first
from vramplan.strategies.weight_streaming import WeightStreaming

PROMPT = "a photo of a red fox in the snow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """The contents of a script. `source` is the pipeline to load, `vaes` are weightless.

    `encoded` is the plan's call with the prompt encoded, without data; None if nothing is encoded first. `call` are the
    arguments of a call to print otherwise, `...` for those that only the user knows; None for no call.
    """

    plan: Plan
    source: Source
    placed: Placed
    decodes: Decodes
    vaes: Mapping[str, Any]
    encoded: Encoded | None
    call: Mapping[str, Any] | None = None

    def lines(self) -> Iterator[str]:
        """Yield the lines of the script, imports first."""
        body = list(self._body())
        imports = dict.fromkeys(line for line in body if line.startswith(("import ", "from ")))
        yield from dict.fromkeys([*self._imports(), *imports])
        yield ""
        yield from (line for line in body if line not in imports)

    @property
    def _pipeline_placements(self) -> Placed:
        """The placements of the pipeline as a whole."""
        return [item for item in self.placed if isinstance(item[0], Placement) and item[0].whole_pipeline]

    @property
    def _loads_whole(self) -> bool:
        """Whether one call loads the pipeline, because no component needs a setting while loading."""
        return bool(self._pipeline_placements) and not any(isinstance(setting, AtLoad) for setting, _ in self.placed)

    def _imports(self) -> Iterator[str]:
        yield "import torch"
        yield f"from diffusers import {self.plan.model.class_name}"
        if self._loads_whole:
            return
        for record in self.plan.model.components:
            own = record.library in ("diffusers", "transformers")
            library = record.library if own else f"diffusers.pipelines.{record.library}"
            yield f"from {library} import {record.class_name}"

    def _body(self) -> Iterator[str]:
        yield from self._whole() if self._loads_whole else self._staged()
        if self.encoded is not None:
            yield ""
            yield f"result = pipe({_arguments(self.encoded.arguments, _encoded_names(self.encoded))})"
        elif self.call is not None:
            yield ""
            open_ones = [name for name, value in self.call.items() if value is ...]
            yield from (f"{name} = ...  # your own" for name in open_ones)
            yield from [f"prompt = {PROMPT!r}"] if PROMPT in self.call.values() else []
            yield f"result = pipe({_arguments(self.call, open_ones)})"

    def _whole(self) -> Iterator[str]:
        """Load the pipeline in one call, and place it."""
        variant = next((record.variant for record in self.plan.model.components if record.variant), None)
        options = f"dtype={self._dtypes()}{_variant(variant)}"
        yield f"pipe = {self.plan.model.class_name}.from_pretrained({self._source}, {options})"
        yield from self._decode_lines()
        for setting, names in self.placed:
            yield from setting.code(names, self._device)

    def _staged(self) -> Iterator[str]:
        """Load and place component by component, after encoding the prompt if that comes first."""
        first, rest = freed_first([item for item in self.placed if item not in self._pipeline_placements])
        if first and self.encoded is not None:
            yield from self._encoding(first, self.encoded)
        yield from self._loading(
            rest, [r.name for r in self.plan.model.components if r.name not in _placed_names(first)]
        )
        gone = "".join(f", {name}=None" for name in _placed_names(first))
        yield f"pipe = {self.plan.model.class_name}.from_pretrained({self._source}, **vars(pipe){gone})"
        if any(isinstance(setting, WeightStreaming) for setting, _ in rest):
            yield f'stream_weights(pipe, "{self._device}")  # all in one cache'
        yield from self._decode_lines()
        for setting, names in self._pipeline_placements:
            yield from setting.code(names, self._device)

    @property
    def _source(self) -> str:
        """The first arguments of `from_pretrained`."""
        if not isinstance(self.source, Hub):
            return json.dumps(str(self.source))
        revision = f", revision={json.dumps(self.source.revision)}" if self.source.revision else ""
        return json.dumps(self.source.repo_id) + revision

    @property
    def _device(self) -> str:
        return self.plan.machine.device

    def _decode_lines(self) -> Iterator[str]:
        for setting, names in self.decodes:
            yield from setting.code(names, self.vaes)

    def _loading(self, placed: Placed, wanted: Sequence[str]) -> Iterator[str]:
        """Load and place the wanted components in the plan's order, on an object in place of the pipeline."""
        yield "from types import SimpleNamespace"
        yield "pipe = SimpleNamespace()  # one component after another, each placed before the next is loaded"
        for record in self._load_order():
            if record.name not in wanted:
                continue
            settings = [setting for setting, names in placed if record.name in names]
            cast = any(setting.axis == "weights" for setting in settings)
            direct = [s for s in settings if isinstance(s, Placement) and s.direct and not cast]
            where = f', device_map="{self._device}"' if direct and not self._device.startswith("cpu") else ""
            source = None
            for setting in settings:
                if isinstance(setting, AtLoad):
                    line, options = setting.load_code(record)
                    yield line
                    where += options
                    source = setting.source
            yield self._component(record, where, source)
            stays = any(isinstance(setting, AtLoad) and setting.loads_on_device for setting in settings)
            if stays and record.name in _placed_names(self._pipeline_placements):
                yield f'pipe.{record.name}.to("cpu")  # it was quantized on the device, where the next one needs room'
            for setting in (setting for setting in settings if setting not in direct):
                yield from setting.code([record.name], self._device)

    def _load_order(self) -> list[ComponentRecord]:
        """Return the components in the order of loading: the plan's, else the largest first."""
        load = self.plan.projected.load
        place = {name: number for number, name in enumerate(load.order if load else ())}
        return sorted(
            self.plan.model.components, key=lambda record: (place.get(record.name, len(place)), -record.weight_bytes)
        )

    def _component(self, record: ComponentRecord, where: str, source: Path | None) -> str:
        call = f"from_pretrained({self._source}" if source is None else self._single_file(source)
        variant = _variant(record.variant) if source is None else ""
        return (
            f"pipe.{record.name} = {record.class_name}.{call}, "
            f'subfolder="{record.name}", dtype=torch.{record.dtype}{variant}{where})'
        )

    def _single_file(self, source: Path) -> str:
        return f"from_single_file({str(source)!r}, config={self._source}"

    def _encoding(self, first: Placed, encoded: Encoded) -> Iterator[str]:
        """Load the encoders, encode the prompt, and drop the encoders."""
        yield "import gc"
        yield f"prompt = {PROMPT!r}"
        encoders = _placed_names(first)
        yield from self._loading(first, encoders)
        others = "".join(f", {r.name}=None" for r in self.plan.model.components if r.name not in encoders)
        yield f"pipe = {self.plan.model.class_name}.from_pretrained({self._source}, **vars(pipe){others})"
        yield "with torch.no_grad():"
        for encoding in encoded.encodings:
            names = ", ".join(name if name in encoded.arguments else "_" for name in encoding.names)
            yield f"    {names} = pipe.encode_prompt({_arguments(encoding.given, (), self._device)})"
        yield "del pipe"
        yield "gc.collect()"
        if not self._device.startswith("cpu"):
            yield "torch.accelerator.empty_cache()"
        yield ""

    def _dtypes(self) -> str:
        dtypes = {record.dtype for record in self.plan.model.components}
        if len(dtypes) == 1:
            return f"torch.{dtypes.pop()}"
        pairs = ", ".join(f'"{record.name}": torch.{record.dtype}' for record in self.plan.model.components)
        return "{" + pairs + "}"


def _variant(name: str | None) -> str:
    return f", variant={json.dumps(name)}" if name else ""


def _placed_names(placed: Placed) -> list[str]:
    return [name for setting, names in placed if isinstance(setting, Placement) for name in names]


def _encoded_names(encoded: Encoded) -> set[str]:
    return {name for encoding in encoded.encodings for name in encoding.names}


def _arguments(given: Mapping[str, Any], variables: Sequence[str] | set[str], device: str = "") -> str:
    """Format arguments as code: those in `variables` by name, plain values by value, others left out."""
    import torch

    parts = []
    for name, value in given.items():
        if name in variables:
            parts.append(f"{name}={name}")
        elif isinstance(value, torch.device):
            parts.append(f'{name}="{device}"')
        elif isinstance(value, torch.Generator):
            parts.append(f'{name}=torch.Generator("cpu").manual_seed({value.initial_seed()})')
        elif value == PROMPT:
            parts.append(f"{name}=prompt")
        elif value == [PROMPT]:
            parts.append(f"{name}=[prompt]")
        elif isinstance(value, bool | int | float | str) or (isinstance(value, list) and _plain(value)):
            parts.append(f"{name}={value!r}")
    return ", ".join(parts)


def _plain(values: Sequence[Any]) -> bool:
    return all(isinstance(value, bool | int | float | str) for value in values)
