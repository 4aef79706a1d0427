"""Weight streaming on real small pipelines, watched by the race-finding device: the same bits whatever happens between
calls and between steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from make_pipeline import build

from tests.support.pipelines import make_extra
from tests.support.race_device import RaceDevice, race_device
from vramplan.errors import VramplanError
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.own_class import plain_class, take_class
from vramplan.streaming.attach import detach, stream_of, stream_weights

TEXT = {"prompt": "a fox", "num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64}
SMALL: dict[str, Any] = {
    "sd15-small": {}, "sdxl-small": {}, "flux-small": {"max_sequence_length": 32},
}  # fmt: skip


def made(kind: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments of a short call of it."""
    if kind not in SMALL:
        return make_extra(kind)
    pipe = build(kind)
    pipe.set_progress_bar_config(disable=True)
    for module in modules_of(pipe).values():
        module.eval()
    return pipe, {**TEXT, **SMALL[kind]}


def result(pipe: Any, call: dict[str, Any], **more: Any) -> torch.Tensor:
    """The tensor that a call returns."""
    output = pipe(**call, **more, generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = output[0] if isinstance(output[0], torch.Tensor) else torch.stack(list(output[0]))
    return found


def division(pipe: Any, form: str) -> dict[str, dict[str, int]]:
    """All components in one of the forms: everything streamed and loose, half page-locked, or a part kept."""
    found: dict[str, dict[str, int]] = {}
    for name, module in modules_of(pipe).items():
        if name in ("unet", "transformer"):
            found[name] = {
                "streamed": {"streamed": 3},
                "locked": {"streamed": 3, "locked": 3},
                "kept": {"streamed": 3, "keep": 1, "locked": 1},
            }[form]
        elif form != "kept" or name == "vae":
            found[name] = {"locked": 1} if form == "locked" else {}
        assert isinstance(module, torch.nn.Module)
    return found


def undo(pipe: Any) -> None:
    """Take the plan off."""
    for module in modules_of(pipe).values():
        detach(module)
    take_class(pipe)


def objects(pipe: Any) -> dict[str, int]:
    """The tensors of a pipeline by their place."""
    return {
        f"{name}.{path}": id(tensor)
        for name, module in modules_of(pipe).items()
        for path, tensor in (*module.named_parameters(), *module.named_buffers())
    }


@contextmanager
def streamed(pipe: Any, form: str) -> Iterator[RaceDevice]:
    """Context manager: the pipeline streams on the race-finding device."""
    with race_device(stage_bytes=1 << 16) as device:
        device.adopt_all(pipe)
        stream_weights(pipe, "cpu", **division(pipe, form))
        yield device
        undo(pipe)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("sd15-small", "locked"), ("sdxl-small", "kept"), ("flux-small", "streamed"), ("sd3", "locked"),
        ("controlnet", "streamed"),
    ],
)  # fmt: skip
def test_two_calls_have_the_same_bits(kind: str, form: str) -> None:
    pipe, call = made(kind)
    modes, before = (torch.no_grad, torch.inference_mode), objects(pipe)
    with race_device():  # which has torch choose other kernels in inference mode
        expected = [result_in(mode, pipe, call) for mode in modes]
    with streamed(pipe, form) as device:
        for mode, value in zip(modes, expected, strict=True):
            assert torch.equal(result_in(mode, pipe, call), value)
        assert device.kernels > 0
    assert objects(pipe) == before
    with race_device():
        assert torch.equal(result(pipe, call), expected[0])


def result_in(mode: Any, pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """The tensor that a call returns in a mode of torch."""
    with mode():
        return result(pipe, call)


# ---- what may be done with a pipeline between calls and between steps


def fused(pipe: Any) -> None:
    """Load a LoRA and fuse it."""
    add_lora(pipe)
    pipe.fuse_lora()


def add_lora(pipe: Any) -> None:
    """Load a LoRA into the transformer."""
    from peft import LoraConfig

    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v", "proj_out"])
    pipe.transformer.add_adapter(config, "drawn")
    pipe.transformer.eval()


def unfused(pipe: Any) -> None:
    """Take a fused LoRA out again."""
    if any(getattr(module, "merged_adapters", None) for module in pipe.transformer.modules()):
        pipe.unfuse_lora()
        pipe.transformer.delete_adapters("drawn")


def edited(pipe: Any) -> None:
    """Change weights in place."""
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.25)


