"""Whatever goes wrong at whatever line of applying, undoing or replacing: the pipeline is as it was, or wholly applied.

`VRAMPLAN_FAULTS=all` tries every line (long); otherwise a spread of them is tried.
"""

from __future__ import annotations

import json
import linecache
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import safetensors.torch
import torch

import vramplan
import vramplan.runtime.applied
from tests.support import faults
from tests.support.calls import call_kwargs, output_tensor
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.planfile.types import Settings
from vramplan.runtime.applied import applied_to
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
# HEAD stands for the denoiser.
CASES = {
    "resident": {"placement": "resident", "decode": "vae_slicing"},
    "model": {"placement": "model_cpu_offload"},
    "leaf": {"placement": "group_offload:type=leaf"},
    "leaf with stream": {"placement.HEAD": "group_offload:type=leaf,stream=true", "placement.vae": "resident"},
    "block with stream": {"placement.HEAD": "group_offload:stream=true", "placement.vae": "resident"},
    "streaming": {
        "placement.HEAD": "weight_streaming:streamed=3,keep=1,locked=2",
        "placement.vae": "weight_streaming",
    },
    "disk": {"placement.text_encoder_2": "group_offload:disk=true", "placement.HEAD": "group_offload:disk=true"},
    "casting": {"weights.HEAD": "layerwise_casting", "placement": "group_offload:type=leaf"},
    "tiling": {"placement.HEAD": "group_offload:blocks=2", "decode": ("vae_slicing", "vae_tiling")},
    "sequential": {"placement": "sequential_cpu_offload"},
}
DENOISERS = {"sd15-small": "unet", "sdxl-small": "unet", "flux-small": "transformer", "cogvideox-small": "transformer"}
KINDS = {
    "resident": ("sd15-small",),
    "model": ("sd15-small",),
    "leaf": ("flux-small",),
    "leaf with stream": ("flux-small",),
    "block with stream": ("flux-small",),
    "streaming": ("flux-small", "sdxl-small"),
    "disk": ("flux-small",),
    "casting": ("flux-small",),
    "tiling": ("flux-small",),
    "sequential": ("cogvideox-small",),
}
ALL = os.environ.get("VRAMPLAN_FAULTS") == "all"
EACH = [(name, kind) for name, kinds in KINDS.items() for kind in (DENOISERS if ALL and len(kinds) > 1 else kinds)]
EVERY = 10_000 if ALL else 6


class Backend:
    """What group offloading asks of a device with streams, on the CPU."""

    def Stream(self):  # noqa: N802 - torch's name
        return SimpleNamespace(synchronize=lambda: None)

    def current_stream(self):
        return SimpleNamespace(synchronize=lambda: None)

    def is_available(self):
        return True

    def stream(self, _):
        return nullcontext()


def with_stream(module, onload_device, *, use_stream=False, **options):
    """diffusers' call, which refuses streams on the CPU before anything is done."""
    from diffusers.hooks import group_offloading

    if not use_stream:
        return group_offloading.apply_group_offloading(module, onload_device, **options)
    options = {"non_blocking": False, "record_stream": False, "low_cpu_mem_usage": False} | options
    options["offload_type"] = group_offloading.GroupOffloadingType(options["offload_type"])
    config = group_offloading.GroupOffloadingConfig(
        onload_device=onload_device, offload_device=torch.device("cpu"), stream=Backend().Stream(), **options
    )
    return group_offloading._apply_group_offloading(module, config)


