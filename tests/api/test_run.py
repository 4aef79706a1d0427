"""What `vramplan apply` and `vramplan code` do around a plan: load, call, write, and print as code."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
from make_pipeline import SMALL_KINDS
from PIL import Image

import vramplan
from vramplan.api.code import plan_code
from vramplan.api.run import model_folder, run_plan
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.planfile.types import Settings
from vramplan.runtime.call import call_arguments
from vramplan.runtime.output import check_output, write_result
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))


def make_plan(folder, **options):
    usual = {"device": MACHINE, "height": 64, "width": 64, "steps": 2, "simulate": False}
    return vramplan.plan(str(folder), **usual | options)


def picture(shade=0):
    return Image.new("RGB", (16, 16), (shade, 0, 0))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def sd15_plan(small_folder):
    return make_plan(small_folder("sd15-small"))


@pytest.fixture(scope="module")
def video_plan(small_folder):
    return make_plan(small_folder("cogvideox-small"), frames=9)


class TestModelFolder:
    def test_the_one_given_wins(self, sd15_plan):
        assert str(model_folder(sd15_plan, "elsewhere")) == "elsewhere"
        assert str(model_folder(sd15_plan, None)) == sd15_plan.model.source

    @pytest.mark.parametrize("source", ["live", "profile:flux.1-dev"])
    def test_a_plan_without_a_folder_asks_for_one(self, sd15_plan, source):
        plan = replace(sd15_plan, model=replace(sd15_plan.model, source=source))
        with pytest.raises(UsageError, match="give `model=FOLDER`"):
            model_folder(plan, None)
        assert str(model_folder(plan, "here")) == "here"


class TestCallArguments:
    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_they_are_the_workload_of_the_plan_and_the_call_takes_them(self, small_folder, small_pipeline, kind):
        plan = make_plan(small_folder(kind), batch=2)
        pipe = small_pipeline(kind)
        arguments = call_arguments(pipe, plan, "a fox", "a blur", seed=5)
        inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
        work = plan.workload
        assert (arguments["height"], arguments["width"], arguments["num_inference_steps"]) == (64, 64, 2)
        batch = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt")
        assert batch == work.num_images_per_prompt == 2
        assert arguments["guidance_scale"] == work.guidance_scale
        assert arguments["generator"].initial_seed() == 5
        assert ("num_frames" in arguments) == kind.startswith("cogvideox")

    def test_a_video_of_one_frame_is_not_one_of_the_default_length(self, small_pipeline, video_plan):
        plan = replace(video_plan, workload=replace(video_plan.workload, num_frames=1))
        assert call_arguments(small_pipeline("cogvideox-small"), plan, "a fox")["num_frames"] == 1

    def test_without_a_negative_prompt_the_call_keeps_its_own(self, small_pipeline, sd15_plan):
        assert "negative_prompt" not in call_arguments(small_pipeline("sd15-small"), sd15_plan, "a fox")


class TestCheckOutput:
    @pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.b.jpg", "a.jpeg", "a.webp"])
    def test_pictures(self, tmp_path, sd15_plan, video_plan, name):
        check_output(str(tmp_path / name), sd15_plan)
        with pytest.raises(UsageError, match=r"must end in \.mp4, \.gif"):
            check_output(str(tmp_path / name), video_plan)

    @pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
    def test_videos(self, tmp_path, sd15_plan, video_plan, name):
        check_output(str(tmp_path / name), video_plan)
        with pytest.raises(UsageError, match=r"must end in \.png"):
            check_output(str(tmp_path / name), sd15_plan)

    def test_its_folder_must_be_there(self, tmp_path, sd15_plan):
        with pytest.raises(UsageError, match="its folder does not exist"):
            check_output(str(tmp_path / "none" / "a.png"), sd15_plan)


class TestWriteResult:
    def test_one_picture(self, tmp_path):
        path = tmp_path / "a.png"
        assert write_result(SimpleNamespace(images=[picture()]), path) == [path]
        with Image.open(path) as image:
            assert image.size == (16, 16)
        assert names(tmp_path) == ["a.png"]

    def test_several_get_a_number_each_and_are_all_told(self, tmp_path):
        written = write_result(SimpleNamespace(images=[picture(1), picture(2)]), tmp_path / "a.png")
        assert [path.name for path in written] == names(tmp_path) == ["a-0.png", "a-1.png"]
        assert [Image.open(path).getpixel((0, 0))[0] for path in written] == [1, 2]

    @pytest.mark.parametrize("suffix", [".gif", ".mp4"])
    def test_every_video_is_written(self, tmp_path, suffix):
        frames = [[picture(0), picture(200)], [picture(200), picture(0)]]
        written = write_result(SimpleNamespace(frames=frames), tmp_path / f"a{suffix}")
        assert [path.name for path in written] == names(tmp_path) == [f"a-0{suffix}", f"a-1{suffix}"]
        assert all(path.stat().st_size > 50 for path in written)

    def test_a_video_of_one_frame_can_be_a_picture(self, tmp_path):
        write_result(SimpleNamespace(frames=[[picture(7)]]), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert image.getpixel((0, 0))[0] == 7

    @pytest.mark.parametrize(
        ("error", "match"),
        [(OSError(28, "No space left"), "cannot be written"), (ImportError("no writer"), "needs another package")],
    )
    def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(self, tmp_path, error, match):
        class Broken:
            def save(self, path):
                path.write_bytes(b"half")
                raise error

        (tmp_path / "a.png").write_bytes(b"old")
        with pytest.raises(VramplanError, match=match):
            write_result(SimpleNamespace(images=[Broken()]), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes() == b"old"
        assert names(tmp_path) == ["a.png"]


class TestPlanCode:
    def test_it_is_python_with_the_calls_of_the_plan(self):
        settings = {"placement.unet": "group_offload:blocks=2", "decode": "vae_tiling:tile=256"}
        plan = make_plan("stable-diffusion-1.5", height=1024, width=1024, settings=settings, allow="near_lossless")
        code = plan_code(plan)
        ast.parse(code)
        assert "num_blocks_per_group=2" in code
        assert "pipe.vae.tile_sample_min_size = 256\npipe.vae.tile_latent_min_size = 32\n" in code
        assert code.index("apply_group_offloading(pipe") < code.index("enable_tiling()")
        assert code.count("import torch") == 1

    def test_components_are_loaded_in_the_order_of_the_plan(self, small_folder):
        settings = {"placement": "resident", "placement.unet": "group_offload:blocks=1"}
        plan = make_plan(small_folder("sd15-small"), settings=settings, dtype="bfloat16")
        order = plan.projected.load.order
        by_size = sorted(plan.model.components, key=lambda record: -record.weight_bytes)
        assert (order[-1], by_size[0].name) == ("unet", "unet")  # what stays in RAM comes last, the largest or not
        code = plan_code(plan)
        assert sorted(order, key=lambda name: code.index(f"pipe.{name} = ")) == list(order)
        older = replace(plan, projected=replace(plan.projected, load=replace(plan.projected.load, order=())))
        assert plan_code(older).index("pipe.unet = ") == min(
            plan_code(older).index(f"pipe.{name} = ") for name in order
        )

    def test_each_of_several_dtypes_is_loaded(self, sd15_plan):
        first, *rest = sd15_plan.model.components
        plan = replace(sd15_plan, model=replace(sd15_plan.model, components=(replace(first, dtype="bfloat16"), *rest)))
        assert f'subfolder="{first.name}", dtype=torch.bfloat16' in plan_code(plan)

    def test_a_plan_of_a_live_pipeline_says_where_its_calls_are(self, small_pipeline):
        plan = vramplan.plan(small_pipeline("sd15-small"), device=MACHINE, height=64, width=64, simulate=False)
        with pytest.raises(UsageError, match="calls"):
            plan_code(plan)

    def test_the_folder_need_not_be_here_where_nothing_is_read_from_it(self, sd15_plan):
        plan = replace(sd15_plan, model=replace(sd15_plan.model, source="/elsewhere/sd15"))
        assert 'from_pretrained("/elsewhere/sd15"' in plan_code(plan)

    @pytest.mark.parametrize("source", ['a"b', "C:\\new\\table", 'x")\nimport os\n("'])
    def test_a_path_is_quoted(self, sd15_plan, source):
        tree = ast.parse(plan_code(replace(sd15_plan, model=replace(sd15_plan.model, source=source))))
        loaded = [node for node in ast.walk(tree) if getattr(node, "attr", "") == "from_pretrained"]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func in loaded]
        assert len(calls) == 4
        assert all(call.args[0].value == source for call in calls)

    def test_a_reason_of_two_lines_stays_a_comment(self, sd15_plan):
        tree = ast.parse(plan_code(replace(sd15_plan, reason="fast\nimport os\nos.remove('x')")))
        assert "os" not in {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}

    def test_names_that_would_be_other_code_are_refused(self, sd15_plan):
        evil = "x; import os; os"
        record = replace(sd15_plan.model.components[0], dtype=evil)
        for plan in (
            replace(sd15_plan, settings=Settings(placement={evil: "resident"})),
            replace(sd15_plan, model=replace(sd15_plan.model, class_name=evil)),
            replace(sd15_plan, model=replace(sd15_plan.model, components=(record,))),
            replace(sd15_plan, machine=replace(sd15_plan.machine, device='cpu"); import os; ("')),
        ):
            with pytest.raises(VramplanError, match="cannot stand in Python code"):
                plan_code(plan)


class TestRunPlan:
    def test_it_says_what_it_does_and_reports_what_it_did(self, small_folder, tmp_path):
        plan = make_plan(small_folder("flux-small"), device="cpu", batch=2)
        said = []
        ran = run_plan(plan, prompt="a fox", output=str(tmp_path / "a.png"), say=said.append)
        assert (said[0], said[-1]) == (f"loading {plan.model.source}", "generating on cpu")
        assert names(tmp_path) == ["a-0.png", "a-1.png"]
        assert ran.written == (tmp_path / "a-0.png", tmp_path / "a-1.png")
        assert (ran.plan, ran.notes) == (plan, ())
        assert 'pipe.vae.to("cpu")' in ran.calls
        assert ran.measured.seconds > 0

    def test_the_same_seed_gives_the_same_picture(self, small_folder, tmp_path):
        plan = make_plan(small_folder("sd15-small"), device="cpu")
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            run_plan(plan, prompt="a fox", seed=seed, output=str(tmp_path / f"{name}.png"), say=lambda _: None)
        first, second, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
        assert first == second
        assert first != other
