"""What torch tells of devices that nothing else reads, asked in a process of its own: it takes time, and a context."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

Room = Literal["cuda", "xpu"]
Backend = Literal["cuda", "hip", "xpu"]
_PATIENCE_SECONDS = 60  # importing torch from a cold disk


def torch_backends() -> frozenset[Backend] | None:
    """What the installed torch is built for, the processor aside; None where none is installed, or it does not say.

    Its version.py is read and not run: `hip: Optional[str] = '6.4.43482'`, or None (torch 2.13).
    """
    try:
        found = importlib.util.find_spec("torch")
        text = (Path(found.origin or "").parent / "version.py").read_text(encoding="utf-8") if found else ""
    except (OSError, ValueError, ImportError):
        return None
    told = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*(.+)$", text, re.MULTILINE))
    built = (name for name in get_args(Backend) if told.get(name, "None").strip() not in ("None", "''", '""'))
    return frozenset(built) if told else None


def torch_is_built_for(backend: Backend) -> bool:
    """Whether the installed torch has the backend."""
    return backend in (torch_backends() or ())


def ask_torch(room: Room) -> list[dict[str, Any]] | str:
    """The devices of that kind, or a sentence on why there is no answer. Bytes.

    Keys: name, uuid, total_bytes, free_bytes (None where torch cannot tell), integrated, architecture, driver, native.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import torch_answer; torch_answer()", room],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
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
    """Whether what came back holds a device: a name, and a memory."""
    return (
        isinstance(answer, dict)
        and isinstance(answer.get("name"), str)
        and isinstance(answer.get("total_bytes"), int)
        and answer["total_bytes"] > 0
        and isinstance(answer.get("free_bytes"), int | None)
        and isinstance(answer.get("native"), list)
    )


def read_devices(torch: Any, room: Room) -> list[dict[str, Any]]:
    """What that torch tells of its devices of a kind."""
    module = getattr(torch, room)
    return [_device(torch, module, room, index) for index in range(module.device_count())]


def _device(torch: Any, module: Any, room: Room, index: int) -> dict[str, Any]:
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
        "native": _native(torch, facts, f"{room}:{index}"),
    }


def _free(module: Any, index: int) -> int | None:
    """What torch calls free. XPU refuses on integrated devices, and on some others (pytorch/pytorch#194487)."""
    try:
        return int(module.mem_get_info(index)[0])
    except Exception:
        return None


def _native(torch: Any, facts: Any, device: str) -> list[str]:
    """The dtypes the device makes a small product in. XPU's properties name what its units lack."""
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


def torch_answer() -> None:
    """What the other process does: print the devices of the kind its argument names, as JSON."""
    import torch

    room: Room = "xpu" if sys.argv[1:] == ["xpu"] else "cuda"
    print(json.dumps(read_devices(torch, room)))
