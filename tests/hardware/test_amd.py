from pathlib import Path

import pytest

from vramplan.hardware import amd, sampling, sysroot
from vramplan.hardware.types import Accelerator, Host, Reading
from vramplan.units import GIB

HOST = Host(total_bytes=64 * GIB, available_bytes=48 * GIB)
DISCRETE, BUILT_IN = bytes([136, 0, 1, 3]), bytes([128, 0, 2, 2])


class Sysfs:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.drm = root / "sys" / "class" / "drm"
        self.drm.mkdir(parents=True)
        self.kfd = root / "dev" / "kfd"
        self.kfd.parent.mkdir()
        self.kfd.touch()

    def card(self, number: int, address: str, metrics: bytes | None = DISCRETE, **files: object) -> None:
        """A card as Linux shows it: a link from class/drm to the device, named by its PCI address."""
        device = self.root / "devices" / address
        device.mkdir(parents=True)
        values = {"vendor": "0x1002", "device": "0x744c", "mem_info_vram_total": 24 * GIB} | files
        for name, value in values.items():
            (device / name).write_text(f"{value}\n")
        if metrics is not None:
            (device / "gpu_metrics").write_bytes(metrics + bytes(100))
        (self.drm / f"card{number}").mkdir()
        (self.drm / f"card{number}" / "device").symlink_to(device)

    def probe(self) -> list[Accelerator | str]:
        return list(amd.probe(HOST))


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysroot, "ROOT", tmp_path)
    monkeypatch.setattr(sampling, "SECONDS", 0.0)
    return Sysfs(tmp_path)


def test_a_discrete_card(sysfs: Sysfs) -> None:
    sysfs.card(1, "0000:0b:00.0", mem_info_vram_used=2 * GIB, unique_id="5d3f", product_name="Radeon 7900")
    assert sysfs.probe() == [
        Accelerator(
            kind="rocm",
            index=0,
            name="Radeon 7900",
            uuid="GPU-5d3f",
            total_bytes=24 * GIB,
            free_bytes=22 * GIB,
            free_readings=(Reading(source="amdgpu vram", free_bytes=22 * GIB),),
            free_reason="the middle of three readings",
        )
    ]


def test_a_card_that_tells_little(sysfs: Sysfs) -> None:
    sysfs.card(0, "0000:0b:00.0", metrics=None)
    (card,) = sysfs.probe()
    assert isinstance(card, Accelerator)
    assert (card.name, card.uuid, card.free_bytes) == ("AMD GPU 0x744c", None, None)


def test_a_processors_gpu_is_a_device_too(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm counts it, so leaving it out would shift the numbers of the others."""
    monkeypatch.setattr(amd, "torch_is_built_for", lambda backend: backend == "hip")
    sysfs.card(0, "0000:0a:00.0", metrics=BUILT_IN, mem_info_vram_total=GIB // 2, mem_info_gtt_total=8 * GIB)
    note, card = sysfs.probe()
    assert "up to 8.00 GiB of the host's memory" in note
    assert (card.total_bytes, card.unified) == (GIB // 2, False)


def test_what_is_no_amd_card_is_left_out(sysfs: Sysfs) -> None:
    sysfs.card(1, "0000:0b:00.0", vendor="0x10de")
    sysfs.card(2, "0000:0c:00.0", mem_info_vram_total="")
    (sysfs.drm / "card0-DP-1").mkdir()
    (sysfs.drm / "renderD128").mkdir()
    assert sysfs.probe() == []


def test_cards_are_numbered_in_bus_order(sysfs: Sysfs) -> None:
    sysfs.card(0, "0000:43:00.0", product_name="second")
    sysfs.card(1, "0000:03:00.0", product_name="first")
    assert [(card.index, card.name) for card in sysfs.probe()] == [(0, "first"), (1, "second")]


def test_without_access_to_the_compute_device_there_is_a_note(sysfs: Sysfs) -> None:
    sysfs.card(0, "0000:03:00.0")
    sysfs.kfd.unlink()
    (note,) = sysfs.probe()
    assert isinstance(note, str)
    assert "install ROCm" in note


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"HIP_VISIBLE_DEVICES": "2,0"}, ["c", "a"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["b"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, ["a"]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, ["c"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-idc"}, ["c"]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_hidden_cards_are_left_out(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], names: list[str]
) -> None:
    for number, name in enumerate("abc"):
        sysfs.card(number, f"0000:0{number}:00.0", product_name=name, unique_id=f"id{name}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = sysfs.probe()
    assert [card.name for card in found] == names
    assert [card.index for card in found] == list(range(len(names)))


def test_no_drm_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysroot, "ROOT", tmp_path)
    assert list(amd.probe(HOST)) == []
