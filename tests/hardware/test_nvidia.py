"""The NVIDIA probe against a stand-in for pynvml that raises pynvml's own errors, as the real one does."""

# ruff: noqa: N802  (the names are pynvml's)

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vramplan.hardware import Accelerator, Host, nvidia
from vramplan.units import GIB

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pynvml as real

HOST = Host(total_bytes=128 * GIB, available_bytes=100 * GIB)
LOST, UNSUPPORTED, DENIED = (
    real.NVML_ERROR_GPU_IS_LOST,
    real.NVML_ERROR_NOT_SUPPORTED,
    real.NVML_ERROR_NO_PERMISSION,
)


@dataclass
class Card:
    """What NVML says of one card; `failing` names the facts that it answers with an error code."""

    name: str = "NVIDIA GeForce RTX 4090"
    uuid: str = "GPU-aaaa-1"
    total: int = 24 * GIB
    free: int = 20 * GIB
    failing: dict[str, int] = field(default_factory=dict)
    mig: int = real.NVML_DEVICE_MIG_DISABLE
    generation: int = 4
    width: int = 16
    display: int = real.NVML_FEATURE_DISABLED


class FakeNvml(ModuleType):
    """pynvml, as far as the probe may use it: anything else is an AttributeError."""

    NVMLError = real.NVMLError
    NVMLError_LibraryNotFound = real.NVMLError_LibraryNotFound
    NVMLError_NotSupported = real.NVMLError_NotSupported

    def __init__(self, *cards: Card, init_error: int | None = None, text: type = str) -> None:
        super().__init__("pynvml")
        self.cards = cards
        self.init_error = init_error
        self.text = text
        self.sessions = 0
        self.opened = 0

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise real.NVMLError(self.init_error)
        self.sessions += 1
        self.opened += 1

    def nvmlShutdown(self) -> None:
        if not self.sessions:
            raise real.NVMLError(real.NVML_ERROR_UNINITIALIZED)
        self.sessions -= 1

    def _fact(self, card: Card, function: str, value: object) -> object:
        assert self.sessions, f"{function} before nvmlInit"
        if function in card.failing:
            raise real.NVMLError(card.failing[function])
        return value.encode() if self.text is bytes and isinstance(value, str) else value

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlSystemGetDriverVersion(self) -> object:
        return b"570.86.10" if self.text is bytes else "570.86.10"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return self._fact(self.cards[index], "handle", self.cards[index])

    def nvmlDeviceGetName(self, card: Card) -> object:
        return self._fact(card, "name", card.name)

    def nvmlDeviceGetUUID(self, card: Card) -> object:
        return self._fact(card, "uuid", card.uuid)

    def nvmlDeviceGetMigMode(self, card: Card) -> object:
        return self._fact(card, "mig", [card.mig, card.mig])

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> object:
        memory = SimpleNamespace(total=card.total, free=card.free, used=card.total - card.free)
        return self._fact(card, "memory", memory)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, card: Card) -> object:
        return self._fact(card, "generation", card.generation)

    def nvmlDeviceGetCurrPcieLinkWidth(self, card: Card) -> object:
        return self._fact(card, "width", card.width)

    def nvmlDeviceGetDisplayActive(self, card: Card) -> object:
        return self._fact(card, "display", card.display)

    def nvmlDeviceGetMaxPcieLinkWidth(self, card: Card) -> object:
        return self._fact(card, "max_width", 16)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setattr(nvidia, "_KERNEL_DRIVER", tmp_path / "version")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch):
    def run(*cards: Card, **options) -> tuple[list[Accelerator], list[str]]:
        fake = FakeNvml(*cards, **options)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        found = list(nvidia.probe(HOST))
        assert fake.sessions == 0, "NVML was left open"
        assert fake.opened == (fake.init_error is None)
        return [x for x in found if isinstance(x, Accelerator)], [x for x in found if isinstance(x, str)]

    return run


THREE = (
    Card(name="A", uuid="GPU-aaaa-1"),
    Card(name="B", uuid="GPU-aabb-2"),
    Card(name="C", uuid="GPU-cccc-3"),
)


def test_the_fake_offers_nothing_that_pynvml_does_not() -> None:
    offered = [name for name in dir(FakeNvml) if name.lower().startswith("nvml")]
    assert offered
    assert [name for name in offered if not hasattr(real, name)] == []


@pytest.mark.parametrize("text", [str, bytes])
def test_a_card_is_read_whether_names_are_text_or_bytes(probe, text: type) -> None:
    (card,), notes = probe(Card(), text=text)
    assert notes == []
    assert card == Accelerator(
        kind="cuda",
        index=0,
        name="NVIDIA GeForce RTX 4090",
        uuid="GPU-aaaa-1",
        total_bytes=24 * GIB,
        free_bytes=20 * GIB,
        driver="570.86.10",
        link_bytes_per_s=pytest.approx(31.5e9, rel=0.01),
        drives_display=False,
    )
    assert card.device == "cuda:0"


@pytest.mark.parametrize(
    ("card", "draws"),
    [
        (Card(display=real.NVML_FEATURE_ENABLED), True),
        (Card(display=real.NVML_FEATURE_DISABLED), False),
        (Card(failing={"display": UNSUPPORTED}), None),
    ],
)
def test_whether_a_desktop_is_drawn_on_it(probe, card: Card, draws: bool | None) -> None:
    (found,), notes = probe(card)
    assert found.drives_display is draws
    assert notes == []


def test_no_library_is_no_fault(probe) -> None:
    assert probe(init_error=real.NVML_ERROR_LIBRARY_NOT_FOUND) == ([], [])


