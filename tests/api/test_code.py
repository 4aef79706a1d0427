"""The stock plan of a request as a script that needs no vramplan."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from make_pipeline import SMALL_KINDS

import vramplan
from tests.support.calls import output_tensor
from tests.support.families import FAMILIES, make_family
from tests.support.specs import GIB, card
from vramplan.api.code import stock_code
from vramplan.errors import NothingFitsError, UsageError, VramplanError
from vramplan.hardware.types import Hardware, Host
from vramplan.planfile.file import dump_plan, parse_plan
from vramplan.runtime.call import call_arguments

MACHINE = Hardware(accelerators=(card(8 * GIB),), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
FIRST = {"placement.text_encoder": "encode_first"}
PROMPT = "a photo of a red fox in the snow"


def make_plan(folder: Any, **options: Any) -> Any:
    usual = {"device": MACHINE, "height": 64, "width": 64, "steps": 2, "simulate": False}
    return vramplan.plan(str(folder), **usual | ({"frames": 9} if "cogvideox" in str(folder) else {}) | options)


def run(code: str) -> Any:
    """The result of the script on the CPU."""
    names: dict[str, Any] = {}
    code = code.replace("cuda:0", "cpu").replace("result = pipe(", 'result = pipe(output_type="pt", ')
    exec(compile(code, "stock", "exec"), names)
    return names["result"]


@pytest.mark.diagonal("kind", "settings")
@pytest.mark.parametrize("settings", [{}, FIRST, FIRST | {"placement.vae": "group_offload:type=leaf"}])
@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_it_calls_the_pipeline_as_planned_and_names_no_vramplan(small_folder, small_pipeline, kind, settings) -> None:
    plan = make_plan(small_folder(kind), settings=settings)
    code = stock_code(plan)
    assert "import vramplan" not in code
    assert "from vramplan" not in code
    assert "height=64, width=64" in code
    assert "num_inference_steps=2" in code
    pipe = small_pipeline(kind)
    want = pipe(**call_arguments(pipe, plan, PROMPT), output_type="pt")
    assert torch.equal(output_tensor(run(code)), output_tensor(want))


def test_it_runs_where_vramplan_cannot_be_imported(small_folder) -> None:
    code = stock_code(make_plan(small_folder("sd15-small"), settings=FIRST | {"placement.unet": "resident"}))
    blocked = f"import sys; sys.modules['vramplan'] = None\n{code.replace('cuda:0', 'cpu')}\nprint(len(result.images))"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "1\n", done.stderr


def test_it_says_what_it_costs_in_time(small_folder) -> None:
    plan = make_plan(small_folder("sd15-small"), settings=FIRST)
    slower = plan.stock.projected.seconds_per_call / plan.projected.seconds_per_call
    assert stock_code(plan).splitlines()[1].startswith(f"# stock: {slower:.2f}x the time, ")
    stock = make_plan(small_folder("sd15-small"), settings={"placement": "resident"})
    assert stock_code(stock).splitlines()[1] == "# stock: the plan itself"


def test_it_loads_in_the_stock_plans_own_order(small_folder) -> None:
    plan = make_plan(small_folder("flux-small"), settings=FIRST, stock=False)
    turned = replace(plan.stock.projected.load, order=plan.stock.projected.load.order[::-1])
    plan = replace(plan, stock=replace(plan.stock, projected=replace(plan.stock.projected, load=turned)))
    lines = [line for line in stock_code(plan).splitlines() if line.startswith("pipe.") and "from_pretrained" in line]
    assert tuple(line.split()[0].removeprefix("pipe.") for line in lines) == turned.order


def test_a_chunked_decode_is_in_the_call_and_what_only_the_user_knows_is_open(tmp_path) -> None:
    work = FAMILIES["stable-video"].workload
    make_family("stable-video").save_pretrained(tmp_path)
    size = {"height": work.height, "width": work.width, "num_frames": work.num_frames}
    settings = {"placement": "resident", "decode": "decode_chunk_size:frames=1"}
    code = stock_code(vramplan.plan(str(tmp_path), device=MACHINE, simulate=False, settings=settings, **size))
    call = code.splitlines()[-1]
    assert "\nimage = ...  # your own\n" in code
    assert "image=image" in call
    assert "decode_chunk_size=1" in call
    assert f"num_frames={work.num_frames}" in call


def test_where_no_stock_plan_fits_it_says_so() -> None:
    plan = vramplan.plan("stable-diffusion-xl", device="rtx-4090", vram="3GiB", ram="1GiB", simulate=False)
    with pytest.raises(NothingFitsError, match=r"no stock plan: nothing fits; the nearest candidate: .* short by"):
        stock_code(plan)


def test_an_older_plan_records_none(small_folder) -> None:
    plan = make_plan(small_folder("sd15-small"), settings=FIRST)
    with pytest.raises(VramplanError, match="records no stock plan: make the plan again"):
        stock_code(parse_plan(dump_plan(replace(plan, stock=None))))


def test_a_live_pipeline_has_nothing_to_load_from(small_pipeline) -> None:
    plan = vramplan.plan(small_pipeline("sd15-small"), device=MACHINE, height=64, width=64, simulate=False)
    with pytest.raises(UsageError, match="made from a live pipeline"):
        stock_code(plan)
