"""GGUF: real files, loaded by diffusers on the CPU, and held against what vramplan reads off their headers."""

from __future__ import annotations

import ast
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_pipeline import build

import vramplan
from tests.support.calls import call_kwargs, output_tensor
from vramplan.api.code import plan_code
from vramplan.errors import UsageError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.build import weightless_copy
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.folder import spec_from_folder
from vramplan.pipeline.geometry import module_bytes
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.quantization import mark_quantized
from vramplan.planner.loading import load_of
from vramplan.runtime.staged import load_applied
from vramplan.simulator.alternatives import Alternatives, converted_copy
from vramplan.simulator.model import SimulatedModel
from vramplan.strategies import PLACEMENTS
from vramplan.strategies.base import FileName
from vramplan.strategies.gguf import Gguf
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import format_setting, parse_setting
from vramplan.units import GIB

gguf = pytest.importorskip("gguf")

from tests.support.gguf_files import Kind, kind_for, write_gguf  # noqa: E402 - needs the package

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


@pytest.mark.diagonal("kind", "dtype")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_stand_ins_weigh_what_diffusers_loads(
    kind: Kind, dtype: torch.dtype, file_of: Any, small_folder: Any
) -> None:
    folder = small_folder("flux-small")
    plain = build("flux-small").transformer.to(dtype)
    real = loaded(file_of(kind), folder, dtype)
    setting = Gguf(file=FileName(str(file_of(kind))))
    light = converted_copy(plain, setting)
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
    part = mark_quantized(spec.component("transformer"), "gguf Q8_0")
    settings = [setting for cls in PLACEMENTS for setting in cls.variants(part) if not cls.whole_pipeline]
    return [setting for setting in settings if setting.refusal(part, spec, ON_CPU) is None]


def pipeline_with(module: Any) -> Any:
    pipe = build("flux-small")
    pipe.transformer = module
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("setting", placements(), ids=format_setting)
def test_under_every_placement_it_computes_what_it_does_resident(setting: Any, file_of: Any, small_folder: Any) -> None:
    pipe = pipeline_with(loaded(file_of(Kind.Q4_0), small_folder("flux-small"), torch.float32))
    expected = output_tensor(pipe(**call_kwargs("flux-small")))
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


def test_accelerate_cannot_move_its_tensors_one_by_one(file_of: Any, small_folder: Any) -> None:
    """The reason why sequential offloading is refused."""
    from accelerate import cpu_offload

    module = loaded(file_of(Kind.Q4_0), small_folder("flux-small"), torch.float32)
    with pytest.raises(UsageError, match="lost where accelerate"):
        vramplan.plan(pipeline_with(module), device=MACHINE, settings={"placement": "sequential_cpu_offload"}, **SIZE)
    with pytest.raises(KeyError):
        cpu_offload(module, torch.device("cpu"))


@pytest.mark.parametrize(
    "name",
    ["/a/b.gguf", "/a, b=c/x,y=z.gguf", " two  spaces .gguf", "file=x,file=y.gguf", "grün/ü:,.gguf", "a\nb.gguf"],
)
def test_any_name_of_a_file_is_written_and_read_again(name: str, tmp_path: Path) -> None:
    setting = Gguf(file=FileName(name))
    assert format_setting(setting) == f"gguf:file={name}"
    assert parse_setting("weights", format_setting(setting)) == setting


def test_the_name_survives_a_plan_file(file_of: Any, small_folder: Any, tmp_path: Path) -> None:
    file = tmp_path / "a, b=c: 'd' \\ \u00fc\U0001f98a" / "x #1.gguf"
    file.parent.mkdir()
    shutil.copy(file_of(Kind.Q4_0), file)
    folder = small_folder("flux-small")
    plan = planned(folder, told(file))
    (tmp_path / "plan.yaml").write_text(vramplan.dump_plan(plan), encoding="utf-8")
    again = vramplan.load_plan(tmp_path / "plan.yaml")
    assert again.settings.weights == {"transformer": f"gguf:file={file}"} == plan.settings.weights
    calls = [node for node in ast.walk(ast.parse(plan_code(again))) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if ast.unparse(call.func).endswith("from_single_file"))
    import diffusers

    scope = {"torch": torch, "diffusers": diffusers, "FluxTransformer2DModel": diffusers.FluxTransformer2DModel}
    made = eval(ast.unparse(call), scope)
    assert module_bytes(made) == module_bytes(loaded(file, folder, torch.float32))