@pytest.fixture(autouse=True)
def _card(monkeypatch, tmp_path):
    """The CPU stands in for a card with streams, and pins by copying."""
    import diffusers.hooks
    from diffusers.hooks import group_offloading

    monkeypatch.setattr(diffusers.hooks, "apply_group_offloading", with_stream)

    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "offload"))
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device=None: Backend())
    real = safetensors.torch.load_file
    monkeypatch.setattr(
        safetensors.torch,
        "load_file",
        # In memory of its own, as on any other device: the CPU adds differently where a file's are not aligned.
        lambda path, device="cpu": {key: tensor.clone() for key, tensor in real(path, device).items()},
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(vramplan.runtime.applied, "check_device", lambda *_: None)
    monkeypatch.setattr(vramplan.runtime.applied, "planned_accelerator", lambda plan, device: plan.machine.accelerator)


@pytest.fixture
def subject(request, small_pipeline, monkeypatch, tmp_path):
    """A pipeline, a plan for it, the device to put it on, and what it is."""
    name, kind = request.param
    pipe = small_pipeline(kind)
    settings = {key.replace("HEAD", DENOISERS[kind]): value for key, value in CASES[name].items()}
    plan = planned(pipe, kind, settings)
    spec = spec_from_pipeline(pipe)  # reading the pipeline changes nothing: it is read once
    monkeypatch.setattr(vramplan.runtime.applied, "spec_from_pipeline", lambda _: spec)
    device = "meta" if name == "sequential" else "cpu"
    return SimpleNamespace(pipe=pipe, kind=kind, plan=plan, device=device, name=name, folder=tmp_path / "offload")


def planned(pipe, kind, settings):
    """The plan with these settings, put together by hand where planning would refuse them."""
    names = ("height", "width", "num_frames", "num_inference_steps")
    sizes = {name: value for name, value in call_kwargs(kind).items() if name in names}
    made = vramplan.plan(pipe, device=MACHINE, settings={"placement": "resident"}, simulate=False, **sizes)
    parts = list(made.settings.placement)
    whole = settings.get("placement", "resident")
    placement = {part: settings.get(f"placement.{part}", whole) for part in parts}
    weights = {key.partition(".")[2]: text for key, text in settings.items() if key.startswith("weights.")}
    decode = settings.get("decode", ())
    decode = (decode,) if isinstance(decode, str) else decode
    return replace(made, settings=Settings(placement=placement, weights=weights, decode=decode))


def output(pipe, kind):
    return output_tensor(pipe(**call_kwargs(kind)))


@pytest.fixture(scope="module")
def untouched(small_pipeline):
    """The output of each untouched pipeline, made once."""
    return cache(lambda kind: output(small_pipeline(kind), kind))


def put_on(subject, plan=None):
    return vramplan.apply_plan(subject.pipe, plan or subject.plan, device=subject.device)


def rounded(subject):
    return bool(subject.plan.settings.weights)


# Here libraries take an error and go on: diffusers any RuntimeError, for a text that names no device (0.42,
# `ModelMixin.to`), safetensors any Exception, for an old torch (0.8, `storage_ptr`).
TAKEN = ("torch.device(arg)", "device_arg_or_kwarg_present = True", "return tensor.untyped_storage().data_ptr()")


class Met(NamedTuple):
    """What became of an error: where it was raised, nowhere if that was never reached, and whether nobody was told.

    What a library took is silent by right.
    """

    struck: list[faults.Line]
    silent: bool
    taken: bool


def struck_by(place, number, act):
    """Do it with an error at that place, which has to come out as it is where it comes out."""
    error, silent = faults.ERRORS[number % 3](), True
    try:
        with faults.failing_at(place, error) as struck:
            act()
    except type(error) as caught:
        assert caught is error, place
        silent = False
    del error  # and with it the frames that it came through
    taken = silent and any(linecache.getline(*line).strip() in TAKEN for line in struck)
    return Met(struck, silent and not taken, taken)


def places(act, undo=lambda: None):
    """Numbers of lines to fail at, over all of the act. What libraries do at their first call only is left out."""
    act()
    undo()
    found = faults.chosen(faults.lines_of(act))
    step = max(1, len(found) // EVERY)
    return sorted({*found[::step], *found[-3:]})


@pytest.mark.parametrize("subject", EACH, indirect=True, ids=" ".join)
def test_an_apply_that_fails_leaves_the_pipeline_as_it_was(subject, untouched):
    pipe = subject.pipe
    plain = untouched(subject.kind)
    witness = faults.Witness(pipe, subject.folder)
    if rounded(subject):  # nothing would take it off again: the lines are learned on a twin
        found = casting_places(subject)
    else:
        found = places(lambda: put_on(subject), lambda: applied_to(pipe).undo())
        applied_to(pipe).undo()
        assert not witness.wrong(objects=False)
    witness = faults.Witness(pipe, subject.folder)
    whole = []
    for number, place in enumerate(found):
        met = struck_by(place, number, lambda: put_on(subject))
        if met.silent:  # the apply before has left nothing to do there, or it was answered: put on without pinning
            assert not met.struck or applied_to(pipe).notes, met
        if applied_to(pipe) is not None:  # it had got to the end, or was put on again without pinning
            whole += [] if met.taken else [place]
            if rounded(subject):
                assert place in found[-3:]
                return
            applied_to(pipe).undo()
            assert not witness.wrong(objects=False), place
            witness = faults.Witness(pipe, subject.folder)
        assert not witness.wrong(), place
    assert witness.more_tensors() <= 0
    if "stream" not in subject.name and subject.name != "partial":
        assert set(whole) <= set(found[-3:]), found
    assert torch.equal(output(pipe, subject.kind), plain)


def casting_places(subject):
    from copy import deepcopy

    twins = [deepcopy(subject.pipe) for _ in range(2)]
    return places(lambda: vramplan.apply_plan(twins.pop(), subject.plan, device=subject.device))


UNDONE = [pair for pair in EACH if pair[0] != "casting"]


@pytest.mark.parametrize("subject", UNDONE, indirect=True, ids=" ".join)
def test_an_undo_that_fails_can_be_called_again_and_loses_nothing(subject, untouched):
    pipe = subject.pipe
    plain = untouched(subject.kind)
    witness = faults.Witness(pipe, subject.folder)
    applied = put_on(subject)
    found = places(lambda: applied_to(pipe).undo(), lambda: put_on(subject))
    assert not witness.wrong(objects=False)
    for number, place in enumerate(found):
        applied = put_on(subject)
        met = struck_by(place, number, applied.undo)
        assert not (met.silent and met.struck), met
        assert applied_to(pipe) in (applied, None)
        applied.undo()
        assert applied_to(pipe) is None
        assert not witness.wrong(objects=False), place
        del applied
    assert witness.more_tensors() <= 0
    assert torch.equal(output(pipe, subject.kind), plain)


REPLACED = [("leaf", "flux-small"), ("disk", "flux-small"), ("model", "sd15-small"), ("streaming", "flux-small")]


@pytest.mark.parametrize("subject", REPLACED, indirect=True, ids=" ".join)
def test_a_plan_that_cannot_replace_another_leaves_it_on(subject, untouched):
    pipe = subject.pipe
    plain = untouched(subject.kind)
    witness = faults.Witness(pipe, subject.folder)
    other = planned(pipe, subject.kind, {"placement": "group_offload:type=leaf,stream=false", "decode": "vae_slicing"})
    first = put_on(subject)

    def change():
        vramplan.apply_plan(pipe, other, device="cpu")

    for number, place in enumerate(places(change, lambda: put_on(subject))):
        put_on(subject)
        first = applied_to(pipe)
        met = struck_by(place, number, change)
        assert not (met.silent and met.struck), met
        on = applied_to(pipe)
        assert on is not None
        assert on is first or on.plan == other, place
        if number % 10 == 0:
            assert torch.equal(output(pipe, subject.kind), plain), place
        applied_to(pipe).undo()
        assert not witness.wrong(objects=False), place


@pytest.mark.diagonal("subject", "error")
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory\nmore"), MemoryError()],
)
@pytest.mark.parametrize(
    "subject", [("leaf with stream", "flux-small"), ("block with stream", "flux-small")], indirect=True, ids=" ".join
)
def test_weights_that_cannot_be_pinned_are_pinned_on_the_fly_and_it_is_told(subject, untouched, monkeypatch, error):
    pipe, calls = subject.pipe, [0]
    plain = untouched(subject.kind)
    witness = faults.Witness(pipe, subject.folder)

    def pin(self):
        calls[0] += 1
        if calls[0] == 20:
            raise error
        return self.clone()

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "pin_memory", pin)
        applied = put_on(subject)
    assert calls[0] == 20  # and not once more: pinned on the fly, while a forward runs
    assert type(error).__name__ in applied.notes[0]
    assert "low_cpu_mem_usage" in applied.notes[0]
    assert "\n" not in applied.notes[0]
    assert any("low_cpu_mem_usage=True" in call for call in applied.calls)
    assert applied.plan is subject.plan
    assert torch.equal(output(pipe, subject.kind), plain)
    applied.undo()
    assert not witness.wrong(objects=False)


