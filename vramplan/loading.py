"""What a plan does to weights while a pipeline is loaded: arguments of `from_pretrained`, and the same as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vramplan.errors import UsageError
from vramplan.planfile import ComponentRecord, Plan
from vramplan.strategies.base import AtLoad, missing_package
from vramplan.strategies.settings import parse_weights


def load_options(plan: Plan, folder: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained`; none where weights are loaded as they are stored.

    Raises:
        UsageError: a package that a setting needs is not installed.
    """
    options: dict[str, Any] = {}
    for setting, record in _at_load(plan):
        missing = missing_package(setting.name)
        if missing is not None:
            raise UsageError(f"settings.weights.{record.name}: {missing}")
        setting.load(options, record, folder)
    mapping = options.pop("quant_mapping", None)
    if mapping is not None:
        from diffusers import PipelineQuantizationConfig

        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    return options


def load_code(plan: Plan, source: str) -> tuple[list[str], str]:
    """Lines of Python before the pipeline is loaded, and the arguments to load it with, each after a comma."""
    options: dict[str, str] = {}
    lines = [line for setting, record in _at_load(plan) for line in setting.load_code(options, record, source)]
    mapping = options.pop("quant_mapping", None)
    if mapping is not None:
        lines.append("from diffusers import PipelineQuantizationConfig")
        options["quantization_config"] = f"PipelineQuantizationConfig(quant_mapping={{{mapping}}})"
    return list(dict.fromkeys(lines)), "".join(f", {key}={value}" for key, value in options.items())


def _at_load(plan: Plan) -> Iterator[tuple[AtLoad, ComponentRecord]]:
    for record in plan.model.components:
        text = plan.settings.weights.get(record.name)
        setting = parse_weights(text) if text else None
        if isinstance(setting, AtLoad):
            yield setting, record
