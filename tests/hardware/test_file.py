"""hardware.yaml: written on one machine, read on another; and the block for bug reports."""

import getpass
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import vramplan
from tests.support.machines import make_budget
from vramplan.api.machine import choose_machine, measure_here
from vramplan.cli.main import main
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.file import is_hardware_file, load_hardware
from vramplan.hardware.types import Accelerator, Hardware, Host, Measurement, Pcie, Peer, Process, ProcessUsage, Reading
from vramplan.planfile.file import dump_plan, parse_plan
from vramplan.units import GIB
from vramplan.view.machine import hardware_dict, hardware_markdown
from vramplan.view.machine import text_of as hardware_text
from vramplan.view.redact import redact
from vramplan.view.shared import to_yaml

UUID = "GPU-1b2f6a50-8c1d-4e7a-9f30-5d2c8e7b1a01"
FULL = Accelerator(
    kind="cuda",
    index=0,
    name="NVIDIA GeForce RTX 4090",
    uuid=UUID,
    total_bytes=24 * GIB,
    free_bytes=20 * GIB,
    driver="570.86.10",
    architecture="sm_89",
    native=("float32", "bfloat16"),
    display=True,
    free_readings=(Reading(source="NVML", free_bytes=20 * GIB),),
    free_reason="the only source",
    others=(Process(pid=7, name="firefox", used_bytes=None),),
    own=ProcessUsage(has_context=True, allocated_bytes=GIB, cached_bytes=GIB, fraction=0.5),
    pcie=Pcie(generation=1, max_generation=4, width=4, max_width=16),
    peers=(Peer(link="NVLink", count=4, to="0000:02:00.0"),),
    measured=(Measurement(what="device_to_host", unit="bytes/s", median=2.5e10, least=2e10, most=2.6e10, runs=5),),
)
HOST = Host(
    total_bytes=64 * GIB,
    available_bytes=30 * GIB,
    limit_bytes=32 * GIB,
    limit_source="cgroup v2 memory.max at /user.slice/user-1000.slice/job_77",
    system="Linux 6.8",
    swap_total_bytes=GIB,
    swap_free_bytes=0,
    pinned_limit_bytes=GIB,
    pinned_source="assumed",
    cores=8,
    cores_source="processor affinity",
    disk_free_bytes=100 * GIB,
    disk_filesystem="ext4",
    disk_rotational=True,
)
MACHINE = Hardware(accelerators=(FULL,), host=HOST, notes=("a note",))


def written(path: Path, machine: Hardware = MACHINE) -> Path:
    path.write_text(to_yaml(hardware_dict(machine, make_budget(machine))))
    return path


def test_what_was_written_is_read_again_whole(tmp_path: Path) -> None:
    assert load_hardware(written(tmp_path / "hardware.yaml")) == MACHINE


def test_a_plan_is_for_the_machine_in_the_file(tmp_path: Path) -> None:
    hardware, card = choose_machine(str(written(tmp_path / "hardware.yaml")))
    assert hardware == MACHINE
    assert card.rates.source.startswith("profile rtx-4090")
    assert card.others is None  # who uses it there is nobody's business in a plan


