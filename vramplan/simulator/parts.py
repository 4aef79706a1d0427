"""Build a pipeline for simulation: real classes and schedulers, simulated tensors, stand-ins for tokenizers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vramplan.errors import VramplanError
from vramplan.pipeline.build import build_weightless, component_class, weightless_copy
from vramplan.pipeline.dtypes import cast_as_loaded
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.own_class import plain_class
from vramplan.pipeline.quantization import quantization_of
from vramplan.simulator.engine import Engine
from vramplan.simulator.module_copy import copy_module
from vramplan.simulator.shapes import CPU
from vramplan.simulator.tensor import SimTensor

if TYPE_CHECKING:
    from vramplan.pipeline.repository import Repository

# Renders any conversation as its texts, one after another: only the length matters.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a pipeline before assembly: modules (live or weightless), and others such as tokenizers."""

    cls: type
    modules: Mapping[str, torch.nn.Module]
    others: Mapping[str, Any] = field(default_factory=dict)

    def assemble(self, engine: Engine) -> Any:
        """Build the pipeline from simulated copies of its modules. The parts are not changed."""
        made: dict[str, Any] = {}
        for name, module in self.modules.items():
            engine.ledger.component = name  # the owner of the weights made next
            made[name] = simulated_copy(module, engine)
        engine.ledger.component = ""
        made |= {name: copy.deepcopy(part) for name, part in self.others.items()}
        takes = inspect.signature(self.cls.__init__).parameters  # type: ignore[misc]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            return self.cls(**made)
        missing = {
            name: None
            for name, parameter in takes.items()
            if name not in made and parameter.default is inspect.Parameter.empty and name not in ("self", "kwargs")
        }
        return self.cls(**{name: part for name, part in (made | missing).items() if name in takes})


def parts_from_live(pipe: Any) -> Parts:
    """The parts of a live pipeline. Its modules are not changed."""
    modules = modules_of(pipe)
    others = {name: part for name, part in pipe.components.items() if name not in modules}
    modules |= {name: weightless_copy(part) for name, part in modules.items() if quantization_of(part)}
    settings = {
        name: value
        for name, value in dict(pipe.config).items()
        if name not in pipe.components and not name.startswith("_")
    }
    return Parts(cls=plain_class(pipe), modules=modules, others=settings | others)


def parts_from_profile(name: str, dtypes: Mapping[str, str] | None = None) -> Parts:
    """The parts of the pipeline in a bundled profile, in the given dtypes by component, else in the profile's.

    Tokenizers are stand-ins with the right maximum length.
    """
    from vramplan.pipeline.bundled import profile_class
    from vramplan.profiles.catalogue import load_pipeline_profile

    profile = load_pipeline_profile(name)
    modules: dict[str, torch.nn.Module] = {}
    others: dict[str, Any] = dict(profile.settings)
    for part_name, part in profile.components.items():
        if part.parameters is not None:
            modules[part_name] = build_weightless(part.library, part.class_name, part.config)
            cast_as_loaded(modules[part_name], (dtypes or {}).get(part_name) or part.dtype or profile.dtype)
        elif "tokenizer" in part_name:
            others[part_name] = stand_in_tokenizer(part.model_max_length or 77, part.class_name)
        elif part.class_name.endswith("ImageProcessor"):
            others[part_name] = component_class(part.library, part.class_name)(**part.config)
        elif part.library == "diffusers":
            others[part_name] = component_class(part.library, part.class_name).from_config(part.config)
    if "safety_checker" in modules:
        others["feature_extractor"] = stand_in_feature_extractor()
    return Parts(cls=profile_class(profile), modules=modules, others=others)


def parts_from_repository(repository: Repository, dtypes: Mapping[str, str]) -> Parts:
    """The parts of a saved pipeline, in the given dtypes by component.

    From a folder, tokenizers and schedulers are loaded; from the hub, tokenizers are stand-ins, and other parts without
    weights are built from their configurations.

    Raises:
        VramplanError: not a saved pipeline, or a part of it is damaged.
    """
    from vramplan.pipeline.folder import pipeline_class, read_index, weightless_component

    index = read_index(repository)
    modules: dict[str, torch.nn.Module] = {}
    others: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(entry, list):
            others[name] = entry
        elif None not in entry:
            library, class_name = entry
            if name in dtypes:
                modules[name] = weightless_component(repository, name, library, class_name, dtypes[name])
            elif repository.folder is not None:
                others[name] = _saved_part(repository.folder / name, library, class_name)
            else:
                others |= _configured_part(repository, name, library, class_name)
    return Parts(cls=pipeline_class(repository, index), modules=modules, others=others)


def _saved_part(folder: Path, library: str, class_name: str) -> Any:
    cls = component_class(library, class_name)
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        if "okenizer" in class_name:
            return stand_in_tokenizer()
        raise VramplanError(f"{folder}: {class_name} cannot be loaded ({' '.join(str(error).split())})") from error


def _configured_part(repository: Repository, name: str, library: str, class_name: str) -> dict[str, Any]:
    """The part of this name, which has no weights, built from its configuration; empty if that does not suffice."""
    cls, files = component_class(library, class_name), repository.names(name)
    if "okenizer" in class_name:
        config = repository.read_json(f"{name}/{_TOKENIZER}") if _TOKENIZER in files else {}
        longest = config.get("model_max_length")
        return {name: stand_in_tokenizer(longest if isinstance(longest, int) else 77, class_name)}
    for file, make in (("scheduler_config.json", "from_config"), ("preprocessor_config.json", "from_dict")):
        if file in files and hasattr(cls, make):
            return {name: getattr(cls, make)(repository.read_json(f"{name}/{file}"))}
    return {}


def simulated_copy(module: torch.nn.Module, engine: Engine) -> torch.nn.Module:
    """A copy of the module, live or weightless, with a simulated tensor for each parameter and buffer.

    Tied tensors stay tied. Small real buffers keep their values. The module itself is not changed.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers(), *_computed_tensors(module)):
        if id(tensor) not in memo:
            memo[id(tensor)] = _simulated_tensor(tensor, engine)
    made: torch.nn.Module = copy_module(module, memo)
    made.eval()
    return made


def _computed_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Tensor attributes computed from parameters, as `weight_norm` leaves them: torch refuses to copy those."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                yield value


def _simulated_tensor(tensor: torch.Tensor, engine: Engine) -> SimTensor:
    made = engine.from_real(tensor.detach(), CPU, "weights")
    if isinstance(tensor, torch.nn.Parameter):
        made.stored = None  # the values of trained weights are unknown, those of random ones meaningless
        made._is_param = True
    return made


def stand_in_tokenizer(model_max_length: int = 77, class_name: str = "") -> Any:
    """A real fast tokenizer with one token per word, for pipelines whose tokenizer files are missing.

    In place of a `ChatGLMTokenizer` it returns positions too, as that one does.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])

    class WithPositions(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            made = super().__call__(*args, **kwargs)
            made["position_ids"] = made["attention_mask"].cumsum(-1) - 1
            return made

    cls = WithPositions if class_name == "ChatGLMTokenizer" else PreTrainedTokenizerFast
    return cls(
        tokenizer_object=inner,
        model_max_length=model_max_length,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=_CHAT_TEMPLATE,
    )


def stand_in_feature_extractor() -> Any:
    """The image processor of a safety checker: CLIP's, which needs no files."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor()
