"""Plans for repositories of the hub: kilobytes of each, no weight, and one sentence for whatever goes wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import vramplan
from tests.support.hub import COMMIT, Hub, save_sparse, serving, write_header
from vramplan.api.code import plan_code
from vramplan.api.run import model_folder
from vramplan.cli.main import main
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline import hub as hub_module
from vramplan.pipeline import hub_http
from vramplan.pipeline.describe import describe
from vramplan.planfile.file import dump_plan, parse_plan
from vramplan.runtime.download import download_command
from vramplan.units import GIB, MIB

KIND, NAME = "sd15-small", "somebody/sd15-small"
SOURCE = f"hub:{NAME}@{COMMIT}"
CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A hub of its own for the test, with empty caches and nobody logged in."""
    from huggingface_hub import constants

    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_http, "RETRY_PAUSE_S", 0.0)
        monkeypatch.chdir(tmp_path)
        hub_module._repository_at.cache_clear()
        yield hub
        hub_module._repository_at.cache_clear()


@pytest.fixture
def folder(small_folder, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(small_folder(KIND), tmp_path / "repository"))


@pytest.fixture
def repository(online, folder):
    """The hub with that copy in it."""
    online.repositories[NAME] = folder
    return online


@pytest.fixture
def offline(monkeypatch):
    """No network from now on: `offline()`. What this process remembers is gone too."""
    from huggingface_hub import constants

    def go():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub_module._repository_at.cache_clear()

    return go


def quick(model=NAME, **options):
    usual = {"device": MACHINE, "height": 64, "width": 64, "steps": 2, "simulate": False}
    return vramplan.plan(model, **usual | options)