@pytest.mark.parametrize(
    ("name", "is_file"), [("hw.yaml", True), ("a/b.YML", True), ("rtx-4070", False), ("cuda:1", False)]
)
def test_a_file_is_told_by_its_ending(name: str, is_file: bool) -> None:
    assert is_hardware_file(name) is is_file


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace("total_bytes: 68719476736", "total_bytes: many"), "host.total_bytes"),
        (lambda text: text.replace("kind: cuda", "kind: abacus"), "accelerators.0.kind"),
        (lambda text: text.replace("index: 0", "index: 0\n  colour: red"), "colour is not a key here"),
        (lambda text: text.replace("schema_version: 1", "schema_version: 9"), "write it again with `vramplan detect`"),
        (lambda _: "[]", "write it again"),
        (lambda _: "schema_version: 1\nsettings: {}", "a plan, not a machine"),
        (lambda _: "a: [", "not readable YAML"),
        (lambda _: "schema_version: 1\nhost: !!python/object/apply:os.getcwd []", "not readable YAML"),
        (lambda _: "schema_version: 1\naccelerators: []", "host is missing"),
        (
            lambda text: text.replace("free_bytes: 21474836480", "free_bytes: 99999999999", 1),
            "more than its total_bytes",
        ),
        (
            lambda text: text.replace("available_bytes: 32212254720", "available_bytes: 99999999999"),
            "more than host.tot",
        ),
        (lambda text: text.replace("index: 0", "index: -1"), r"accelerators.0.index: -1 is no size, rate or count"),
        (lambda text: text.replace("total_bytes: 25769803776", "total_bytes: 0"), "a device without memory"),
        (lambda text: text.replace("link_bytes_per_s: null", "link_bytes_per_s: .nan"), "link_bytes_per_s"),
        (lambda text: text.replace("link_bytes_per_s: null", "link_bytes_per_s: 0.0"), "link_bytes_per_s: 0.0 is no"),
        (lambda text: text.replace("fraction: 0.5", "fraction: -0.5"), r"accelerators.0.own.fraction: -0.5 is no"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_place(tmp_path: Path, spoil, words: str) -> None:
    path = written(tmp_path / "hardware.yaml")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(VramplanError, match=words) as caught:
        load_hardware(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(VramplanError, match="write one with `vramplan detect`"):
        choose_machine(str(tmp_path / "none.yaml"))


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    made = runner.invoke(main, ["detect", "-o", "hardware.yaml", "--json"])
    assert made.exit_code == 0, made.output
    again = runner.invoke(main, ["detect", "--device", "hardware.yaml", "--json"])
    assert json.loads(again.stdout)["host"] == json.loads(made.stdout)["host"]
    assert yaml.safe_load(Path("hardware.yaml").read_text())["host"] == json.loads(made.stdout)["host"]


def test_a_plan_made_for_a_file(tmp_path: Path, small_folder) -> None:
    path = str(written(tmp_path / "hardware.yaml"))
    plan = vramplan.plan(str(small_folder("sd15-small")), device=path, height=64, width=64, steps=2, simulate=False)
    assert plan.machine.accelerator.name == FULL.name
    assert plan.machine.host == HOST
    assert "firefox" not in dump_plan(plan)
    assert parse_plan(dump_plan(plan)).machine == plan.machine


def test_only_what_is_here_is_measured(tmp_path: Path) -> None:
    path = str(written(tmp_path / "hardware.yaml"))
    for device in (path, "rtx-4090"):
        with pytest.raises(UsageError, match="is not in this machine"):
            measure_here(MACHINE, FULL, device)


def test_a_full_card_is_shown_with_who_fills_it_and_is_an_error(tmp_path: Path) -> None:
    full = replace(FULL, free_bytes=GIB // 4, own=None)
    path = tmp_path / "full.yaml"
    path.write_text(to_yaml(hardware_dict(replace(MACHINE, accelerators=(full,)), None)))
    done = CliRunner().invoke(main, ["detect", "--device", str(path)])
    assert done.exit_code == 3
    assert "used by firefox" in done.stdout
    assert "no VRAM is left to use" in done.stderr
    assert CliRunner().invoke(main, ["detect", "--device", str(path), "--vram", "1GiB"]).exit_code == 0


def test_every_fact_is_shown() -> None:
    machine = replace(MACHINE, accelerators=(replace(FULL, link_bytes_per_s=3.938e9),))
    text = hardware_text(machine, make_budget(machine))
    for words in (
        "cuda:0        NVIDIA GeForce RTX 4090: 24.00 GiB, 20.00 GiB free",
        f"sm_89, driver 570.86.10, {UUID}",
        "computes in float32, bfloat16",
        "free by NVML 20.00 GiB (the only source)",
        "this process has 1.00 GiB in tensors and 1.00 GiB in torch's cache, and may use 50% of the total",
        "used by firefox (memory not said)",
        "drives a display",
        "PCIe 1 x4 now, at most 4 x16: an idle link slows down and speeds up under load; the slot gives fewer lanes",
        "4 NVLink link(s) to 0000:02:00.0",
        "measured device to host: 25 GB/s (20 to 26 in 5 runs)",
        "swap          1.00 GiB, 0 B free",
        "pinned RAM    at most 1.00 GiB (assumed)",
        "cores         8 (processor affinity)",
        "(ext4, turning)",
        "disk   99.00 GiB",
        "less 1.00 GiB reserve: kept free on the disk",
        "copies to it at most at 3.94 GB/s",
        "less 8.61 GiB process limit: torch may use 50% of the total in this process",
        "other programs: a desktop, a browser or another program may need it",
    ):
        assert words in text, words
    assert "driver context" not in text  # this process has made it


def test_the_block_names_nobody() -> None:
    block = hardware_markdown(MACHINE, make_budget(MACHINE))
    assert block.startswith("<details>")
    assert block.endswith("</details>")
    assert "RTX 4090" in block
    for secret in (UUID, "1000", "job_77"):
        assert secret not in block


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("GPU-1b2f6a50-8c1d-4e7a-9f30-5d2c8e7b1a01", "<uuid>"),
        ("MIG-GPU-1b2f6a50-8c1d-4e7a-9f30-5d2c8e7b1a01/2/0", "<uuid>"),
        ("GPU-5d3f0a1b2c4e6f70", "<uuid>"),
        ("at /kubepods/pod7d1f2c3a_0b1c_4d2e_8f90_a1b2c3d4e5f6", "at /kubepods/pod<uuid>"),
        ("at /docker/3f1c0a9b8d7e6f5a4b3c2d1e0f9a8b7c", "at /docker/<id>"),
        ("at /slurm/uid_1000/job_77/step_0", "at /slurm/uid_<id>/job_<id>/step_<id>"),
        ("(cgroup v2 memory.max at /lxc/alices-box)", "(cgroup v2 memory.max at /lxc/<name>-<name>)"),
        (
            "at /user.slice/user-1000.slice/user@1000.service/app.slice/app-org.editor.scope",
            "at /user.slice/user-<id>.slice/user@<id>.service/app.slice/app-<name>.<name>.scope",
        ),
        (
            "at /kubepods.slice/kubepods-burstable-pod7d1f2c3a_0b1c_4d2e_8f90_a1b2c3d4e5f6.slice/cri-containerd-"
            "3f1c0a9b8d7e6f5a4b3c2d1e0f9a8b7c.scope",
            "at /kubepods.slice/kubepods-burstable-pod<uuid>.slice/cri-containerd-<id>.scope",
        ),
        ("/data/alice/store.jsonl cannot be read, D:\\alice\\x: no", "<path> cannot be read, <path>: no"),
        (
            "/proc/self/cgroup, /dev/kfd, https://pytorch.org/get/it",
            "/proc/self/cgroup, /dev/kfd, https://pytorch.org/get/it",
        ),
        ("id_3f1c0a9b8d7e6f5a", "id_<id>"),
        ("24564 MiB, sm_89, 570.86.10, 0000:02:00.0", "24564 MiB, sm_89, 570.86.10, 0000:02:00.0"),
    ],
)
def test_identifiers_are_hidden_and_numbers_are_not(text: str, hidden: str) -> None:
    assert redact(text) == hidden


def test_names_of_host_user_and_home_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "starship.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    text = redact("starship STARSHIP.example.org /home/alice/x alice's malice")
    assert text == "<host> <host> <home>/x <user>'s malice"


def test_markdown_on_the_command_line() -> None:
    done = CliRunner().invoke(main, ["detect", "--format", "markdown"])
    assert done.exit_code == 0
    assert platform.node() not in done.stdout
    refused = CliRunner().invoke(main, ["profiles", "list", "--format", "markdown"])
    assert refused.exit_code != 0


def test_detecting_needs_no_torch() -> None:
    code = "import sys; from vramplan.cli.main import main; main({}); print('torch' in sys.modules, file=sys.stderr)"
    plain = subprocess.run(
        [sys.executable, "-c", code.format(["detect", "--json"])], capture_output=True, text=True, check=True
    )
    assert plain.stderr.strip() == "False"
