"""A machine written down in a file, stood up so that detection reads it: files, environment, drivers' answers.

The file's keys:

    source       where its behaviour was seen or is documented
    system       {system, machine, release}: what `platform` says
    environment  variables
    memory       {total, available, swap_total, swap_free}: what psutil says
    cores        {all, allowed}; allowed null where the system has no affinity
    limits       {RLIMIT_AS: bytes}; none where left out
    disk_free    what is free on every disk
    files        path: text, {link: path}, {hex: bytes}, or {unreadable: true}
    nvml         left out: no library; {error: NAME}; or {driver, cards: [...]}, each card's answers by the name of the
                 question without `nvmlDeviceGet`; {error: NAME} is one too; what is left out is not supported
    cuda         the UUIDs CUDA answers; left out: it does not answer
    torch        {built_for: [xpu], cuda: [...], xpu: [...]}: what torch answers in a process of its own; built for CUDA
                 where NVIDIA's library is and nothing else is said
    own          what torch says in this process, where it has started CUDA
    metal        what Metal recommends; sysctl: what that prints
    expected     {accelerators, host, notes}: the whole value; what is left out has the type's default

Sizes may be written `64 GiB`.
"""

# ruff: noqa: N802

from __future__ import annotations

import copy
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from vramplan.calibration.published_errors import bundled_error
from vramplan.hardware import amd, apple, intel, nvidia, nvidia_order, sampling, sysroot
from vramplan.hardware.detect import detect
from vramplan.hardware.types import Budget, Hardware
from vramplan.planner import budget
from vramplan.units import parse_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pynvml as real

FOLDER = Path(__file__).parent / "recorded_machines"
_SIZE = re.compile(r"[0-9.]+ [KMGT]iB")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """A copy that the caller may spoil."""
    return copy.deepcopy(_parsed(name))


@cache
def _parsed(name: str) -> dict[str, Any]:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return _sizes(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _sizes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sizes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_sizes(item) for item in value]
    return parse_bytes(value) if isinstance(value, str) and _SIZE.fullmatch(value) else value


def stand_up(machine: dict[str, Any], patch: pytest.MonkeyPatch, root: Path) -> None:
    """Everything detection asks, answered as the file says."""
    _system(machine, patch)
    _files(machine.get("files", {}), root)
    patch.setattr(sysroot, "ROOT", root)
    patch.setattr(sampling, "SECONDS", 0.0)
    for name in _VARIABLES:
        patch.delenv(name, raising=False)
    for name, value in {"VRAMPLAN_OFFLOAD": "/var/offload", **machine.get("environment", {})}.items():
        patch.setenv(name, str(value))
    patch.setitem(sys.modules, "pynvml", FakeNvml(machine.get("nvml")))
    patch.setattr(nvidia_order, "ask_cuda", lambda: machine.get("cuda"))
    _torch(machine.get("torch", {}), patch)
    patch.setitem(sys.modules, "torch", _own(machine["own"]) if "own" in machine else ModuleType("torch"))
    patch.setattr(apple, "metal_working_set", lambda: machine.get("metal"))
    printed = subprocess.CompletedProcess([], 0, stdout=machine.get("sysctl", ""), stderr="")
    patch.setattr(apple.subprocess, "run", lambda *_, **__: printed)


def detected(machine: dict[str, Any], patch: pytest.MonkeyPatch, root: Path) -> Hardware:
    stand_up(machine, patch, root)
    return detect()


def _system(machine: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    told = {"system": "Linux", "machine": "x86_64", "release": "6.8.0-45-generic"} | machine.get("system", {})
    for name, value in told.items():
        patch.setattr(platform, name, lambda value=value: value)
    memory = machine["memory"]
    patch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=memory["total"], available=memory["available"])
    )
    swap = SimpleNamespace(total=memory.get("swap_total", 0), free=memory.get("swap_free", 0))
    patch.setattr(psutil, "swap_memory", lambda: swap)
    cores = {"all": 16, "allowed": 16} | machine.get("cores", {})
    patch.setattr(os, "cpu_count", lambda: cores["all"])
    if cores["allowed"] is None:
        patch.delattr(os, "sched_getaffinity")
    else:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(cores["allowed"])))
    limits = {getattr(resource, name): value for name, value in machine.get("limits", {}).items()}
    patch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY),) * 2)
    free = SimpleNamespace(free=machine.get("disk_free", 500 << 30))
    patch.setattr(shutil, "disk_usage", lambda _: free)


def _files(files: dict[str, Any], root: Path) -> None:
    for path, content in files.items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict) and "link" in content:
            place.symlink_to(root / content["link"].lstrip("/"))
        elif isinstance(content, dict) and "hex" in content:
            place.write_bytes(bytes.fromhex(content["hex"]))
        elif isinstance(content, dict):
            place.mkdir()  # reading it fails, for whoever reads
        else:
            place.write_text(f"{content}\n", encoding="utf-8", errors="surrogateescape")