def refused(folder: Path, file: Path, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        planned(folder, told(file))
    assert "\n" not in str(caught.value)


def test_loading_takes_the_bytes_of_the_file_and_not_of_the_stored_weights(file_of: Any, small_folder: Any) -> None:
    folder, file = small_folder("flux-small"), file_of(Kind.Q4_K)
    spec = spec_from_folder(folder, dtype="bfloat16")
    setting = parse_setting("weights", f"gguf:file={file}")
    part = Alternatives(SimulatedModel(spec)).spec({"transformer": setting}).component("transformer")
    load = load_of(part, Resident(), Resident().hold(part, spec))
    assert load.peak_bytes == file.stat().st_size < module_bytes(build("flux-small").transformer)
    assert not load.direct


def test_what_is_no_gguf_file(file_of: Any, small_folder: Any, tmp_path: Path) -> None:
    folder, whole = small_folder("flux-small"), file_of(Kind.Q8_0).read_bytes()
    refused(folder, tmp_path / "none.gguf", "No such file")
    refused(folder, tmp_path, "directory")
    other = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    refused(folder, other, "is not a GGUF file")
    (tmp_path / "x.bin").write_bytes(whole)
    refused(folder, tmp_path / "x.bin", r"a name that ends in \.gguf")
    for length in (5, 20, 100, 2000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        refused(folder, tmp_path / "cut.gguf", "a damaged GGUF file")


def test_a_file_of_another_model(small_folder: Any, tmp_path: Path) -> None:
    folder, tensors = small_folder("flux-small"), build("flux-small").transformer.state_dict()
    every = kind_for(Kind.Q8_0)
    fewer = {name: tensor for name, tensor in tensors.items() if "proj_out" not in name}
    refused(folder, write_gguf(tmp_path / "fewer.gguf", fewer, every), "does not hold a")
    unet = build("sd15-small").unet.state_dict()
    refused(folder, write_gguf(tmp_path / "unet.gguf", unet, every), "does not hold a FluxTransformer2DModel")
    wide = tensors | {"proj_out.weight": torch.ones(32, 64), "proj_out.bias": torch.ones(32)}
    refused(folder, write_gguf(tmp_path / "wide.gguf", wide, every), r"proj_out.weight is \[32, 64\] in the file")
    norms = write_gguf(tmp_path / "norms.gguf", tensors, lambda name, tensor: Kind.BF16)
    refused(folder, norms, "no weight of a linear layer")


def test_what_cannot_have_a_file(file_of: Any, small_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = small_folder("flux-small"), f"gguf:file={file_of(Kind.Q8_0)}"
    with pytest.raises(UsageError, match="write gguf:file=PATH"):
        planned(folder, {"weights.transformer": "gguf"})
    with pytest.raises(UsageError, match="loads no T5EncoderModel from a single file"):
        planned(folder, {"weights.text_encoder_2": text})
    with pytest.raises(UsageError, match="load it with `vramplan apply`"):
        vramplan.plan(build("flux-small"), device=MACHINE, settings={"weights.transformer": text}, **SIZE)
    monkeypatch.setattr("vramplan.strategies.base.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="gguf is not installed: pip install gguf"):
        planned(folder, {"weights.transformer": text})


def test_names_in_the_original_format_are_converted(tmp_path: Path) -> None:
    """LTX-Video: renamed by diffusers, both when the header is read and when the file is loaded."""
    import diffusers

    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=32, out_channels=32, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64,
        num_layers=1, caption_channels=64,
    )  # fmt: skip
    renamed = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        theirs = functools.reduce(lambda text, pair: text.replace(*pair), renamed.items(), name)
        tensors[f"model.diffusion_model.{theirs}"] = tensor
    file = write_gguf(tmp_path / "ltx.gguf", tensors, kind_for(Kind.Q8_0), "ltxv")
    model.save_config(tmp_path)
    real = diffusers.LTXVideoTransformer3DModel.from_single_file(
        str(file), config=str(tmp_path), quantization_config=diffusers.GGUFQuantizationConfig()
    )
    assert (
        module_bytes(converted_copy(model, Gguf(file=FileName(str(file))))) == module_bytes(real) < module_bytes(model)
    )