@pytest.mark.parametrize("subject", [("leaf", "flux-small")], indirect=True, ids=" ".join)
def test_without_pinned_weights_nothing_is_tried_again(subject, monkeypatch):
    tried = []

    def fails(*_, **__):
        tried.append(1)
        raise RuntimeError("broken")

    monkeypatch.setattr(vramplan.runtime.applied, "apply_settings", fails)
    with pytest.raises(RuntimeError, match="broken"):
        put_on(subject)
    assert len(tried) == 1


CHILD = """
import json, os, signal, sys, traceback
sys.path[:0] = sys.argv[1].split(os.pathsep)
from dataclasses import replace
from types import SimpleNamespace
import diffusers.hooks.group_offloading as offloading
import torch
import vramplan
import vramplan.runtime.applied
import vramplan.runtime.snapshot
from tests.support.calls import call_kwargs, output_tensor
from make_pipeline import build
from vramplan.runtime.applied import applied_to
from vramplan.pipeline.component import hooks_of
from vramplan.pipeline.live import modules_of

torch.set_num_threads(1)
pipe = build("flux-small")
pipe.set_progress_bar_config(disable=True)
sizes = {"height": 64, "width": 64, "simulate": False}
plan = vramplan.plan(pipe, device="cpu", **sizes)
disk = {"text_encoder_2": "group_offload:disk=true", "transformer": "group_offload:blocks=1"}
texts = dict.fromkeys(plan.settings.placement, "resident") | disk
plan = replace(plan, settings=replace(plan.settings, placement=texts))
card = vramplan.hardware.types.Accelerator(kind="cuda", index=0, name="x", total_bytes=1 << 33, free_bytes=1 << 33)
vramplan.runtime.applied.planned_accelerator = lambda *_: card
plain = output_tensor(pipe(**call_kwargs("flux-small")))

def meet(fault):
    exec(fault, globals())
    try:
        vramplan.apply_plan(pipe, plan, device="cpu")
    except BaseException as error:
        print(type(error).__name__, error)
    assert applied_to(pipe) is None, applied_to(pipe).calls
    assert not any(map(hooks_of, modules_of(pipe).values()))
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), plain)
    print("as it was, files:", sum(len(files) for _, _, files in os.walk(os.environ["VRAMPLAN_OFFLOAD"])))

for folder, fault in json.load(sys.stdin):
    process = os.fork()
    if process:
        os.waitpid(process, 0)
        continue
    os.environ["VRAMPLAN_OFFLOAD"] = folder
    sys.stdout = open(folder + ".out", "w")
    try:
        meet(fault)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
    os._exit(0)
"""
CTRL_C_TWICE = """
real, count = offloading.ModuleGroup.offload_, [0]
def offload_(self):
    real(self)
    count[0] += 1
    if count[0] == 7:
        os.kill(os.getpid(), signal.SIGINT)
offloading.ModuleGroup.offload_ = offload_
put_back = vramplan.runtime.snapshot.Snapshot.put_back
def impatient(self):
    os.kill(os.getpid(), signal.SIGINT)
    put_back(self)
    print("put back whole")
vramplan.runtime.snapshot.Snapshot.put_back = impatient
"""
SHORT_FILES = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""
ROOM_WHEN_ASKED = "vramplan.strategies.disk.shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 40)"
FILE_SIZES = [60_000, 20_000] if ALL else [60_000]
DISK_SIZES = ["256k", "64k"] if ALL else ["256k"]
FAULTS = {
    "ctrl-c": CTRL_C_TWICE,
    **{f"files of {size}": SHORT_FILES.format(size=size) for size in FILE_SIZES},
    **{f"full at {size}": ROOM_WHEN_ASKED for size in DISK_SIZES},
    "small": "",
    "read-only": "",
}
# A disk of its own for each of these, seen by nobody else.
MOUNTED = {
    **{f"full at {size}": f"size={size}" for size in DISK_SIZES},
    "small": "size=256k",
    "read-only": "size=30g,ro",
}


