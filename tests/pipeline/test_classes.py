"""`class_facts` over every pipeline class that diffusers exports, and what it says of the odd ones."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest

from vramplan.pipeline.classes import ClassFacts, class_facts, parse_sequence

# Classes that model CPU offload cannot be planned for (diffusers 0.42), by what is wrong with each.
NO_SEQUENCE = {
    "AudioLDM2Pipeline",
    "DiffusionGemmaPipeline",
    "DiffusionPipeline",
    "KarrasVePipeline",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "LLaDA2Pipeline",
    "MusicLDMPipeline",
    "PNDMPipeline",
    "ScoreSdeVePipeline",
    "StableCascadeCombinedPipeline",
    "TextToVideoZeroPipeline",
    "VQDiffusionPipeline",
    "VersatileDiffusionPipeline",
    "WuerstchenCombinedPipeline",
}
NEVER_FREES_HOOKS = {
    "AudioLDMPipeline",
    "DanceDiffusionPipeline",
    "LDMTextToImagePipeline",
    "RePaintPipeline",
    "SemanticStableDiffusionPipeline",
    "StableDiffusionPipelineSafe",
    "VersatileDiffusionDualGuidedPipeline",
    "VersatileDiffusionImageVariationPipeline",
    "VersatileDiffusionTextToImagePipeline",
}
# Names in the sequence that are no components: the hooks skip them, and the chain is another than it reads.
UNKNOWN_IN_SEQUENCE = {
    "BriaFiboEditPipeline": ("image_encoder",),
    "BriaFiboPipeline": ("text_encoder_2", "image_encoder"),
    "BriaPipeline": ("text_encoder_2",),
    "ChromaInpaintPipeline": ("text_encoder_2",),
    "KolorsImg2ImgPipeline": ("image_encoder-unet",),
    "LongCatImageEditPipeline": ("image_encoder",),
    "VersatileDiffusionDualGuidedPipeline": ("bert", "unet", "vqvae"),
    "VersatileDiffusionImageVariationPipeline": ("bert", "unet", "vqvae"),
    "VersatileDiffusionTextToImagePipeline": ("bert", "unet", "vqvae"),
}
WITHOUT_CALL = {"DiffusionPipeline", "VersatileDiffusionPipeline"}
VIDEO = (
    "AllegroPipeline",
    "AnimateDiffPipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "HunyuanVideoPipeline",
    "LTXPipeline",
    "MochiPipeline",
    "StableVideoDiffusionPipeline",
    "WanPipeline",
    "WanImageToVideoPipeline",
    "WanAnimatePipeline",
)
PICTURE = ("StableDiffusionPipeline", "FluxPipeline", "HunyuanImagePipeline", "HunyuanDiTPipeline", "QwenImagePipeline")


@cache
def every_class() -> dict[str, type]:
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    return {
        name: cls
        for name, cls in found.items()
        if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)
    }


@cache
def every_fact() -> dict[str, ClassFacts]:
    return {name: class_facts(cls) for name, cls in every_class().items()}


def test_every_exported_class_is_read() -> None:
    assert len(every_class()) > 250
    for name, facts in every_fact().items():
        assert facts.name == every_class()[name].__name__
        assert facts.expected or facts.name in WITHOUT_CALL, name


def test_the_classes_without_a_sequence_are_these() -> None:
    assert {name for name, facts in every_fact().items() if facts.sequence is None} == NO_SEQUENCE


def test_the_classes_whose_call_never_frees_its_hooks_are_these() -> None:
    found = {name for name, facts in every_fact().items() if not facts.frees_hooks and facts.sequence is not None}
    assert found == NEVER_FREES_HOOKS


def test_the_classes_with_unknown_names_in_their_sequence_are_these() -> None:
    found = {name: facts.unknown_in_sequence for name, facts in every_fact().items() if facts.unknown_in_sequence}
    assert found == UNKNOWN_IN_SEQUENCE


def test_the_classes_that_cannot_be_called_are_these() -> None:
    assert {name for name, facts in every_fact().items() if facts.problem} == WITHOUT_CALL


@pytest.mark.parametrize("name", VIDEO)
def test_a_pipeline_of_videos_is_known_as_one(name: str) -> None:
    assert every_fact()[name].video


@pytest.mark.parametrize("name", PICTURE)
def test_a_pipeline_of_pictures_is_not_taken_for_videos(name: str) -> None:
    assert not every_fact()[name].video


def test_a_class_that_returns_frames_makes_videos() -> None:
    """Whatever its call names the number of frames: pictures would be priced for one frame."""
    known = {"TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"}
    for name, cls in every_class().items():
        told = str(getattr(cls.__call__, "__annotations__", {}).get("return", ""))
        if "Frame" in told or "Video" in told:
            assert every_fact()[name].video or name in known, name


@pytest.mark.parametrize(
    ("name", "conditions"),
    [
        ("StableDiffusionPipeline", False),  # ip_adapter_image goes to the image encoder
        ("StableDiffusionImg2ImgPipeline", True),
        ("StableDiffusionInpaintPipeline", True),
        ("FluxPipeline", False),
        ("FluxKontextPipeline", True),
        ("FluxControlPipeline", True),
        ("CogVideoXPipeline", False),
        ("CogVideoXVideoToVideoPipeline", True),
        ("LTXConditionPipeline", True),
        ("StableVideoDiffusionPipeline", True),
        ("WanVACEPipeline", True),
    ],
)
def test_a_class_that_encodes_a_picture_first_is_known_by_its_arguments(name: str, conditions: bool) -> None:
    assert every_fact()[name].conditions is conditions


def test_a_sequence_is_split_at_its_arrows() -> None:
    assert parse_sequence(None) is None
    assert parse_sequence("") == ()
    assert parse_sequence("text_encoder-> unet ->vae") == ("text_encoder", "unet", "vae")
    assert every_fact()["StableDiffusionXLPipeline"].sequence == (
        "text_encoder",
        "text_encoder_2",
        "image_encoder",
        "unet",
        "vae",
    )
    assert every_fact()["LTXLatentUpsamplePipeline"].sequence == ()


def test_excluded_and_optional_components_are_the_classes_own() -> None:
    facts = every_fact()["StableDiffusionPipeline"]
    assert facts.excluded == {"safety_checker"}
    assert facts.optional == {"safety_checker", "feature_extractor", "image_encoder"}


def test_hunyuan_image_may_leave_its_second_encoder_out() -> None:
    assert every_fact()["HunyuanImagePipeline"].optional_uses == {"text_encoder_2"}


def test_a_call_wrapped_by_a_decorator_is_still_read() -> None:
    import functools

    def decorated(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs)

        return inner

    class Wrapped(diffusers.StableDiffusionPipeline):
        __call__ = decorated(diffusers.StableDiffusionPipeline.__call__)

    assert class_facts(Wrapped).frees_hooks
    assert not class_facts(Wrapped).video
