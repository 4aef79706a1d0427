"""Build a pipeline without weights: real classes, hollow tensors, real schedulers, stand-ins for tokenizers."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vramplan.simulator.engine import CPU, Engine
from vramplan.simulator.tensor import SimTensor


def hollow(module: torch.nn.Module, engine: Engine) -> torch.nn.Module:
    """A copy of the module, live or weightless, with a hollow tensor for each parameter and buffer.

    Tied tensors stay tied. Small real buffers keep their values. The module itself is not changed.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        memo.setdefault(id(tensor), _hollow_tensor(tensor, engine))
    kept = list(memo.values())  # deepcopy's memo must outlive the copy
    made = copy.deepcopy(module, memo)
    del kept
    made.eval()
    return made


def _hollow_tensor(tensor: torch.Tensor, engine: Engine) -> SimTensor:
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    made = engine.from_real(tensor.detach(), CPU, "weights")
    if is_parameter:
        made.stored = None  # weights have no values worth believing: a random pipeline's are random
        made._is_param = True  # type: ignore[attr-defined]
    return made


# Renders any conversation as its texts, one after another: the length is what matters.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def stand_in_tokenizer(model_max_length: int = 77) -> Any:
    """A real fast tokenizer of one word per token, where the pipeline's own files are not at hand."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=model_max_length,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=_CHAT_TEMPLATE,
    )