def _torch(told: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    built = frozenset(told.get("built_for", ("cuda",)))
    patch.setattr(nvidia, "torch_backends", lambda: built)
    for user in (amd, intel, sys.modules["vramplan.hardware.detect"]):
        patch.setattr(user, "torch_is_built_for", lambda backend: backend in built)
    for vendor in (amd, intel):
        patch.setattr(vendor, "ask_torch", lambda room: told.get(room, "torch did not answer (it was not asked for)"))


def _own(told: dict[str, Any]) -> ModuleType:
    """torch, as far as it is asked once it has started CUDA."""
    torch = ModuleType("torch")
    devices = told["devices"]
    torch.cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: len(devices),
        get_device_properties=lambda index: SimpleNamespace(
            uuid=devices[index]["uuid"], total_memory=devices[index]["total"]
        ),
        memory_allocated=lambda index: devices[index]["allocated"],
        memory_reserved=lambda index: devices[index]["reserved"],
        get_per_process_memory_fraction=lambda index: devices[index]["fraction"],
        mem_get_info=lambda index: (devices[index]["free"], 0),
    )
    return torch


class FakeNvml(ModuleType):
    """pynvml by a machine's file: what pynvml lacks is an AttributeError, what the card lacks pynvml's own error."""

    def __init__(self, told: dict[str, Any] | None) -> None:
        super().__init__("pynvml")
        self.told = told
        self.sessions = 0
        self.readings: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.lower().startswith("nvml"):
            raise AttributeError(name)
        value = getattr(real, name)
        if not name.startswith(("nvmlDeviceGet", "nvmlSystem")):
            return value
        if name in (self.told or {}).get("lacking", ()):
            raise AttributeError(name)
        return lambda handle=None, *rest: self._answer(name.removeprefix("nvmlDeviceGet"), handle, rest)

    def nvmlInit(self) -> None:
        if self.told is None:
            raise real.NVMLError(real.NVML_ERROR_LIBRARY_NOT_FOUND)
        self._fail(self.told)
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> Any:
        return self._of(self.told.get("driver", {"error": "NOT_SUPPORTED"}))

    def nvmlSystemGetProcessName(self, pid: int) -> Any:
        return self._of(self.told.get("programs", {}).get(pid, {"error": "NOT_FOUND"}))

    def nvmlDeviceGetCount(self) -> int:
        return self._of(self.told.get("count", len(self.told["cards"])))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        card = self.told["cards"][index]
        self._fail(card)
        return card

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Any) -> int:
        return len(card.get("MigDevices", ())) if isinstance(card, dict) else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Any, slot: int) -> Any:
        part = card["MigDevices"][slot]
        self._fail(part or {"error": "NOT_FOUND"})
        return part

    def nvmlDeviceGetNvLinkState(self, card: Any, link: int) -> int:
        links = card.get("NvLinks", ())
        if link >= len(links):
            raise real.NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        return int(links[link] is not None)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, card: Any, link: int) -> Any:
        return SimpleNamespace(busId=card["NvLinks"][link])

    def nvmlDeviceGetFieldValues(self, card: Any, wanted: list[tuple[int, int]]) -> Any:
        """`C2cLinks` of the card: MB/s of each link to its processor, null for one that is not active."""
        links = card.get("C2cLinks") if isinstance(card, dict) else None
        if links is None:
            raise real.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        known = {
            real.NVML_FI_DEV_C2C_LINK_COUNT: lambda _: len(links),
            real.NVML_FI_DEV_C2C_LINK_GET_STATUS: lambda link: int(links[link] is not None),
            real.NVML_FI_DEV_C2C_LINK_GET_MAX_BW: lambda link: links[link] or 0,
        }
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=known[it](link))) for it, link in wanted]

    def nvmlDeviceGetMemoryInfo(self, card: Any) -> Any:
        """A list holds one answer for each time it is asked."""
        told = card.get("MemoryInfo", {"error": "NOT_SUPPORTED"})
        if isinstance(told, list) and told:
            turn = self.readings.get(id(card), 0)
            self.readings[id(card)] = turn + 1
            told = told[min(turn, len(told) - 1)]
        self._fail(told)
        return SimpleNamespace(**told) if isinstance(told, dict) else told

    def _answer(self, question: str, card: Any, _rest: Any) -> Any:
        assert self.sessions == 1, f"{question} outside of a session"
        if not isinstance(card, dict):
            raise real.NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        value = self._of(card.get(question, {"error": "NOT_SUPPORTED"}))
        if isinstance(value, dict):
            return SimpleNamespace(**value)
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return [SimpleNamespace(**item) for item in value]
        return value

    def _of(self, value: Any) -> Any:
        self._fail(value)
        return value.encode() if isinstance(value, str) and self.told.get("bytes") else value

    @staticmethod
    def _fail(value: Any) -> None:
        if isinstance(value, dict) and "error" in value:
            raise real.NVMLError(getattr(real, f"NVML_ERROR_{value['error']}"))


def make_budget(hardware: Hardware, **options: Any) -> Budget:
    """The budget with the margin of published simulated peaks, unless another `error` is given."""
    return budget.make_budget(hardware, **{"error": bundled_error("simulated")} | options)