def test_no_library_beside_a_loaded_driver_is_noted(probe) -> None:
    nvidia._KERNEL_DRIVER.touch()
    cards, (note,) = probe(init_error=real.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert cards == []
    assert "NVIDIA_DRIVER_CAPABILITIES" in note


@pytest.mark.parametrize("code", [real.NVML_ERROR_DRIVER_NOT_LOADED, real.NVML_ERROR_LIB_RM_VERSION_MISMATCH, 999])
def test_a_broken_driver_is_noted(probe, code: int) -> None:
    cards, (note,) = probe(init_error=code)
    assert cards == []
    assert str(real.NVMLError(code)) in note


def test_a_missing_module_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (note,) = nvidia.probe(HOST)
    assert "nvidia-ml-py" in note


def test_a_warning_of_the_module_stays_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("import warnings\nwarnings.warn('deprecated', FutureWarning)\n")
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nvidia._import_nvml().__file__ == str(tmp_path / "pynvml.py")


@pytest.mark.parametrize("failing", ["name", "uuid", "mig", "generation", "width", "max_width"])
@pytest.mark.parametrize("code", [UNSUPPORTED, DENIED, real.NVML_ERROR_FUNCTION_NOT_FOUND])
def test_one_missing_fact_does_not_lose_the_card(probe, failing: str, code: int) -> None:
    (card,), notes = probe(Card(failing={failing: code}))
    assert notes == []
    assert (card.total_bytes, card.free_bytes) == (24 * GIB, 20 * GIB)


@pytest.mark.parametrize("failing", ["handle", "memory"])
def test_a_lost_card_is_left_out_and_keeps_its_number(probe, failing: str) -> None:
    cards, (note,) = probe(Card(failing={failing: LOST}), Card(name="B", uuid="GPU-bbbb-2"))
    assert [(card.index, card.name) for card in cards] == [(1, "B")]
    assert "card 0" in note
    assert "GPU is lost" in note


def test_an_unexpected_failure_still_closes_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(Card())
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(fake, "nvmlDeviceGetCount", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(nvidia.probe(HOST))
    assert fake.sessions == 0


def test_cards_that_cannot_be_counted_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncountable(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:
            raise real.NVMLError(DENIED)

        def nvmlShutdown(self) -> None:
            raise real.NVMLError(DENIED)

    monkeypatch.setitem(sys.modules, "pynvml", Uncountable())
    (note,) = nvidia.probe(HOST)
    assert "Insufficient Permissions" in note


@pytest.mark.parametrize(
    "card",
    [
        Card(name="NVIDIA GB10", failing={"memory": UNSUPPORTED, "generation": UNSUPPORTED}),
        Card(name="NVIDIA GB10", total=HOST.total_bytes, free=3 * GIB, failing={"width": UNSUPPORTED}),
    ],
    ids=["says not supported", "says the host's total"],
)
def test_a_chip_without_memory_of_its_own_has_the_hosts(probe, card: Card) -> None:
    (found,), notes = probe(card)
    assert notes == []
    assert found.unified
    assert (found.total_bytes, found.free_bytes) == (HOST.total_bytes, HOST.available_bytes)


def test_a_card_of_nearly_the_hosts_size_is_not_taken_for_shared(probe) -> None:
    (card,), _ = probe(Card(total=HOST.total_bytes * 99 // 100))
    assert not card.unified


def test_the_link_is_what_slot_and_card_allow(probe) -> None:
    (narrow,), _ = probe(Card(generation=3, width=4))
    assert narrow.link_bytes_per_s == pytest.approx(3.94e9, rel=0.01)
    (by_maximum,), _ = probe(Card(generation=3, failing={"width": UNSUPPORTED}))
    assert by_maximum.link_bytes_per_s == pytest.approx(15.75e9, rel=0.01)
    (unknown,), _ = probe(Card(generation=9))
    assert unknown.link_bytes_per_s is None


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("2,0", ["C", "A"]),
        ("", []),
        ("1,-1,2", ["B"]),
        ("0,9,1", ["A"]),
        ("GPU-cccc-3", ["C"]),
        ("GPU-c,GPU-aab", ["C", "B"]),
        ("GPU-aa", []),
    ],
)
def test_only_visible_cards_are_found_in_torchs_order(
    probe, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cards, notes = probe(*THREE)
    assert notes == []
    assert [card.name for card in cards] == names
    assert [card.device for card in cards] == [f"cuda:{index}" for index in range(len(names))]


@pytest.mark.parametrize("visible", ["MIG-1234-5678", "MIG-GPU-aaaa-1/1/0"])
def test_a_mig_instance_is_not_read_yet(probe, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cards, (note,) = probe(*THREE)
    assert cards == []
    assert "not read yet" in note


def test_a_card_split_into_instances_is_not_taken_whole(probe) -> None:
    cards, (note,) = probe(Card(mig=real.NVML_DEVICE_MIG_ENABLE))
    assert cards == []
    assert "not read yet" in note


@pytest.mark.parametrize("visible", [None, "0,1", "1"])
def test_the_order_is_doubted_unless_it_is_pinned(probe, monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _, (note,) = probe(*THREE)
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in note


@pytest.mark.parametrize(("cards", "visible"), [(THREE[:1], None), (THREE, "GPU-cccc,GPU-aab"), (THREE, "")])
def test_the_order_is_not_doubted_without_reason(
    probe, monkeypatch: pytest.MonkeyPatch, cards: tuple[Card, ...], visible: str | None
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert probe(*cards)[1] == []
