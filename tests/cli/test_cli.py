"""The command line: what scripts and people rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from vramplan._version import __version__
from vramplan.api.plan import plan as make_plan
from vramplan.cli.main import main
from vramplan.cli.shared import spell_flags
from vramplan.planfile.file import dump_plan, load_plan, parse_plan

SMALL = ("--height", "64", "--width", "64", "--steps", "2")
VIDEO = (*SMALL, "--frames", "9")
CARD = ("--vram", "6GiB", "--device", "rtx-4070")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sd15(small_folder):
    return str(small_folder("sd15-small"))


@pytest.fixture
def plan_file(sd15, here):
    ok("plan", sd15, "--device", "cpu", *SMALL, "-o", "plan.yaml")
    return "plan.yaml"


@pytest.fixture
def card_plan(sd15, here):
    ok("plan", sd15, *CARD, *SMALL, "-o", "card.yaml")
    return "card.yaml"


def call(*args, **env):
    return CliRunner().invoke(main, [str(arg) for arg in args], env=env)


def ok(*args, **env):
    result = call(*args, **env)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    return result


def failed(code, *args, **env):
    """The one line on stderr with which it failed; nothing on stdout."""
    result = call(*args, **env)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("vramplan: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def process(*args, python=("-m", "vramplan"), **env):
    command = [sys.executable, *python, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=120, check=False)


class TestImports:
    HEAVY = ("torch", "diffusers", "transformers", "pydantic", "yaml", "accelerate", "rich")

    def loaded(self, code):
        listing = f"{code}\nimport sys; print([n for n in {self.HEAVY} if n in sys.modules], file=sys.stderr)"
        done = process(python=("-c", listing))
        assert done.returncode == 0, done.stderr
        return done

    def test_importing_vramplan_imports_nothing_heavy(self):
        assert self.loaded("import vramplan").stderr == "[]\n"

    def test_detect_answers_without_torch(self):
        done = self.loaded("from vramplan.cli.main import main; main(['detect', '--json'])")
        assert done.stderr == "[]\n"
        assert json.loads(done.stdout)["schema_version"] == 1


def test_what_libraries_say_while_they_are_imported_is_not_in_the_way(sd15):
    """torchao and bitsandbytes are installed beside the tests, and talk of kernels that they miss."""
    done = process("plan", sd15, "--device", "cpu", *SMALL, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["candidates"]


class TestVersionAndHelp:
    def test_as_a_module(self):
        done = process("--version")
        assert (done.returncode, done.stderr) == (0, "")
        assert __version__ in done.stdout

    def test_every_command_of_the_contract_has_help(self):
        names = set(main.commands)
        assert names >= {"detect", "plan", "explain", "apply", "check", "code", "profiles"}
        for name in names:
            assert ok(name, "--help").stdout.startswith("Usage: ")

    def test_without_a_command_the_help_is_talk_and_no_error_line(self):
        result = call()
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("Usage: ")

    def test_the_exit_codes_are_in_the_help(self):
        help_text = " ".join(ok("--help").stdout.split())
        assert "0 done, 1 error, 2 usage, 3 nothing fits, 4 the plan does not match" in help_text


class TestDetect:
    def test_json_has_the_keys_scripts_rely_on(self):
        found = json.loads(ok("detect", "--json").stdout)
        assert {"schema_version", "accelerators", "host", "budget"} <= set(found)
        assert {"total_bytes", "available_bytes", "limit_bytes", "limit_source", "disk_free_bytes"} <= set(
            found["host"]
        )
        assert set(found["budget"]) == {"vram_bytes", "ram_bytes", "disk_bytes", "deductions", "kinds"}

    def test_an_accelerator_has_the_keys_scripts_rely_on(self):
        (card,) = json.loads(ok("detect", "--json", "--device", "rtx-4070").stdout)["accelerators"]
        assert {"kind", "index", "name", "uuid", "total_bytes", "free_bytes"} <= set(card)
        assert isinstance(card["total_bytes"], int)

    def test_yaml_holds_the_same_as_json(self):
        as_json = json.loads(ok("detect", "--json", "--device", "rtx-4070").stdout)
        as_yaml = yaml.safe_load(ok("detect", "--format", "yaml", "--device", "rtx-4070").stdout)
        assert as_yaml["accelerators"] == as_json["accelerators"]
        assert set(as_yaml) == set(as_json)

    def test_for_people_it_says_what_may_be_used(self):
        text = ok("detect", "--device", "rtx-4070", "--vram", "8GiB").stdout
        assert "RTX 4070" in text
        assert "VRAM    8.00 GiB" in text

    def test_output_is_written_as_yaml_beside_the_data(self, here):
        data = json.loads(ok("detect", "--json", "-o", "hardware.yaml").stdout)
        assert (
            yaml.safe_load((here / "hardware.yaml").read_text())["host"]["total_bytes"] == data["host"]["total_bytes"]
        )


class TestPlan:
    def test_json_is_data_and_the_talk_is_on_stderr(self, sd15, here):
        result = ok("plan", sd15, "--device", "cpu", *SMALL, "--json", "-o", "plan.yaml")
        data = json.loads(result.stdout)
        assert result.stderr == "wrote plan.yaml\n"
        assert data["settings"] == json.loads(json.dumps(yaml.safe_load((here / "plan.yaml").read_text())["settings"]))

    def test_json_has_the_keys_scripts_rely_on(self, sd15):
        data = json.loads(ok("plan", sd15, *CARD, *SMALL, "--json").stdout)
        keys = {"vram_allocated_bytes", "vram_reserved_bytes", "ram_bytes", "pinned_bytes", "disk_bytes"}
        keys |= {"seconds_per_step", "seconds_per_call", "bottleneck", "basis"}
        keys |= {"seconds_per_step_range", "seconds_per_call_range"}
        assert keys <= set(data["projected"])
        for candidate in data["candidates"]:
            assert set(candidate) == {"settings", "verdict", "reason", "projected"}
            assert set(candidate["projected"]) == keys
        assert data["candidates"][0]["verdict"] == "chosen"
        assert data["candidates"][0]["settings"] == data["settings"]

    def test_yaml_on_stdout_is_the_plan_file(self, sd15):
        result = ok("plan", sd15, *CARD, *SMALL, "--format", "yaml")
        assert parse_plan(result.stdout).workload.height == 64
        assert result.stderr == ""

    def test_quiet_is_without_talk(self, sd15, here):
        assert ok("-q", "plan", sd15, *CARD, *SMALL, "-o", "plan.yaml").stderr == ""
        assert (here / "plan.yaml").exists()

    def test_without_output_nothing_is_written(self, sd15, here):
        ok("plan", sd15, *CARD, *SMALL)
        assert list(here.iterdir()) == []

    def test_sizes_and_settings_reach_the_plan(self, sd15):
        options = ("--height", 128, "--width", 72, "--batch", 2, "--steps", 3, "--dtype", "bf16")
        fixed = ("--set", "placement.unet=group_offload:type=leaf", "--set", "decode=vae_slicing")
        data = json.loads(ok("plan", sd15, *CARD, *options, *fixed, "--json").stdout)
        work = data["workload"]
        assert (work["height"], work["width"], work["num_images_per_prompt"]) == (128, 72, 2)
        assert work["num_inference_steps"] == 3
        assert {part["dtype"] for part in data["model"]["components"]} == {"bfloat16"}
        assert data["settings"]["placement"]["unet"] == "group_offload:type=leaf"
        assert data["settings"]["decode"] == ["vae_slicing"]

    def test_a_bundled_profile_needs_no_weights(self):
        data = json.loads(ok("plan", "stable-diffusion-1.5", "--device", "cpu", "--json").stdout)
        assert data["model"]["source"] == "profile:stable-diffusion-1.5"

    def test_every_option_can_come_from_the_environment(self, sd15):
        env = {"VRAMPLAN_PLAN_DEVICE": "cpu", "VRAMPLAN_PLAN_HEIGHT": "96", "VRAMPLAN_PLAN_FORMAT": "json"}
        env |= {"VRAMPLAN_PLAN_SET": "placement=resident decode=vae_slicing"}
        data = json.loads(ok("plan", sd15, **env).stdout)
        assert data["machine"]["device"] == "cpu"
        assert data["workload"]["height"] == 96
        assert data["settings"]["decode"] == ["vae_slicing"]

    def test_an_option_given_wins_over_the_environment(self):
        env = {"VRAMPLAN_DETECT_DEVICE": "rtx-4070", "VRAMPLAN_DETECT_VRAM": "5GiB", "VRAMPLAN_DETECT_JSON": "1"}
        assert json.loads(ok("detect", **env).stdout)["budget"]["vram_bytes"] == 5 << 30
        assert json.loads(ok("detect", "--vram", "4GiB", **env).stdout)["budget"]["vram_bytes"] == 4 << 30

    def test_no_colour_and_no_terminal_means_plain_text(self, sd15):
        assert "\x1b" not in ok("plan", sd15, *CARD, *SMALL, NO_COLOR="1").stdout


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "code", "words"),
        [
            (("--vram", "0"), 2, "give more than 0"),
            (("--vram", "nonsense"), 2, "write it like 12GiB"),
            (("--vram", "200%", "--device", "rtx-4070"), 2, "between 0% and 100%"),
            (("--vram", "9999GiB", "--device", "rtx-4070"), 2, "has"),
            (("--ram", "-9999GiB"), 2, "nothing is left"),
            (("--margin", "lots", "--device", "rtx-4070"), 2, "not a size"),
            (("--vram", "1KiB"), 3, "short by"),
            (("--ram", "1KiB", "--device", "cpu"), 3, "short by"),
            (("--height", "0"), 2, "height must be a whole number from 1"),
            (("--height", "-8"), 2, "height must be a whole number from 1"),
            (("--height", "abc"), 2, "'abc' is not a valid integer"),
            (("--steps", "0"), 2, "num_inference_steps must be"),
            (("--dtype", "int3"), 2, "float32, float16, bfloat16"),
            (("--device", "rtx-9999"), 2, "did you mean"),
            (("--allow", "anything"), 2, "lossless"),
            (("--set", "nonsense"), 2, "write AXIS=SETTING"),
            (("--set", "="), 2, "write AXIS=SETTING"),
            (("--set", "placement="), 2, "write AXIS=SETTING"),
            (("--set", "=resident"), 2, "write AXIS=SETTING"),
            (("--set", "place=resident"), 2, "the axes are weights.COMPONENT, attention.COMPONENT, placement"),
            (("--set", "placement=residen"), 2, "did you mean resident"),
            (("--set", "placement.foo=resident"), 2, "has no foo, only"),
            (("--set", "placement.unet=model_cpu_offload"), 2, "for the whole pipeline"),
            (("--set", "placement.unet=group_offload:type=row"), 2, "use one of block, leaf"),
            (("--set", "placement.unet=group_offload:blocks=0", "--vram", "6GiB"), 2, "at least one block"),
            (("--set", "decode=vae_tiling:tile=abc"), 2, "a whole number is needed"),
            (("--set", "decode=vae_tiling:tile=33"), 2, "do not overlap evenly"),
            (("--stock", "--set", "placement.text_encoder=encode_first"), 2, "vramplan's own, and --stock leaves"),
            (("--set", "decode.vae=plain"), 2, "the axes are weights.COMPONENT, attention.COMPONENT, placement"),
            (("--nonsense",), 2, "No such option"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
    )
    def test_an_option_that_makes_no_sense_is_one_line_and_leaves_no_file(self, sd15, here, args, code, words):
        assert words in failed(code, "plan", sd15, *args, "-o", "plan.yaml")
        assert list(here.iterdir()) == []

    def test_what_is_no_pipeline(self, here):
        (here / "empty").mkdir()
        (here / "file.txt").write_text("x")
        assert "has no model_index.json" in failed(1, "plan", "./empty")
        assert "no such folder" in failed(1, "plan", "./none")
        failed(1, "plan", "file.txt")
        assert "no such folder, and no pipeline profile" in failed(2, "plan", "no-such-model")

    def test_an_output_into_a_missing_folder(self, sd15, here):
        for command in (("plan", sd15, *CARD), ("detect",)):
            assert "its folder does not exist" in failed(2, *command, "-o", "missing/x.yaml")
        assert list(here.iterdir()) == []

    def test_an_unknown_command_or_a_missing_argument(self):
        assert "nonsense" in failed(2, "nonsense")
        assert "MODEL" in failed(2, "plan")

    @pytest.mark.parametrize("command", ["explain", "check", "code", "apply"])
    def test_a_file_that_is_no_plan(self, here, command):
        (here / "bad.yaml").write_text("schema_version: 1\nmodel: 3\n")
        (here / "binary").write_bytes(b"\x89PNG\xff")
        assert "bad.yaml: vramplan_version is missing" in failed(1, command, "bad.yaml")
        assert "not text" in failed(1, command, "binary")
        assert "cannot be read" in failed(1, command, "missing.yaml")
        (here / "hardware.yaml").write_text("schema_version: 1\naccelerators: []\nhost: {}\n")
        assert "a machine, not a plan: vramplan plan MODEL with --device hardware.yaml" in failed(
            1, command, "hardware.yaml"
        )


class TestFailures:
    def fails_with(self, monkeypatch, error):
        def fails(*_, **__):
            raise error

        monkeypatch.setattr("vramplan.api.plan.plan", fails)

    def test_an_unexpected_error_is_one_line_with_its_name(self, monkeypatch):
        self.fails_with(monkeypatch, ValueError("two\nlines"))
        assert failed(1, "plan", "a/x") == "vramplan: ValueError: two lines\n"

    def test_an_interrupt_is_no_traceback(self, monkeypatch):
        self.fails_with(monkeypatch, KeyboardInterrupt())
        result = call("plan", "a/x")
        assert result.exit_code == 130
        assert result.stderr.strip() == "vramplan: interrupted"

    def test_debug_adds_the_traceback_and_keeps_line_and_code(self, sd15):
        result = call("plan", sd15, "--vram", "0", VRAMPLAN_DEBUG="1")
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("vramplan: vram 0: nothing is left")


class TestExplain:
    def test_every_candidate_with_its_reason(self, card_plan):
        plan = load_plan(card_plan)
        text = ok("explain", card_plan).stdout
        assert text.startswith(f"{len(plan.candidates)} candidates for StableDiffusionPipeline")
        for item in plan.candidates:
            assert spell_flags(item.reason, main) in text

    def test_json(self, card_plan):
        data = json.loads(ok("explain", card_plan, "--json").stdout)
        assert data["schema_version"] == 2
        assert data["stock"] is None
        assert data["candidates"][0]["verdict"] == "chosen"


class TestCheck:
    def test_a_plan_that_fits_this_machine(self, plan_file):
        assert ok("check", plan_file).stdout.startswith("the plan fits: it needs ")

    def test_a_plan_for_a_card_that_is_not_here(self, card_plan):
        assert "which this machine does not have" in failed(4, "check", card_plan)

    def test_a_plan_that_needs_more_than_there_is(self, plan_file, here):
        content = yaml.safe_load((here / plan_file).read_text())
        content["projected"]["ram_bytes"] = 1 << 50
        (here / plan_file).write_text(yaml.safe_dump(content))
        assert "no longer fits: it needs 1048576.00 GiB of" in failed(4, "check", plan_file)


class TestCode:
    def test_it_is_a_script_that_makes_the_same_picture(self, sd15, small_pipeline):
        import torch

        from tests.support.calls import call_kwargs, output_tensor

        fixed = ("--set", "placement.unet=group_offload:type=leaf", "--set", "decode=vae_slicing")
        ok("plan", sd15, *CARD, *SMALL, *fixed, "-o", "plan.yaml")
        script = ok("code", "plan.yaml").stdout
        assert 'torch.device("cuda:0")' in script
        names = {}
        exec(script.replace("cuda:0", "cpu"), names)
        pipe = names["pipe"]
        pipe.set_progress_bar_config(disable=True)
        assert pipe.vae.use_slicing
        picture = output_tensor(pipe(**call_kwargs("sd15-small")))
        assert torch.equal(picture, output_tensor(small_pipeline("sd15-small")(**call_kwargs("sd15-small"))))

    def test_with_stock_it_is_the_stock_plan_with_the_call(self, sd15):
        ok("plan", sd15, *CARD, *SMALL, "--set", "placement.text_encoder=encode_first", "-o", "plan.yaml")
        script = ok("code", "plan.yaml", "--stock").stdout
        compile(script, "script", "exec")
        assert "\n# stock: " in script
        assert "\nresult = pipe(prompt=prompt, height=64, width=64, " in script

    def test_where_no_stock_plan_fits_the_exit_code_is_3(self):
        made = make_plan("stable-diffusion-xl", device="rtx-4090", vram="3GiB", ram="1GiB", simulate=False)
        Path("plan.yaml").write_text(dump_plan(made))
        assert "no stock plan: nothing fits" in failed(3, "code", "plan.yaml", "--stock")

    def test_of_a_profile_it_loads_from_the_hub_id(self):
        ok("plan", "stable-diffusion-1.5", "--device", "cpu", "-o", "plan.yaml")
        script = ok("code", "plan.yaml").stdout
        compile(script, "script", "exec")
        assert (
            'from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", subfolder="unet", dtype=torch.float16)'
            in script
        )


class TestApply:
    def test_without_a_prompt_it_loads_applies_and_says_so(self, plan_file):
        result = ok("apply", plan_file)
        assert result.stdout.startswith("pipeline  StableDiffusionPipeline (")
        assert '\n  pipe.unet.to("cpu")\n' in result.stdout
        assert "nothing generated: give --prompt" in result.stdout
        assert result.stderr.startswith("loading ")

    def test_quiet_is_without_talk(self, plan_file):
        assert ok("-q", "apply", plan_file).stderr == ""

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("-o", "out.png"), "--output needs --prompt"),
            (("--prompt", "x", "-o", "out.mp4"), "must end in .png"),
            (("--prompt", "x", "-o", "out"), "must end in .png"),
            (("--prompt", "x", "-o", "missing/out.png"), "its folder does not exist"),
        ],
    )
    def test_an_output_that_cannot_be_is_refused_before_loading(self, plan_file, here, args, words):
        assert words in failed(2, "apply", plan_file, *args)
        assert [path.name for path in here.iterdir()] == [plan_file]

    def test_a_video_is_no_picture(self, small_folder):
        ok("plan", small_folder("cogvideox-small"), "--device", "cpu", *VIDEO, "-o", "plan.yaml")
        assert "must end in .mp4, .gif" in failed(2, "apply", "plan.yaml", "--prompt", "x", "-o", "out.png")

    def test_a_plan_for_a_card_that_is_not_here_is_refused_before_loading(self, card_plan):
        assert "which this machine does not have" in failed(4, "apply", card_plan)

    def test_a_plan_of_a_profile_needs_the_folder(self, sd15):
        ok("plan", "stable-diffusion-1.5", "--device", "cpu", "-o", "plan.yaml")
        assert "give --model FOLDER" in failed(2, "apply", "plan.yaml")
        result = call("apply", "plan.yaml", "--model", sd15)
        assert result.exit_code == 4
        assert "safety_checker is in the plan, not in this pipeline" in result.stderr

    def test_another_folder_can_be_given(self, plan_file, small_folder, sd15):
        assert "applied to the pipeline" in ok("apply", plan_file, "--model", sd15).stdout
        result = call("apply", plan_file, "--model", small_folder("sdxl-small"))
        assert result.exit_code == 4
        assert "this is a StableDiffusionXLPipeline" in result.stderr
        assert call("apply", plan_file, "--model", "missing").exit_code == 1

    def test_end_to_end_a_picture(self, sd15, here):
        from PIL import Image

        ok("plan", sd15, "--device", "cpu", *SMALL, "-o", "plan.yaml")
        done = process("apply", "plan.yaml", "--prompt", "a red fox", "-o", "out.png")
        assert done.returncode == 0, done.stderr
        self.check_report(done)
        assert "\nwrote     out.png\n" in done.stdout
        with Image.open(here / "out.png") as image:
            image.load()
            assert image.size == (64, 64)
        assert sorted(path.name for path in here.iterdir()) == ["out.png", "plan.yaml"]

    def test_end_to_end_a_video(self, small_folder, here):
        import imageio.v3 as imageio

        ok("plan", small_folder("cogvideox-small"), "--device", "cpu", *VIDEO, "-o", "plan.yaml")
        done = ok("apply", "plan.yaml", "--prompt", "a red fox", "--seed", "3", "-o", "out.mp4")
        self.check_report(done)
        assert imageio.imread(here / "out.mp4").shape == (9, 64, 64, 3)
        assert sorted(path.name for path in here.iterdir()) == ["out.mp4", "plan.yaml"]

    def check_report(self, done):
        assert next(line for line in done.stdout.splitlines() if line.startswith("took ")).endswith(" s")
        header = next(line for line in done.stdout.splitlines() if "projected" in line)
        assert header.split() == ["projected", "measured", "difference"]
        rows = {
            line[:6].strip(): line[6:].split()
            for line in done.stdout.splitlines()
            if line.startswith(("RAM ", "a call "))
        }
        assert len(rows["RAM"]) == 5  # two sizes with their units, and the difference
        assert len(rows["a call"]) == 4
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == "generating on cpu"


class TestSimulate:
    KEYS = ("peak_allocated_bytes", "peak_reserved_bytes", "host_peak_bytes", "pinned_peak_bytes", "phases")
    KEYS += ("fits", "capacity_bytes", "wall_seconds", "schema_version")
    PHASE = ("name", "peak_allocated_bytes", "weights_bytes", "activation_bytes", "workspace_bytes")
    PHASE += ("module", "operation")

    def test_json_has_the_keys_scripts_rely_on(self, sd15):
        data = json.loads(ok("simulate", sd15, *CARD, *SMALL, "--json").stdout)
        assert set(self.KEYS) <= set(data)
        assert all(set(self.PHASE) <= set(phase) for phase in data["phases"])
        assert data["fits"] is True
        assert data["capacity_bytes"] == 6 << 30
        assert data["peak_reserved_bytes"] >= data["peak_allocated_bytes"] > 0

    def test_a_setting_reaches_it_from_the_environment_too(self, sd15):
        model = ("simulate", sd15, *CARD, *SMALL, "--json")
        option = json.loads(ok(*model, "--set", "placement=model_cpu_offload").stdout)
        variable = json.loads(ok(*model, VRAMPLAN_SIMULATE_SET="placement=model_cpu_offload").stdout)
        plain = json.loads(ok(*model).stdout)
        assert option["phases"] == variable["phases"] != plain["phases"]

    def test_where_it_does_not_fit_the_data_is_still_data_and_the_exit_code_is_3(self, sd15):
        result = call("simulate", sd15, "--vram", "1MiB", *SMALL, "--json")
        assert result.exit_code == 3
        assert json.loads(result.stdout)["fits"] is False
        assert result.stderr.count("\n") == 1
        assert "out of memory" in result.stderr

    def test_it_names_the_blocks_that_stay_as_a_plan_does(self, sd15):
        settings = ("--set", "placement.unet=weight_streaming:streamed=3,keep=1")
        told = ok("simulate", sd15, *CARD, *SMALL, *settings).stdout
        planned = ok("plan", sd15, *CARD, *SMALL, *settings).stdout
        stay = next(line for line in told.splitlines() if line.startswith("stay"))
        assert "unet: 1 in encode" in stay
        assert stay.split() in [line.split() for line in planned.splitlines()]
        assert "stay " not in ok("simulate", sd15, *CARD, *SMALL).stdout

    def test_a_plan_file_is_simulated_as_it_stands(self, card_plan):
        assert json.loads(ok("simulate", card_plan, "--json").stdout)["fits"] is True
        assert "a plan file says that already" in failed(2, "simulate", card_plan, "--height", "64")


class TestProfiles:
    def test_list_names_what_plan_takes(self):
        text = ok("profiles", "list").stdout
        assert "  cogvideox-5b\n" in text
        assert "  rtx-4070\n" in text

    def test_show_prints_the_facts_with_their_sources(self):
        for name in ("cogvideox-5b", "rtx-4070"):
            facts = yaml.safe_load(ok("profiles", "show", name).stdout)
            assert facts["name"] == name
            assert "source" in json.dumps(facts)

    @pytest.mark.parametrize("name", ["nonsense", "../profiles/devices/rtx-4070", ""])
    def test_an_unknown_one_is_refused(self, name):
        assert "no pipeline profile" in failed(2, "profiles", "show", name)