def assigned(pipe: Any) -> None:
    """Load a state with new tensors."""
    state = {name: value * 0.75 for name, value in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(state, assign=True)


def loaded(pipe: Any) -> None:
    """Load a state into the tensors there are."""
    pipe.transformer.load_state_dict({name: value * 0.75 for name, value in pipe.transformer.state_dict().items()})


def other_data(pipe: Any) -> None:
    """Put other data in place."""
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data * 0.5


DEEDS: dict[str, Callable[[Any], None]] = {
    function.__name__: function for function in (add_lora, fused, edited, assigned, loaded, other_data)
}


def once(deed: Callable[[Any], None]) -> Callable[..., dict[str, Any]]:
    """A callback that does it after the first step."""

    def callback(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            deed(pipe)
        return tensors

    return callback


@pytest.mark.diagonal("deed", "when")
@pytest.mark.parametrize("when", ["between calls", "in a step"])
@pytest.mark.parametrize("deed", sorted(DEEDS))
def test_weights_changed_while_streamed(deed: str, when: str) -> None:
    plain, call = made("flux-small")
    pipe = copy_of(plain)
    with streamed(pipe, "locked" if deed in ("fused", "edited") else "streamed"):
        for part in (plain, pipe):
            part.first = result(
                part, call, **({"callback_on_step_end": once(DEEDS[deed])} if when == "in a step" else {})
            )
            if when == "between calls":
                DEEDS[deed](part)
            part.second = result(part, call)
            unfused(part)
            part.third = result(part, call)
        assert torch.equal(pipe.first, plain.first)
        assert torch.equal(pipe.second, plain.second)
        assert torch.equal(pipe.third, plain.third)
        assert not torch.equal(pipe.first, pipe.second) or when == "in a step"
    same_states(pipe.transformer, plain.transformer)


def copy_of(pipe: Any) -> Any:
    """An untouched pipeline with the same weights."""
    others = {name: part for name, part in pipe.components.items() if not isinstance(part, torch.nn.Module)}
    return type(pipe)(**others, **{name: copy.deepcopy(module) for name, module in modules_of(pipe).items()})


def same_states(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Assert that two modules have the same weights."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def deep_copied(module: torch.nn.Module, folder: Path) -> torch.nn.Module:
    return copy.deepcopy(module)


def pickled(module: torch.nn.Module, folder: Path) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found: torch.nn.Module = torch.load(file, weights_only=False)
    return found


def saved(module: Any, folder: Path) -> torch.nn.Module:
    module.save_pretrained(folder)
    return plain_class(module).from_pretrained(folder)  # type: ignore[no-any-return]


@pytest.mark.diagonal("way", "when")
@pytest.mark.parametrize("when", ["between calls", "in a step", "after an interrupt"])
@pytest.mark.parametrize("way", [deep_copied, pickled, saved], ids=lambda way: way.__name__)
def test_copies_have_true_weights_and_no_plan(way: Any, when: str, tmp_path: Path) -> None:
    pipe, call = made("flux-small")
    plain = copy_of(pipe)
    expected = result(plain, call)
    with streamed(pipe, "locked"):
        copies = []

        def take(pipe: Any) -> None:
            copies.append(way(pipe.transformer, tmp_path))
            copies.append(pipe.transformer.state_dict())

        if when == "in a step":
            result(pipe, call, callback_on_step_end=once(take))
        elif when == "between calls":
            take(pipe)
        else:
            handle = pipe.transformer.single_transformer_blocks[0].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                result(pipe, call)
            handle.remove()
            take(pipe)
        assert torch.equal(result(pipe, call), expected)
    found, state = copies
    same_states(found, plain.transformer)
    assert all(torch.equal(state[name], value) for name, value in plain.transformer.state_dict().items())
    assert type(found) is type(plain.transformer)
    assert stream_of(found) is None
    pipe.transformer = found
    assert torch.equal(result(pipe, call), expected)
    with streamed(pipe, "streamed"):  # a copy can be streamed itself
        assert torch.equal(result(pipe, call), expected)


def interrupt(*_: Any) -> None:
    """As if the user had pressed Ctrl-C."""
    raise KeyboardInterrupt


def load_ip_adapter(pipe: Any) -> None:
    """Load a random IP-Adapter for embeddings of 16 numbers."""
    unet, generator = pipe.unet, torch.Generator().manual_seed(3)
    width, weights, key = unet.config.cross_attention_dim, {}, 1

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 4

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("to_k_ip", "to_v_ip"):
                weights[name, part] = drawn(module.to_q.out_features, width)
    state: dict[str, torch.Tensor] = {}
    for name in unet.attn_processors:  # in the order of the loader
        if name.endswith("attn2.processor"):
            for part in ("to_k_ip", "to_v_ip"):
                state[f"{key}.{part}.weight"] = weights[name.removesuffix(".processor"), part]
            key += 2
    projection = {
        "proj.weight": drawn(4 * width, 16), "proj.bias": drawn(4 * width),
        "norm.weight": drawn(width), "norm.bias": drawn(width),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": state}])
    unet.eval()


def test_ip_adapter_loaded_before_and_after() -> None:
    plain, call = made("sd15-small")
    pipe = copy_of(plain)
    with streamed(pipe, "locked"):
        for part in (plain, pipe):
            part.first = result(part, call)
            load_ip_adapter(part)
            part.second = result(part, call, ip_adapter_image_embeds=[torch.ones(2, 1, 16)])
        assert torch.equal(pipe.first, plain.first)
        assert torch.equal(pipe.second, plain.second)
    with streamed(pipe, "kept"):
        assert torch.equal(result(pipe, call, ip_adapter_image_embeds=[torch.ones(2, 1, 16)]), plain.second)


def test_upcast_of_the_vae_inside_a_call() -> None:
    """SDXL decodes in float32 and casts its VAE back."""
    pipe, call = made("sdxl-small")
    pipe.vae.to(torch.float16)
    pipe.vae.config.force_upcast = True
    plain = copy_of(pipe)
    plain.vae.config.force_upcast = True
    expected = result(plain, call)
    with streamed(pipe, "locked"):
        for _ in range(2):
            assert torch.equal(result(pipe, call), expected)
            assert next(pipe.vae.parameters()).dtype == torch.float16


def test_component_of_two_pipelines() -> None:
    first, call = made("sd15-small")
    second = diffusers.StableDiffusionImg2ImgPipeline(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    more = {"prompt": "a fox", "image": torch.zeros(1, 3, 64, 64), "strength": 1.0, "num_inference_steps": 2}
    more |= {"output_type": "pt"}
    expected = result(first, call), result(second, more)
    with streamed(first, "locked") as device:
        from vramplan.streaming.attach import join

        join(second)
        for pipe, arguments, value in ((first, call, 0), (second, more, 1), (first, call, 0)):
            assert torch.equal(result(pipe, arguments), expected[value])
            device.reuse()
            assert device.memory.used == 0
        take_class(second)


def test_moves_and_training_are_refused() -> None:
    pipe, call = made("flux-small")
    expected = result(pipe, call)
    with streamed(pipe, "kept"):
        for place in ("cpu", "meta"):
            with pytest.raises(VramplanError, match="streamed under a plan"):
                pipe.to(place)
        with pytest.raises(VramplanError, match="undo it before moving"):
            pipe.transformer.to("meta")
        pipe.transformer.to(torch.float32)
        pipe.transformer.train()
        with pytest.raises(VramplanError, match="cannot be trained"):
            pipe.transformer(torch.ones(1, 4, 4))
        pipe.transformer.eval()
        assert torch.equal(result(pipe, call), expected)


def test_later_backward_is_refused() -> None:
    """Gradients through weights that are gone would be wrong."""
    pipe, _ = made("sd15-small")
    with streamed(pipe, "streamed"):
        sample = torch.ones(1, 4, 8, 8, requires_grad=True)
        made_ = pipe.unet(sample, 1, torch.ones(1, 4, pipe.unet.config.cross_attention_dim)).sample
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made_.sum().backward()
