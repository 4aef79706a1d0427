"""Components that were saved quantized: described from their headers as they are once loaded, planned and applied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_pipeline import build
from safetensors.torch import load_file, save_file

import vramplan
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.build import weightless_copy
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.folder import spec_from_folder, stored_weights
from vramplan.pipeline.geometry import module_bytes
from vramplan.pipeline.repository import FolderRepository
from vramplan.runtime.staged import load_applied
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
KINDS = {
    "nf4": "bitsandbytes nf4",
    "fp4": "bitsandbytes fp4",
    "nested": "bitsandbytes nf4",
    "int8": "bitsandbytes int8",
    "torchao": "torchao int8",
}


def config(kind: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4" if kind == "fp4" else "nf4",
        bnb_4bit_use_double_quant=kind == "nested",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def quantized_folder(small_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small FLUX pipeline with its T5 quantized by transformers on the CPU, and saved so."""
    from transformers import T5EncoderModel

    found: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in found:
            plain = small_folder("flux-small")
            target = Path(shutil.copytree(plain, tmp_path_factory.mktemp(kind) / "pipeline"))
            made = T5EncoderModel.from_pretrained(
                plain / "text_encoder_2", dtype=torch.bfloat16, quantization_config=config(kind)
            )
            shutil.rmtree(target / "text_encoder_2")
            made.save_pretrained(target / "text_encoder_2")
            found[kind] = target
        return found[kind]

    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_described_as_it_is_once_loaded(kind: str, dtype: str, quantized_folder: Any) -> None:
    from transformers import T5EncoderModel

    folder = quantized_folder(kind)
    spec = spec_from_folder(folder, dtype=dtype)
    assert spec.notes == ()
    ours = spec.component("text_encoder_2")
    real = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=getattr(torch, dtype))
    theirs = describe_component("text_encoder_2", real, live=True)
    assert ours.weight_bytes == theirs.weight_bytes == module_bytes(real)
    assert ours.quantized == theirs.quantized == KINDS[kind]
    assert ours.geometry.blocks == theirs.geometry.blocks
    told = dtype if kind == "torchao" else "bfloat16"  # transformers does not cast beside bitsandbytes' weights
    assert ours.dtype == told == str(real.shared.weight.dtype).removeprefix("torch.")
    assert module_bytes(weightless_copy(real)) == module_bytes(real)


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_it_is_planned_and_loaded_as_it_is(kind: str, quantized_folder: Any) -> None:
    folder = quantized_folder(kind)
    plan = vramplan.plan(folder, device=MACHINE, dtype="bf16", settings={"placement": "resident"}, height=64, width=64)
    assert plan.projected.basis == "simulated"
    assert plan.settings.weights == {}
    with pytest.raises(UsageError, match="are quantized already"):
        vramplan.plan(folder, device=MACHINE, settings={"weights.text_encoder_2": "torchao"}, height=64, width=64)
    pipe = load_applied(plan, folder, None, device="cpu", say=lambda _: None).applied.pipe
    record = next(item for item in plan.model.components if item.name == "text_encoder_2")
    assert module_bytes(pipe.text_encoder_2) == record.weight_bytes
    ids = torch.arange(1, 8).unsqueeze(0)
    assert torch.isfinite(pipe.text_encoder_2(ids).last_hidden_state).all()


def test_a_transformer_that_diffusers_saved_with_torchao(small_folder: Any, tmp_path: Path) -> None:
    import diffusers

    quantization = pytest.importorskip("torchao.quantization")
    plain = small_folder("flux-small")
    folder = Path(shutil.copytree(plain, tmp_path / "pipeline"))
    made = diffusers.FluxTransformer2DModel.from_pretrained(
        plain / "transformer",
        torch_dtype=torch.bfloat16,
        quantization_config=diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    )
    shutil.rmtree(folder / "transformer")
    made.save_pretrained(folder / "transformer")
    ours = spec_from_folder(folder, dtype="bfloat16").component("transformer")
    theirs = describe_component("transformer", made, live=True)
    assert (ours.weight_bytes, ours.quantized) == (module_bytes(made), "torchao int8")
    assert ours.geometry == theirs.geometry


def test_what_the_files_do_not_tell_is_refused(quantized_folder: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized_folder("nf4"), tmp_path / "pipeline"))
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 1}))
    with pytest.raises(VramplanError, match="no linear layer of T5EncoderModel"):
        spec_from_folder(folder)
    stored = stored_weights(FolderRepository(folder), "text_encoder_2")
    assert stored is not None
    assert {layer.quantized for layer in stored.packed.values()} == {"bitsandbytes nf4"}
    assert build("flux-small").text_encoder_2.config.num_layers > 1


def rewritten(small_folder: Any, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """The small FLUX pipeline with other tensors in its transformer's file."""
    folder = Path(shutil.copytree(small_folder("flux-small"), target))
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def in_8_bits(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tensor.to(torch.float8_e4m3fn if tensor.dim() > 1 else torch.bfloat16) for name, tensor in tensors.items()
    }


def test_weights_in_8_bits_are_loaded_in_a_dtype_to_compute_in(small_folder: Any, tmp_path: Path) -> None:
    folder = rewritten(small_folder, tmp_path / "pipeline", in_8_bits)
    plan = vramplan.plan(folder, device=MACHINE, settings={"placement": "resident"}, height=64, width=64)
    record = next(item for item in plan.model.components if item.name == "transformer")
    assert (record.dtype, plan.projected.basis) == ("bfloat16", "simulated")
    (note,) = plan.notes
    assert "transformer: its files are in float8_e4m3fn" in note
    pipe = load_applied(plan, folder, None, device="cpu", say=lambda _: None).applied.pipe
    assert pipe.transformer.dtype == torch.bfloat16
    assert module_bytes(pipe.transformer) == record.weight_bytes
    told = spec_from_folder(folder, dtype="float16")
    assert (told.notes, told.component("transformer").converted_at_load) == ((), True)
    cast = vramplan.plan(
        folder, device=MACHINE, settings={"weights.transformer": "layerwise_casting"}, height=64, width=64
    )
    assert cast.projected.vram_allocated_bytes < plan.projected.vram_allocated_bytes


@pytest.mark.parametrize("scale", ["scaled_fp8", "transformer_blocks.0.attn.to_q.scale_weight", "x.weight_scale"])
def test_weights_with_scales_that_diffusers_leaves_out_are_refused(
    small_folder: Any, tmp_path: Path, scale: str
) -> None:
    def scaled(tensors: dict[str, Any]) -> dict[str, Any]:
        return in_8_bits(tensors) | {scale: torch.ones(1)}

    folder = rewritten(small_folder, tmp_path / "pipeline", scaled)
    with pytest.raises(
        VramplanError, match=f"transformer: its weights have 8 bits and separate scales .*{scale}"
    ) as caught:
        spec_from_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["fp8", "gptq", "quanto", None])
def test_another_library_is_named_in_one_line(small_folder: Any, tmp_path: Path, method: str | None) -> None:
    folder = Path(shutil.copytree(small_folder("flux-small"), tmp_path / "pipeline"))
    path = folder / "text_encoder_2" / "config.json"
    told = {"quantization_config": {"quant_method": method} if method else ["?"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    by = f" by {method}" if method else ""
    with pytest.raises(VramplanError, match=f"text_encoder_2: its weights are quantized{by}, not by") as caught:
        spec_from_folder(folder)
    assert "\n" not in str(caught.value)
