"""Devices read through torch, in a separate process, as that takes time and a device context."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

DeviceType = Literal["cuda", "xpu"]
Backend = Literal["cuda", "hip", "xpu"]
_TIMEOUT_SECONDS = 60  # importing torch from a cold disk


def torch_backends() -> frozenset[Backend] | None:
    """The backends of the installed torch, other than the CPU; None if torch is missing or does not name them.

    Its version.py is parsed, not run: `hip: Optional[str] = '6.4.43482'`, or None (torch 2.13).
    """
    try:
        found = importlib.util.find_spec("torch")
        text = (Path(found.origin or "").parent / "version.py").read_text(encoding="utf-8") if found else ""
    except (OSError, ValueError, ImportError):
        return None
    stated = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*(.+)$", text, re.MULTILINE))
    built = (name for name in get_args(Backend) if stated.get(name, "None").strip() not in ("None", "''", '""'))
    return frozenset(built) if stated else None


def torch_is_built_for(backend: Backend) -> bool:
    """Whether the installed torch is built for the backend."""
    return backend in (torch_backends() or ())


def ask_torch(device_type: DeviceType) -> list[dict[str, Any]] | str:
    """Ask torch for its devices of a type; a text with the reason if it does not answer.

    Keys: name, uuid, total_bytes, free_bytes (None if unknown to torch), integrated, architecture, driver, native.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import print_devices; print_devices()", device_type],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        answers = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return f"torch did not answer ({type(error).__name__})"
    if not isinstance(answers, list) or not all(map(_is_answer, answers)):
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"torch did not answer ({last})"
    return answers


def _is_answer(answer: Any) -> bool:
    """Whether the answer describes a device: a name, and sizes of its memory."""
    return (
        isinstance(answer, dict)
        and isinstance(answer.get("name"), str)
        and isinstance(answer.get("total_bytes"), int)
        and answer["total_bytes"] > 0
        and isinstance(answer.get("free_bytes"), int | None)
        and isinstance(answer.get("native"), list)
    )


def read_devices(torch: Any, device_type: DeviceType) -> list[dict[str, Any]]:
    """Read the devices of a type from the given torch module, with the keys of `ask_torch`."""
    module = getattr(torch, device_type)
    return [_device(torch, module, device_type, index) for index in range(module.device_count())]


def _device(torch: Any, module: Any, device_type: DeviceType, index: int) -> dict[str, Any]:
    facts = module.get_device_properties(index)
    integrated = any(bool(getattr(facts, name, 0)) for name in ("is_integrated_gpu", "is_integrated", "integrated"))
    return {
        "name": str(facts.name),
        "uuid": _text(facts, "uuid"),
        "total_bytes": int(facts.total_memory),
        "free_bytes": _free(module, index),
        "integrated": integrated,
        "architecture": _text(facts, "gcnArchName") or _text(facts, "architecture"),
        "driver": _text(facts, "driver_version"),
        "native": _native(torch, facts, f"{device_type}:{index}"),
    }


def _free(module: Any, index: int) -> int | None:
    """The free bytes by torch; None if it raises, as XPU does on integrated and some more (pytorch/pytorch#194487)."""
    try:
        return int(module.mem_get_info(index)[0])
    except Exception:
        return None


def _native(torch: Any, facts: Any, device: str) -> list[str]:
    """The dtypes in which a small product works on the device, without float16 where XPU's properties exclude it."""
    found = []
    for name in ("float32", "float16", "bfloat16"):
        lacking = name == "float16" and not getattr(facts, "has_fp16", True)
        try:
            ones = torch.ones(8, 8, dtype=getattr(torch, name), device=device)
            if not lacking and float((ones @ ones).sum()) == 512.0:
                found.append(name)
        except Exception:
            continue
    return found


def _text(facts: Any, name: str) -> str | None:
    value = getattr(facts, name, None)
    return None if value is None or value == "" else str(value)


def print_devices() -> None:
    """Print the devices of the type in the first argument as JSON: the work of the separate process."""
    import torch

    device_type: DeviceType = "xpu" if sys.argv[1:] == ["xpu"] else "cuda"
    print(json.dumps(read_devices(torch, device_type)))