def refused(words, model=NAME, kind=VramplanError, **options):
    with pytest.raises(kind, match=words) as caught:
        describe(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestReading:
    def test_a_repository_is_described_as_its_folder_is(self, repository, folder):
        there, here = describe(NAME), describe(folder)
        assert there.spec.components == here.spec.components
        assert str(there.spec.source) == SOURCE
        assert there.defaults == here.defaults

    def test_it_is_simulated_as_its_folder_is(self, repository, folder):
        there, here = quick(simulate=True), quick(folder, simulate=True)
        assert there.settings == here.settings
        assert there.projected == here.projected
        assert there.projected.basis == "simulated"

    def test_no_weight_and_no_tokenizer_is_read(self, repository, folder):
        write_header(folder / UNET, {"w": ([1 << 30], "F32", 4)})
        describe(NAME)
        assert repository.sent_bytes < MIB
        quick(simulate=True)
        assert not [path for path in repository.asked if path.endswith(("vocab.json", "merges.txt", "tokenizer.json"))]

    def test_a_pipeline_of_12_billion_parameters_takes_5_mib(self, online, tmp_path):
        shards = {"transformer": 3, "text_encoder_2": 2}
        name = "black-forest-labs/FLUX.1-dev"
        online.repositories[name] = save_sparse("flux.1-dev", tmp_path / "flux", lambda part: shards.get(part, 1))
        plan = vramplan.plan(name, device="rtx-4070", height=256, width=256, steps=2)
        assert plan.model.source == f"hub:{name}@{COMMIT}"
        assert sum(record.weight_bytes for record in plan.model.components) > 33e9
        assert not [note for note in plan.notes if "its files hold" in note]
        assert plan.projected.basis == "simulated"
        assert online.sent_bytes < 5 * MIB, f"{online.sent_bytes:,} bytes in {len(online.asked)} requests"

    def test_shards_weigh_what_one_file_weighs(self, online, small_pipeline, folder, tmp_path):
        small_pipeline(KIND).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
        online.repositories[NAME] = tmp_path / "sharded"
        assert [c.weight_bytes for c in describe(NAME).spec.components] == [
            c.weight_bytes for c in describe(folder).spec.components
        ]

    def test_a_header_longer_than_the_first_request_is_read_whole(self, repository, folder):
        write_header(folder / UNET, {f"tensor number {n}": ([1], "F32", 4) for n in range(3000)})
        (note,) = describe(NAME).spec.notes
        assert "unet: its files hold 3,000 elements" in note

    def test_an_empty_file(self, repository, folder):
        (folder / "unet" / "config.json").write_bytes(b"")
        refused("unet/config.json: not readable JSON")

    def test_a_server_without_ranges_is_left_after_the_header(self, repository, folder):
        write_header(folder / UNET, {"w": ([1 << 30], "F32", 4)})
        repository.faults[UNET] = "no-range"
        (note,) = describe(NAME).spec.notes
        assert "1,073,741,824 elements" in note
        assert repository.sent_bytes < 16 * MIB  # what the two sockets hold of it

    def test_the_token_goes_to_the_hub_and_not_to_its_storage(self, repository, monkeypatch):
        repository.gated.add(NAME)
        monkeypatch.setenv("HF_TOKEN", repository.token)
        assert str(describe(NAME).spec.source) == SOURCE
        assert set(repository.storage_tokens) == {""}

    def test_a_workload_comes_from_the_profile_that_lists_the_repository(self, online, folder):
        online.repositories["black-forest-labs/FLUX.1-schnell"] = folder
        assert describe("black-forest-labs/FLUX.1-schnell").defaults["num_inference_steps"] == 4


class TestVariants:
    @pytest.fixture
    def half(self, repository, folder):
        """The UNet in half precision beside the whole one."""
        import torch
        from safetensors.torch import load_file, save_file

        halved = {name: tensor.to(torch.float16) for name, tensor in load_file(folder / UNET).items()}
        save_file(halved, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        return repository

    @pytest.mark.parametrize("local", [False, True])
    def test_its_files_are_taken_where_a_component_has_them(self, half, folder, local):
        spec = describe(folder if local else NAME, variant="fp16").spec
        assert {c.name: (c.dtype, c.variant) for c in spec.components} == {
            "unet": ("float16", "fp16"),
            "vae": ("float32", None),
            "text_encoder": ("float32", None),
        }

    def test_the_plan_keeps_it_and_the_code_has_it(self, half):
        plan = parse_plan(dump_plan(quick(variant="fp16")))
        code = plan_code(plan)
        (line,) = [line for line in code.splitlines() if 'subfolder="unet"' in line]
        assert f'"{NAME}", revision="{COMMIT}"' in line
        assert 'variant="fp16"' in line
        assert code.count("fp16") == 1

    def test_it_is_what_diffusers_loads(self, half, folder):
        from vramplan.runtime.staged import load_applied

        plan = quick(folder, device="cpu", variant="fp16")
        loaded = load_applied(plan, folder, None, say=lambda text: None)
        assert str(loaded.applied.pipe.unet.dtype) == "torch.float16"

    def test_shards_of_a_variant(self, repository, folder, small_pipeline):
        small_pipeline(KIND).unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="200KB")
        assert describe(NAME, variant="fp16").spec.component("unet").variant == "fp16"

    def test_one_that_is_not_there_names_those_that_are(self, half):
        assert "it has fp16" in refused("no component has weights of variant 'bf16'", variant="bf16")

    def test_a_component_with_nothing_else_says_so(self, half, folder):
        (folder / UNET).unlink()
        refused('unet has weights of variant fp16 only: pass `variant="fp16"`')


class TestCaches:
    def test_what_was_read_serves_without_a_network(self, repository, offline):
        first = quick()
        offline()
        assert quick().model == first.model
        assert quick(first.model.source).model == first.model

    def test_a_commit_is_asked_for_once(self, repository):
        first = quick()
        hub_module._repository_at.cache_clear()
        repository.asked.clear()
        assert quick(first.model.source).model == first.model
        assert repository.asked == []

    def test_a_hub_that_is_gone_is_no_reason_to_fail(self, repository):
        first = quick()
        repository.faults["/"] = 503
        hub_module._repository_at.cache_clear()
        assert quick().model == first.model

    def test_a_damaged_entry_is_read_again(self, repository, tmp_path):
        first = quick()
        for path in (tmp_path / "cache" / "hub").iterdir():
            path.write_text('{"start": 5')
        hub_module._repository_at.cache_clear()
        assert quick().model == first.model

    def test_the_hubs_own_cache_serves_too(self, online, folder, tmp_path, offline):
        from_download(tmp_path, folder)
        offline()
        assert quick().model.source == SOURCE
        assert online.asked == []

    def test_offline_with_nothing_kept(self, repository, offline):
        offline()
        refused("no such folder, no pipeline profile lists it, and .*HF_HUB_OFFLINE is set", kind=UsageError)
        assert repository.asked == []

    @pytest.mark.parametrize("reason", ["offline", "gated", "gone"])
    def test_the_profile_that_lists_a_repository_stands_in_for_it(self, online, folder, offline, reason):
        name = "black-forest-labs/FLUX.1-dev"
        if reason == "offline":
            offline()
        if reason == "gated":
            online.repositories[name] = folder
            online.gated.add(name)
        plan = quick(name, height=1024, width=1024)
        assert plan.model.source == "profile:flux.1-dev"
        (note,) = [note for note in plan.notes if "the repository was not read" in note]
        assert {"offline": "HF_HUB_OFFLINE", "gated": "accept its terms", "gone": "log in"}[reason] in note

    def test_a_profile_cannot_stand_in_for_a_revision(self, online):
        refused("log in", "black-forest-labs/FLUX.1-dev", revision="refs/pr/1")


def from_download(tmp_path, folder):
    """The folder as `hf download` leaves it in the hub's cache."""
    cache = tmp_path / "hub-cache" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(folder, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    return cache / "snapshots" / COMMIT


class TestApplying:
    def test_the_weights_come_from_the_hubs_cache(self, repository, folder, tmp_path):
        plan = quick()
        place = from_download(tmp_path, folder)
        assert model_folder(plan, None) == place

    def test_without_them_the_command_to_download_is_told_and_nothing_is(self, repository, tmp_path):
        plan = quick()
        repository.asked.clear()
        with pytest.raises(VramplanError, match=f"hf download {NAME} --revision {COMMIT} --include"):
            model_folder(plan, None)
        assert repository.asked == []

    def test_the_command_downloads_all_that_loading_takes(self, repository, folder, tmp_path):
        from diffusers import DiffusionPipeline
        from huggingface_hub.utils import filter_repo_objects

        plan = quick()
        (folder / "whole-pipeline.safetensors").write_bytes(b"")
        words = shlex.split(download_command(plan, plan.model.origin))
        wanted = [words[place + 1] for place, word in enumerate(words) if word == "--include"]
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        kept = set(filter_repo_objects(files, allow_patterns=wanted))
        assert "whole-pipeline.safetensors" not in kept
        for path in files - kept:
            (folder / path).unlink()
        place = from_download(tmp_path, folder)
        assert model_folder(plan, None) == place
        DiffusionPipeline.from_pretrained(place, local_files_only=True, use_safetensors=True)

    @pytest.mark.parametrize(("part", "words"), [(UNET, "its unet are not"), ("tokenizer", "its tokenizer is not")])
    def test_half_a_download_is_none(self, repository, folder, tmp_path, part, words):
        plan = quick()
        missing = from_download(tmp_path, folder) / part
        shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
        with pytest.raises(VramplanError, match=f"{words} in the hub's cache; download it with: hf download"):
            model_folder(plan, None)

    def test_the_code_names_the_commit(self, repository):
        assert f'"{NAME}", revision="{COMMIT}"' in plan_code(quick())

    def test_a_plan_is_simulated_and_made_again_from_what_it_names(self, repository, tmp_path):
        from vramplan.api.check import replanned
        from vramplan.api.simulate import simulate_plan

        plan = quick()
        (tmp_path / "plan.yaml").write_text(dump_plan(plan))
        assert simulate_plan(tmp_path / "plan.yaml").fits
        assert replanned(quick(device="cpu")).model == plan.model

    def test_the_command_line_from_plan_to_picture(self, repository, folder, tmp_path, monkeypatch):
        """Planned in a process of its own, which finds the hub by its environment."""
        from huggingface_hub import constants

        environment = os.environ | {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": repository.url,
            "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        }

        sizes = ("--height", "64", "--width", "64", "--steps", "2", "--device", "cpu")
        command = [sys.executable, "-m", "vramplan", "plan", NAME, "--revision", "main", *sizes, "-o", "plan.yaml"]
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        assert SOURCE in (tmp_path / "plan.yaml").read_text()
        monkeypatch.chdir(tmp_path)
        apply = ["apply", "plan.yaml", "--prompt", "a fox", "-o", "fox.png"]
        failed = CliRunner().invoke(main, apply)
        assert failed.exit_code == 1
        assert failed.stderr.splitlines()[-1].startswith(f"vramplan: {NAME}: it is not in the hub's cache; download")
        from_download(tmp_path, folder)
        applied = CliRunner().invoke(main, apply)
        assert applied.exit_code == 0, applied.output
        assert (tmp_path / "fox.png").is_file()


class TestRefusals:
    def test_a_repository_that_is_not_there(self, online):
        refused("nobody/nothing: no such folder, and no such repository on the hub", "nobody/nothing")

    def test_a_revision_that_is_not_there(self, repository):
        refused("has no such revision", revision="v9")

    def test_a_gated_one_without_and_with_the_wrong_token(self, repository, monkeypatch):
        repository.gated.add(NAME)
        assert "hf auth login" in refused(f"{NAME} is gated: accept its terms at {repository.url}/{NAME}")
        monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
        refused("is gated: accept its terms")

    def test_a_token_that_is_none(self, repository):
        repository.faults["/api/"] = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        refused("the hub does not accept your token")

    def test_too_many_requests_are_waited_for_once(self, repository):
        repository.faults["/api/"] = [(429, {"Retry-After": "0"})]
        assert str(describe(NAME).spec.source) == SOURCE

    def test_too_many_requests_for_long_are_told(self, repository):
        repository.faults["/api/"] = (429, {"Retry-After": "300"})
        refused(r"the hub answers 429 \(too many requests\); try again in 300 s")
        assert len(repository.asked) == 1

    def test_an_error_of_the_hubs_own_is_tried_twice(self, repository):
        repository.faults["/api/"] = 503
        refused("the hub answers 503")
        assert len(repository.asked) == 2

    @pytest.mark.parametrize("part", ["/api/", "unet/config.json", UNET])
    def test_an_answer_that_breaks_off(self, repository, part):
        repository.faults[part] = "cut"
        refused("breaks off|cannot be reached")

    def test_an_answer_that_broke_off_once_is_asked_for_again(self, repository):
        repository.faults[UNET] = ["cut"]
        assert str(describe(NAME).spec.source) == SOURCE

    @pytest.mark.parametrize("part", ["/api/", "unet/config.json", UNET])
    def test_an_answer_that_drips(self, repository, part, monkeypatch):
        monkeypatch.setattr(hub_http, "ANSWER_TIMEOUT_S", 0.2)
        repository.faults[part] = "slow"
        refused("too slow")

    def test_nobody_there(self, online, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        refused("the hub cannot be reached")

    def test_a_redirect_without_end(self, repository):
        repository.faults[UNET] = (302, {"Location": "/" + NAME + "/resolve/x/" + UNET})
        refused("the hub cannot be reached")

    @pytest.mark.parametrize("answer", [b"", b"[]", b'{"sha": "main", "siblings": []}', b'{"sha": 5}', b"[" * 100_000])
    def test_a_list_that_is_none(self, online, tmp_path, monkeypatch, answer):
        monkeypatch.setattr(hub_module, "get_start", lambda url, count, *, repo_id: (answer, len(answer)))
        refused("the hub's list of its files cannot be read")

    def test_no_index(self, repository, folder):
        (folder / "model_index.json").unlink()
        refused(f"{NAME} has no model_index.json")

    def test_a_file_without_a_pipeline_around_it_is_read_by_its_header(self, online, tmp_path):
        online.repositories["somebody/lora"] = tmp_path / "lora"
        (tmp_path / "lora").mkdir()
        write_header(tmp_path / "lora" / "style.safetensors", {"lora.weight": ([1 << 30], "BF16", 2)})
        name = "somebody/lora/style.safetensors"
        assert name in refused("somebody/lora has no model_index.json", "somebody/lora")
        refused(f"{name}: its 1 tensors belong to no checkpoint that diffusers knows", name)
        refused("other.safetensors is missing", "somebody/lora/other.safetensors")
        assert online.sent_bytes < MIB

    def test_a_class_of_somebodys_own_is_not_run(self, repository, folder):
        edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
        (folder / "pipeline.py").write_text("raise SystemExit('it ran')")
        refused("is not a pipeline class of diffusers")

    def test_a_component_of_somebodys_own_is_not_run(self, repository, folder):
        edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])
        (folder / "unet" / "my_unet.py").write_text("raise SystemExit('it ran')")
        refused("my_unet.MyUNet is not a class of diffusers or transformers")
        assert not [path for path in repository.asked if path.endswith(".py")]

    @pytest.mark.parametrize("name", ["../../etc", "a/b", "/etc", ".", "", "unet\\..", "un et"])
    @pytest.mark.parametrize("local", [False, True])
    def test_a_component_whose_name_leads_elsewhere(self, repository, folder, name, local):
        edit(folder / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
        refused("is not a component name", folder if local else NAME)

    @pytest.mark.parametrize(
        "shard",
        [
            "../../secret.safetensors",
            "/etc/passwd",
            "a\\b.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ],
    )
    @pytest.mark.parametrize("local", [False, True])
    def test_a_shard_that_leads_elsewhere_or_to_its_own_index(self, repository, folder, shard, local):
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": shard}}))
        refused("which is not a safetensors file in the same folder", folder if local else NAME)

    def test_a_missing_shard(self, repository, folder):
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
        refused("names gone.safetensors, which is missing")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"1234",
            struct.pack("<Q", 1 << 62) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 2) + b"{]",
            *(
                struct.pack("<Q", len(text)) + text
                for text in (
                    b"[" * 50_000,
                    b'{"w": 5}',
                    b'{"w": {"dtype": "F32", "shape": [1]}}',
                    b'{"w": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
                    b'{"w": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}}',
                    b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}',
                    b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
                    b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
                )
            ),
        ],
    )
    def test_a_damaged_header(self, repository, folder, content):
        (folder / UNET).write_bytes(content)
        assert UNET in refused("not a readable safetensors file")

    def test_tensors_of_terabytes_that_are_not_there(self, repository, folder):
        write_header(folder / UNET, {"w": ([1 << 10, 1 << 10], "F32", 4)})
        text = b'{"w": {"dtype": "F32", "shape": [4398046511104], "data_offsets": [0, 17592186044416]}}'
        (folder / UNET).write_bytes(struct.pack("<Q", len(text)) + text)
        refused("the file ends before its tensors do")

    def test_a_header_beyond_measure(self, repository, folder):
        with (folder / UNET).open("wb") as file:
            file.write(struct.pack("<Q", 26_000_000))
            file.truncate(1 << 30)
        refused("a header of 26,000,000 bytes")
        assert repository.sent_bytes < MIB

    def test_a_configuration_beyond_measure(self, repository, folder):
        with (folder / "unet" / "config.json").open("wb") as file:
            file.truncate(1 << 40)
        refused("are no configuration")

    def test_more_shards_than_any_pipeline_has(self, repository, folder, monkeypatch):
        monkeypatch.setattr(hub_module, "_MAX_READ_BYTES", 1 << 20)
        shards = [f"{n}.safetensors" for n in range(20)]
        for shard in shards:
            write_header(folder / "unet" / shard, {"w": ([1 << 20], "F32", 4)})
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
        refused("that is no pipeline")

    def test_a_configuration_that_no_class_takes(self, repository, folder):
        edit(folder / "unet" / "config.json", block_out_channels="many")
        refused("unet/config.json: no UNet2DConditionModel can be built from it")

    @pytest.mark.parametrize("options", [{"revision": "main"}, {"variant": "fp16", "revision": "main"}])
    def test_a_folder_has_no_revision(self, folder, options):
        refused("a local folder has none to choose from", folder, **options)

    @pytest.mark.parametrize("name", ["hub:", "hub:nobody", "hub:a/b", "hub:../x@1", "hub:a/b/c@1"])
    def test_a_source_that_is_none(self, online, name):
        refused("write hub:owner/name@revision", name)
        assert online.asked == []
