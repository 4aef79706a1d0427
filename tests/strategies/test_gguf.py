"""GGUF: real files, loaded by diffusers on the CPU, and held against what vramplan reads off their headers."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call_kwargs, output_tensor
from make_pipeline import build

import vramplan
from vramplan.errors import UsageError, VramplanError
from vramplan.generate import plan_code
from vramplan.hardware import Accelerator, Hardware, Host
from vramplan.pipeline.build import weightless_copy
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.geometry import module_bytes
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.quantized import marked
from vramplan.planner.forms import lightened
from vramplan.staged import load_applied
from vramplan.strategies import PLACEMENTS
from vramplan.strategies.base import FileName
from vramplan.strategies.gguf import Gguf
from vramplan.strategies.settings import format_setting, parse_weights
from vramplan.units import GIB

gguf = pytest.importorskip("gguf")

from gguf_files import Kind, kind_for, write_gguf  # noqa: E402 - needs the package

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
ON_CPU = Accelerator(kind="mps", index=0, name="cpu", total_bytes=8 * GIB, free_bytes=None)
SIZE = {"height": 64, "width": 64}
KINDS = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_K]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="session")
def file_of(small_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """The transformer of the small FLUX pipeline in a file of this type, under a name that is hard to write."""
    found: dict[Kind, Path] = {}
    folder = tmp_path_factory.mktemp("files, of=all kinds")
    tensors = build("flux-small").transformer.state_dict()

    def file(kind: Kind) -> Path:
        if kind not in found:
            found[kind] = write_gguf(folder / f"flux {kind.name}.gguf", tensors, kind_for(kind))
        return found[kind]

    return file


def loaded(file: Path, folder: Path, dtype: torch.dtype) -> Any:
    """What diffusers makes of the file, by itself."""
    import diffusers

    return diffusers.FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(folder / "transformer"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    )


def told(file: Path, **more: str) -> dict[str, str]:
    return {"weights.transformer": f"gguf:file={file}", "placement": "resident"} | more


def planned(folder: Path, settings: dict[str, str], **options: Any) -> Any:
    return vramplan.plan(folder, device=MACHINE, settings=settings, **({"simulate": False} | SIZE | options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_stand_ins_weigh_what_diffusers_loads(
    kind: Kind, dtype: torch.dtype, file_of: Any, small_folder: Any
) -> None:
    folder = small_folder("flux-small")
    plain = build("flux-small").transformer.to(dtype)
    real = loaded(file_of(kind), folder, dtype)
    setting = Gguf(file=FileName(str(file_of(kind))))
    light = lightened(plain, setting)
    assert module_bytes(light) == module_bytes(real) < module_bytes(plain)
    assert module_bytes(weightless_copy(real)) == module_bytes(real)
    ours, theirs = describe_component("transformer", light), describe_component("transformer", real, live=True)
    assert ours.geometry == theirs.geometry
    assert ours.dtype_bytes == theirs.dtype_bytes
    assert ours.quantized == theirs.quantized == f"gguf {kind.name}"
    assert theirs.parameter_count == describe_component("transformer", plain).parameter_count


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_loads_it_as_diffusers_does(dtype: str, file_of: Any, small_folder: Any) -> None:
    folder, file = small_folder("flux-small"), file_of(Kind.Q8_0)
    plan = planned(folder, told(file), dtype=dtype)
    record = next(item for item in plan.model.components if item.name == "transformer")
    done = load_applied(plan, folder, None, device="cpu", say=lambda _: None)
    pipe = done.applied.pipe
    direct = loaded(file, folder, getattr(torch, record.dtype))
    assert module_bytes(pipe.transformer) == module_bytes(direct) < record.weight_bytes
    for ours, theirs in zip(pipe.transformer.parameters(), direct.parameters(), strict=True):
        assert torch.equal(torch.Tensor(ours.data), torch.Tensor(theirs.data))
    pipe.set_progress_bar_config(disable=True)
    made = output_tensor(pipe(**call_kwargs("flux-small")))
    pipe.transformer = direct
    assert torch.isfinite(made).all()
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), made)


def placements() -> list[Any]:
    spec = spec_from_pipeline(build("flux-small"))
    part = marked(spec.component("transformer"), "gguf Q8_0")
    settings = [setting for cls in PLACEMENTS for setting in cls.variants(part) if not cls.whole_pipeline]
    return [setting for setting in settings if setting.refusal(part, spec, ON_CPU) is None]


def pipeline_with(module: Any) -> Any:
    pipe = build("flux-small")
    pipe.transformer = module
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("setting", placements(), ids=format_setting)
def test_under_every_placement_it_computes_what_it_does_resident(setting: Any, file_of: Any, small_folder: Any) -> None:
    module = loaded(file_of(Kind.Q4_0), small_folder("flux-small"), torch.float32)
    expected = output_tensor(pipeline_with(module)(**call_kwargs("flux-small")))
    pipe = pipeline_with(loaded(file_of(Kind.Q4_0), small_folder("flux-small"), torch.float32))
    plan = vramplan.plan(
        pipe, device=MACHINE, settings={"placement.transformer": format_setting(setting)}, simulate=False, **SIZE
    )
    applied = vramplan.apply_plan(pipe, plan, device="cpu")
    for _ in range(2):
        assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), expected)
    applied.undo()
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), expected)


def test_a_live_one_is_planned_as_it_is(file_of: Any, small_folder: Any) -> None:
    file = file_of(Kind.Q4_K)
    pipe = pipeline_with(loaded(file, small_folder("flux-small"), torch.float32))
    stored = module_bytes(build("flux-small").transformer)
    plan = vramplan.plan(pipe, device=MACHINE, allow="lossy", **SIZE)
    assert plan.projected.basis == "simulated"
    record = next(item for item in plan.model.components if item.name == "transformer")
    assert record.weight_bytes == module_bytes(pipe.transformer) < stored
    assert all("transformer" not in item.settings.weights for item in plan.candidates)
    denoise = next(phase for phase in plan.projected.phases if phase.name == "denoise")
    held = sum(item.weight_bytes for item in plan.model.components)
    assert held <= denoise.weights_bytes < held + stored
    for text in (f"gguf:file={file}", "torchao", "layerwise_casting", "bitsandbytes"):
        with pytest.raises(UsageError, match=r"are quantized already \(gguf Q4_K\)"):
            vramplan.plan(pipe, device=MACHINE, settings={"weights.transformer": text}, simulate=False, **SIZE)
    expected = output_tensor(pipe(**call_kwargs("flux-small")))
    applied = vramplan.apply_plan(pipe, plan, device="cpu")
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), expected)
    applied.undo()
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), expected)


def test_accelerate_cannot_offload_its_tensors(file_of: Any, small_folder: Any) -> None:
    """The reason why sequential offloading is refused, and what it says; that of files is diffusers' own."""
    from accelerate import cpu_offload

    module = loaded(file_of(Kind.Q4_0), small_folder("flux-small"), torch.float32)
    cpu_offload(module, torch.device("cpu"))
    weight = module.proj_out.weight
    print(type(weight), weight.device)
    module.proj_out(torch.ones(1, 64))


def test_disk(file_of: Any, small_folder: Any, tmp_path) -> None:
    pipe = pipeline_with(loaded(file_of(Kind.Q4_0), small_folder("flux-small"), torch.float32))
    expected = output_tensor(pipe(**call_kwargs("flux-small")))
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), expected)