@pytest.fixture(scope="module")
def told_of(tmp_path_factory):
    """The lines of a process that applies the plan while this fault happens to it, and goes on.

    One process makes the pipeline, and a copy of it meets each fault.
    """
    top = tmp_path_factory.mktemp("faults")
    folders = {name: str(top / f"offload-{number}") for number, name in enumerate(FAULTS)}
    for name in MOUNTED:
        Path(folders[name]).mkdir()
    mounts = [f"mount -t tmpfs -o {options} none {folders[name]}" for name, options in MOUNTED.items()]
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
    can_mount = shutil.which("unshare") is not None and not subprocess.run([*alone, "true"], check=False).returncode
    faults_met = {name: fault for name, fault in FAULTS.items() if can_mount or name not in MOUNTED}
    project = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (project, project / "examples")))
    run = [*(alone if can_mount else ()), sys.executable, "-c", CHILD, paths]
    given = json.dumps([(folders[name], fault) for name, fault in faults_met.items()])
    done = subprocess.run(run, input=given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    def lines(name):
        if name not in faults_met:
            pytest.skip("no disk may be mounted here")
        return Path(folders[name] + ".out").read_text(encoding="utf-8").splitlines()

    return lines


def test_ctrl_c_twice_while_it_is_put_on(told_of):
    assert told_of("ctrl-c") == [
        "put back whole",
        "KeyboardInterrupt ",
        "as it was, files: 0",
    ]


@pytest.mark.parametrize("size", FILE_SIZES)
def test_a_disk_that_takes_no_more_of_a_file(told_of, size):
    told = told_of(f"files of {size}")
    assert told[0].startswith("VramplanError")
    assert "text_encoder_2 cannot be offloaded there" in told[0]
    assert "File too large" in told[0]
    assert told[1:] == ["as it was, files: 0"]


@pytest.mark.parametrize("size", DISK_SIZES)
def test_a_disk_that_is_full_though_there_was_room_when_it_was_asked(told_of, size):
    told = told_of(f"full at {size}")
    assert told[0].startswith("VramplanError")
    assert "text_encoder_2 cannot be offloaded there" in told[0]
    assert "No space left on device" in told[0]
    assert told[1:] == ["as it was, files: 0"]


def test_a_disk_that_is_too_small_is_told_before_a_weight_is_moved(told_of):
    told = told_of("small")
    assert "256 KiB free on the disk" in told[0]
    assert "VRAMPLAN_OFFLOAD" in told[0]
    assert told[1:] == ["as it was, files: 0"]


def test_a_folder_that_is_read_only(told_of):
    told = told_of("read-only")
    assert told[0].startswith("VramplanError")
    assert "offloaded there: Read-only file system" in told[0]
    assert told[1:] == ["as it was, files: 0"]
