"""The page's server, its choices and what its worker answers, without a browser."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from click.testing import CliRunner

import vramplan
from vramplan.cli.main import main
from vramplan.errors import UsageError, VramplanError

pytest.importorskip("dash", reason="vramplan[ui] is not installed")

from vramplan.ui.choices import Choices, Selection, check_selection, find_choices
from vramplan.ui.serve import Worker, can_open_browser, guard
from vramplan.ui.work import _answer_of, answer, details

NUMBERS = dict.fromkeys(("width", "height", "frames", "batch", "steps", "vram", "ram"))


def pipeline_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def choices(tmp_path: Path) -> Choices:
    pipeline_at(tmp_path / "served" / "deep" / "mine")
    pipeline_at(tmp_path / "served" / ".hidden")
    pipeline_at(tmp_path / "outside")
    (tmp_path / "served" / "linked").symlink_to(tmp_path / "outside")
    return find_choices(tmp_path / "served")


def wish(choices: Choices, **chosen: Any) -> Selection:
    return check_selection(choices, **({"device": "rtx-3060", "allow": None} | NUMBERS | chosen))


class TestChoices:
    def test_pipelines_of_the_folder_come_before_profiles_and_links_are_not_followed(self, choices: Choices) -> None:
        folders = [name for name in choices.models if name.startswith("folder:")]
        assert folders == ["folder:deep/mine"] == list(choices.models)[:1]
        assert "profile:flux.1-dev" in choices.models
        assert {"here", "rtx-3060"} <= choices.devices.keys()

    def test_without_a_folder_there_are_profiles_alone(self) -> None:
        assert all(name.startswith("profile:") for name in find_choices(None).models)

    def test_what_was_chosen_is_what_is_planned_for(self, choices: Choices, tmp_path: Path) -> None:
        made = wish(choices, model="folder:deep/mine", width=64, vram=7.5, allow="lossy")
        assert made.model == str((tmp_path / "served" / "deep" / "mine").resolve())
        assert (made.counts, made.amounts, made.allow) == ((("width", 64),), (("vram", "7.5GiB"),), "lossy")
        assert wish(choices, model="profile:flux.1-dev", device="here").device is None

    @pytest.mark.parametrize(
        "chosen",
        [
            {"model": "folder:../outside"},
            {"model": "folder:linked"},
            {"model": "/etc"},
            {"model": "owner/name"},
            {"model": "profile:flux.1-dev", "device": "hardware.yaml"},
            {"model": "profile:flux.1-dev", "allow": "anything"},
            {"model": "profile:flux.1-dev", "width": 1.5},
            {"model": "profile:flux.1-dev", "steps": -1},
            {"model": "profile:flux.1-dev", "ram": "64GiB; rm"},
        ],
    )
    def test_what_is_no_choice_is_refused(self, choices: Choices, chosen: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            wish(choices, **chosen)

    @pytest.mark.parametrize("place", ["text_encoder", "text_encoder/config.json"])
    def test_a_pipeline_that_links_out_of_the_folder_is_not_read(
        self, choices: Choices, tmp_path: Path, place: str
    ) -> None:
        link = tmp_path / "served" / "deep" / "mine" / place
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "outside")
        with pytest.raises(UsageError, match=r"leads out of .*served"):
            wish(choices, model="folder:deep/mine")

    def test_a_folder_that_became_a_link_is_not_read(self, choices: Choices, tmp_path: Path) -> None:
        mine = tmp_path / "served" / "deep" / "mine"
        (mine / "model_index.json").unlink()
        mine.rmdir()
        mine.symlink_to(tmp_path / "outside")
        with pytest.raises(UsageError, match="leads out of"):
            wish(choices, model="folder:deep/mine")


class TestGuard:
    @pytest.fixture(scope="class")
    def client(self) -> Any:
        from vramplan.ui.page import make_page

        app = make_page(None, lambda *_: None)
        guard(app, 8000)
        return app.server.test_client()

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"Host": "127.0.0.1:8000"}, 200),
            ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
            ({"Host": "evil.example:8000"}, 403),
            ({"Host": "127.0.0.1:8001"}, 403),
            ({"Host": "127.0.0.1.evil.example:8000"}, 403),
            ({"Host": "127.0.0.1:8000", "Origin": "http://evil.example"}, 403),
            ({"Host": "127.0.0.1:8000", "Origin": "null"}, 403),
            ({"Host": "127.0.0.1:8000", "Origin": "https://127.0.0.1:8000"}, 403),
        ],
    )
    def test_only_the_page_itself_is_served(self, client: Any, headers: dict[str, str], status: int) -> None:
        for path in ("/", "/_dash-layout"):
            assert client.get(path, headers=headers).status_code == status

    def test_the_browser_is_told_to_load_nothing_from_elsewhere(self, client: Any) -> None:
        policy = client.get("/", headers={"Host": "127.0.0.1:8000"}).headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy
        assert "unsafe-eval" not in policy
        assert "script-src 'self' 'sha256-" in policy

    @pytest.mark.parametrize("path", ["/assets/../../etc/passwd", "/_dash-component-suites/dash/../../../x.py"])
    def test_no_file_is_handed_out(self, client: Any, path: str) -> None:
        answered = client.get(path, headers={"Host": "127.0.0.1:8000"})
        assert answered.status_code >= 400 or answered.mimetype == "text/html"
        assert b"root:" not in answered.data


class TestWorker:
    def test_of_what_waits_only_the_last_is_worked_on(self) -> None:
        worker = Worker()
        made = Selection(model="m", device=None, allow=None)
        with worker._lock:
            from threading import Thread

            found: dict[int, Any] = {}
            threads = []
            for number in range(3):
                thread = Thread(target=lambda n=number: found.update({n: worker.ask("page", _model_of, made)}))
                thread.start()
                threads.append(thread)
                while worker._turns.get("page", 0) <= number:
                    pass
        for thread in threads:
            thread.join()
        assert found == {0: None, 1: None, 2: "m"}
        with pytest.raises(VramplanError, match="planning process ended"):
            worker.ask("page", _end, made)
        assert worker.ask("page", _model_of, made) == "m"


def _model_of(made: Selection) -> str:
    return made.model


def _end(made: Selection) -> None:
    import os

    os._exit(9)


class TestAnswer:
    @pytest.fixture(scope="class")
    def model(self, small_folder: Callable[[str], Path]) -> str:
        return str(small_folder("sd15-small"))

    def test_a_plan_has_its_rows_picture_reasons_and_code(self, model: str) -> None:
        made = Selection(model=model, device="rtx-3060", allow=None)
        found = answer(made)
        assert found.error == ""
        assert dict(found.rows)["for"] == f"64 x 64, {found.workload.num_inference_steps} steps"
        assert found.reasons[0][0] == "chosen"
        assert "StableDiffusionPipeline" in found.code
        assert not found.video
        assert sum(size for _, size, _ in found.bar) > 11 << 30
        more = details(made)
        assert "stock" not in dict(found.rows)
        assert "unet" in more.picture
        assert more.words.startswith("peak ")

    def test_what_the_stock_plan_costs_is_a_row(self, model: str) -> None:
        own = {"placement.text_encoder": "encode_first"}
        plan = vramplan.plan(model, device="rtx-3060", simulate=False, settings=own)
        assert dict(_answer_of(plan, {}).rows)["stock"].startswith("resident: ")

    def test_where_nothing_fits_the_deficit_is_told_and_what_would_help(self, model: str) -> None:
        made = Selection(model=model, device="rtx-3060", allow=None, amounts=(("vram", "0.01GiB"),))
        found = answer(made)
        assert found.short
        assert "short by" in found.error
        helps = details(made).suggestions
        assert helps[-2] == "all of the card's memory"
        assert helps[-1].startswith("a larger card: ")

    def test_what_cannot_be_is_one_line(self, model: str, tmp_path: Path) -> None:
        frames = answer(Selection(model=model, device="rtx-3060", allow=None, counts=(("frames", 9),)))
        assert frames.error == "StableDiffusionPipeline makes pictures: leave num frames out"
        broken = answer(Selection(model=str(pipeline_at(tmp_path / "broken")), device="rtx-3060", allow=None))
        assert broken.error
        assert "\n" not in broken.error


class TestCommand:
    def test_it_serves_this_machine_alone(self, address: str) -> None:
        port = int(address.removeprefix("http://127.0.0.1:").rstrip("/"))
        with urlopen(address) as page:
            assert "vramplan" in page.read().decode()
        if sys.platform == "linux":  # all of 127.0.0.0/8 is this machine, and only one address of it listens
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.2", port), timeout=5)
        taken = CliRunner().invoke(main, ["ui", "--port", str(port), "--no-open"])
        assert (taken.exit_code, taken.stderr.count("\n")) == (1, 1)
        assert f"port {port} cannot be had" in taken.stderr

    def test_without_the_package_or_the_folder_one_line_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        done = CliRunner().invoke(main, ["ui", "/no/such/folder"])
        assert (done.exit_code, done.stderr) == (2, "vramplan: /no/such/folder: no such folder\n")
        monkeypatch.setattr("vramplan.ui.serve.find_spec", lambda name: None)
        done = CliRunner().invoke(main, ["ui"])
        assert (done.exit_code, done.stderr) == (1, "vramplan: vramplan ui needs dash: pip install 'vramplan[ui]'\n")

    def test_no_browser_opens_where_nobody_would_see_it(self) -> None:
        assert not can_open_browser()
