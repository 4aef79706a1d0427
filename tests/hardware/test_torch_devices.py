"""torch asked in a process of its own: a package that stands in for it, and the real one's words for what it lacks."""

from pathlib import Path

import pytest

from vramplan.hardware.torch_devices import _is_answer, ask_torch, read_devices, torch_backends, torch_is_built_for

TORCH = """
import types
float32, float16, bfloat16 = "f32", "f16", "bf16"
class Product:
    def __init__(self, dtype): self.dtype = dtype
    def __matmul__(self, other): return self
    def sum(self): return 512.0
def ones(*_, dtype, device):
    if dtype == "bf16": raise RuntimeError("no bfloat16 here")
    return Product(dtype)
def _free(index):
    if index: raise RuntimeError("The device does not support querying the available free memory.")
    return (3 << 30, 4 << 30)
def _facts(index):
    return types.SimpleNamespace(name=f"Arc {index}", total_memory=4 << 30, is_integrated_gpu=bool(index),
                                 has_fp16=True, uuid=None, driver_version="1.6", architecture=7)
xpu = types.SimpleNamespace(device_count=lambda: 2, get_device_properties=_facts, mem_get_info=_free)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(text: str) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(text)
        import os

        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    return write


def test_devices_are_told_with_what_torch_cannot_say_left_open(stand_in) -> None:
    stand_in(TORCH)
    card, integrated = ask_torch("xpu")
    assert card == {
        "name": "Arc 0",
        "uuid": None,
        "total_bytes": 4 << 30,
        "free_bytes": 3 << 30,
        "integrated": False,
        "architecture": "7",
        "driver": "1.6",
        "native": ["float32", "float16"],
    }
    assert (integrated["free_bytes"], integrated["integrated"]) == (None, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise ImportError('libsycl.so.8: cannot open shared object file')", "ImportError: libsycl.so.8"),
        ("import os; os._exit(7)", "no reason given"),
        ("import types; xpu = types.SimpleNamespace()", "AttributeError"),
    ],
)
def test_a_torch_that_fails_gives_its_own_words(stand_in, text: str, words: str) -> None:
    stand_in(text)
    answer = ask_torch("xpu")
    assert isinstance(answer, str)
    assert words in answer


@pytest.mark.parametrize("room", ["cuda", "xpu"])
def test_the_real_torch_is_asked_for_what_it_has(room: str) -> None:
    torch = pytest.importorskip("torch")
    answers = read_devices(torch, room)
    assert len(answers) == getattr(torch, room).device_count()
    assert all(map(_is_answer, answers))


@pytest.mark.parametrize(
    ("lines", "built"),
    [
        ("cuda: Optional[str] = None\nxpu: Optional[str] = None", frozenset()),
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None", frozenset({"cuda"})),
        ("xpu: Optional[str] = '20250101'", frozenset({"xpu"})),
        ("cuda = ''\nhip: Optional[str] = '6.4'", frozenset({"hip"})),
        ("", None),
    ],
)
def test_what_torch_is_built_for_is_read_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, built: frozenset[str] | None
) -> None:
    import importlib.util
    from types import SimpleNamespace

    (tmp_path / "version.py").write_text(f"__version__ = '2.13'\n{lines}\nraise SystemExit\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    assert torch_backends() == built
    assert torch_is_built_for("xpu") is ("xpu" in (built or ()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert torch_backends() is None
