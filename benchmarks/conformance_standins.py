"""Small local stand-ins for the tokenizers, processors, configs and encoders that diffusers' tests download.

None of them knows a language: what matters is that they have the classes, shapes and special tokens a
pipeline asks for. Folders that exist are still read as ever.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

_LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()[]{}<>/\\|_-+*=#&%$@~^`\n"
_QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_PADS = {"<|image_pad|>": 151655, "<|video_pad|>": 151656}  # models find these by their number
_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}\
{% else %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<|vision_start|>\
<|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"""


def tokenizer(name: str = "", **options: Any) -> Any:
    """A fast tokenizer of one token per letter, with the special tokens of Qwen's chat."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *_LETTERS, *_QWEN_TOKENS])} | _QWEN_PADS
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = Fuse()
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=options.get("model_max_length", 77),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<unk>",
        additional_special_tokens=[*_QWEN_TOKENS, *_QWEN_PADS],
        chat_template=_TEMPLATE,
    )
    for attribute, token in (("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>")):
        setattr(made, attribute, token)
        setattr(made, f"{attribute}_id", vocabulary[token])
    return made


def config(name: str, **_: Any) -> Any:
    """The configuration of a tiny text encoder."""
    from transformers import BertConfig, CLIPTextConfig, LlamaConfig, T5Config, UMT5Config

    if "umt5" in name:
        return UMT5Config(vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=5, num_heads=4)
    if "t5" in name.lower():
        return T5Config(vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=5, num_heads=4)
    small = {"vocab_size": 1124, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
    if "Bert" in name:
        return BertConfig(**small, intermediate_size=37)
    if "Llama" in name:
        return LlamaConfig(**small | {"hidden_size": 16}, intermediate_size=37, num_key_value_heads=4)
    if "clip" in name:
        return CLIPTextConfig(**small, intermediate_size=37)
    raise OSError(f"no stand-in for the configuration of {name}")


def model(cls: type, name: str, **options: Any) -> Any:
    """A tiny model of the class, of random weights."""
    makers: dict[str, Callable[..., Any]] = {
        "Gemma3ForConditionalGeneration": _gemma3,
        "UNet2DModel": _unet,
        "ChatGLMModel": _chatglm,
        "SiglipVisionModel": _siglip,
        "Qwen2VLForConditionalGeneration": _qwen2_vl,
        "Qwen3VLForConditionalGeneration": _qwen3_vl,
    }
    maker = makers.get(cls.__name__)
    if maker is not None:
        return maker(cls, name, **options).eval()
    return cls(config(name)).eval()


def _gemma3(cls: Any, name: str, **_: Any) -> Any:
    from transformers import Gemma3Config

    text = {
        "vocab_size": 1124,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return cls(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def _unet(cls: Any, name: str, subfolder: str = "", **_: Any) -> Any:
    return cls(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=10 if "class" in subfolder else None,
    )


def _chatglm(cls: Any, name: str, **_: Any) -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    return cls(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=300,
            hidden_size=8,
            ffn_hidden_size=16,
            kv_channels=4,
            num_attention_heads=2,
            seq_length=2048,
            multi_query_attention=True,
            multi_query_group_num=2,
            rmsnorm=True,
            post_layer_norm=True,
            add_bias_linear=False,
            add_qkv_bias=True,
            bias_dropout_fusion=True,
            original_rope=True,
        )
    )


def _siglip(cls: Any, name: str, **_: Any) -> Any:
    from transformers import SiglipVisionConfig

    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    return cls(SiglipVisionConfig(**small, image_size=30, patch_size=2))


def _qwen2_vl(cls: Any, name: str, **_: Any) -> Any:
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": 151700,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }
    vision = {"depth": 2, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "patch_size": 14}
    return cls(Qwen2VLConfig(text_config=text, vision_config=vision))


def _qwen3_vl(cls: Any, name: str, **_: Any) -> Any:
    from transformers import Qwen3VLConfig

    text = {
        "vocab_size": 151700,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }
    return cls(Qwen3VLConfig(text_config=text, vision_config=vision))


def processor(cls: type, name: str, **_: Any) -> Any:
    """A processor of the class around the stand-in tokenizer, and an image processor of its default settings."""
    import transformers

    known = {"Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "GlmImageProcessor"}
    name_of = cls.__name__ if cls.__name__ in known else "Qwen2VLProcessor"
    made: Any = getattr(transformers, name_of)
    images = transformers.Qwen2VLImageProcessor(patch_size=16 if "Qwen3" in name_of else 14)
    video = transformers.Qwen2VLVideoProcessor()
    if name_of == "GlmImageProcessor":
        return made(images, tokenizer(), chat_template=_TEMPLATE)
    return made(images, tokenizer(), video, chat_template=_TEMPLATE)


def chatglm_tokenizer(cls: Any) -> Any:
    """ChatGLM's own class, which wants a sentencepiece model: one of a few words is trained for it."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "words.txt")
        text.write_text("a painting of a squirrel eating a burger\nthe quick brown fox jumps over the lazy dog\n")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(Path(folder, "tiny")),
            vocab_size=32,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        return cls(str(Path(folder, "tiny.model")))


def _tokenizer_of(cls: Any, name: str, **options: Any) -> Any:
    if cls.__name__ == "ChatGLMTokenizer":
        return chatglm_tokenizer(cls)
    made = tokenizer(name, **options)
    if cls.__name__ in ("RobertaTokenizer", "T5Tokenizer"):  # pipelines ask for these by their class
        made.__class__ = cls
    return made


@contextmanager
def stand_ins() -> Iterator[None]:
    """While entered, nothing is asked of the hub: ids that are no folders get the stand-ins above."""
    import diffusers
    import transformers

    def maker_of(make: Callable[..., Any], original: Any) -> Any:
        def from_pretrained(cls: Any, name: Any = None, *args: Any, **options: Any) -> Any:
            if os.path.isdir(str(name)):
                return original.__func__(cls, name, *args, **options)
            return make(cls, str(name), **options)

        return classmethod(from_pretrained)

    places: list[tuple[Any, Callable[..., Any]]] = [
        (transformers.AutoTokenizer, lambda cls, name, **kw: tokenizer(name, **kw)),
        (transformers.AutoConfig, lambda cls, name, **kw: config(name, **kw)),
        (transformers.AutoProcessor, processor),
        (transformers.ProcessorMixin, processor),
        (transformers.PreTrainedTokenizerBase, _tokenizer_of),
        (transformers.PreTrainedModel, model),
        (transformers.ImageProcessingMixin, lambda cls, name, **kw: cls(**_image_options(kw))),
        (transformers.FeatureExtractionMixin, lambda cls, name, **kw: cls(**kw)),
        (diffusers.ModelMixin, model),
    ]

    with ExitStack() as stack:
        for cls, make in places:
            original = cls.__dict__["from_pretrained"]
            stack.enter_context(patch.object(cls, "from_pretrained", maker_of(make, original)))
        yield


def _image_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("size", "crop_size", "do_resize")}
