"""Cards for a model, the largest a card can make, and models for a card."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import vramplan
from tests.support.specs import GIB, card
from vramplan.api import fit as fitting
from vramplan.cli.main import main
from vramplan.errors import NothingFitsError, UsageError
from vramplan.fitting.cards import card_sizes
from vramplan.hardware.types import Hardware, Host
from vramplan.planfile.types import all_stock
from vramplan.profiles.catalogue import device_names
from vramplan.strategies.base import QUALITIES

SMALL = {"height": 64, "width": 64, "steps": 2}


def machine(vram: int) -> Hardware:
    host = Host(total_bytes=64 * GIB, available_bytes=60 * GIB)
    return Hardware(accelerators=(card(vram),), host=host)


# Some of each of three kinds of card, up to one that holds everything.
FEW = {"rtx-3050-laptop", "arc-a750", "rtx-a6000", "gtx-1650", "t4", "v100-32gb", "m1-8gb", "m1-16gb", "m2-max-96gb"}


@pytest.fixture(scope="module")
def cards() -> vramplan.Fits:
    with pytest.MonkeyPatch.context() as patch:
        few = tuple(size for size in card_sizes() if size.name in FEW)
        assert len(few) == len(FEW)
        patch.setattr(fitting, "card_sizes", lambda: few)
        return vramplan.fit("stable-diffusion-1.5", simulate=False, ram="32GiB")


def test_with_stock_it_runs_as_the_stock_plan_does() -> None:
    memory = {"vram": "2GiB", "ram": "8GiB"}
    own, stock = (
        vramplan.fit("stable-diffusion-1.5", device=machine(24 * GIB), simulate=False, **memory, stock=stock).rows[0]
        for stock in (False, True)
    )
    assert own.settings is not None
    assert stock.settings is not None
    assert (all_stock(own.settings), all_stock(stock.settings)) == (False, True)
    with pytest.raises(UsageError, match="encode_first is vramplan's own"):
        vramplan.fit("flux.1-dev", stock=True, simulate=False, settings={"placement.text_encoder": "encode_first"})


def test_every_device_profile_is_in_one_size_and_none_is_smaller_than_its_least() -> None:
    sizes = card_sizes()
    named = [name for size in sizes for name in (size.name, *size.alike)]
    assert sorted(named) == list(device_names())
    assert [size.memory_bytes for size in sizes] == sorted(size.memory_bytes for size in sizes)


def test_the_smallest_card_runs_it_and_the_one_before_does_not(cards: vramplan.Fits) -> None:
    assert (cards.question, cards.fits) == ("cards", True)
    assert [item.allow for item in cards.smallest] == ["lossless", "near_lossless", "lossy"]
    for item in cards.smallest:
        assert item.row is not None
        assert item.row.device is not None
        assert item.least_vram_bytes is not None
        assert item.row.projected is not None
        assert item.least_vram_bytes <= item.row.projected.vram_reserved_bytes
        assert item.row.quality is not None
        assert QUALITIES.index(item.row.quality) <= QUALITIES.index(item.allow)
        made = vramplan.plan("stable-diffusion-1.5", device=item.row.device, ram="32GiB", simulate=False)
        assert made.settings == item.row.settings
    less = [row for row in cards.rows if row.memory_bytes < cards.smallest[0].row.memory_bytes]
    assert not [row for row in less if row.fits and row.quality == "lossless"]


def test_the_rows_go_up_and_end_where_everything_is_resident(cards: vramplan.Fits) -> None:
    memory = [row.memory_bytes for row in cards.rows if row.memory_bytes is not None]
    assert memory == sorted(memory)
    kinds = {size.name: size.kind for size in card_sizes() if size.name in FEW}
    last = {kinds[row.device]: row for row in cards.rows if row.device is not None}
    assert last.keys() == set(kinds.values())
    assert all(row.settings and set(row.settings.placement.values()) == {"resident"} for row in last.values())


def test_one_simulation_serves_every_card(small_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.api import plan as planning

    made: list[object] = []
    real = planning.cost_model

    def counted(*args: object) -> object:
        made.append(args)
        return real(*args)

    monkeypatch.setattr(planning, "cost_model", counted)
    few = tuple(size for size in card_sizes() if size.name in FEW | {"strix-halo-128gb"})
    monkeypatch.setattr(fitting, "card_sizes", lambda: few)
    found = vramplan.fit(str(small_folder("sd15-small")), ram="16GiB", allow="lossless", **SMALL)
    kinds = {size.name: size.kind for size in card_sizes()}
    # A card with unified memory shares a simulation with one of the same kernels, and so do cards that differ in how
    # they compute bfloat16, as the pipeline is in float32.
    kernels = {(*kinds[row.device][2:4], *kinds[row.device][5:]) for row in found.rows if row.device is not None}
    assert len(made) == len(kernels) < len(found.rows)
    assert all(item.row and item.row.confirmed for item in found.smallest)


@pytest.mark.parametrize(("dimension", "given"), [("batch", {}), ("size", {}), ("frames", {"frames": 9})])
def test_the_largest_fits_and_the_next_does_not(small_folder, dimension: str, given: dict[str, int]) -> None:
    name = str(small_folder("cogvideox-small" if given else "sd15-small"))
    at, plain = machine(24 * GIB), {"decode": "plain"}
    options = {"device": at, "settings": plain, "simulate": False, "steps": 2}
    roomy = vramplan.plan(name, **options, height=64, width=64, **given)
    options["vram"] = str(roomy.projected.vram_reserved_bytes * 12 // 10)
    found = vramplan.fit(name, **options, largest=dimension, height=64, width=64, **given)
    again = vramplan.fit(name, **options, largest=dimension, height=64, width=64, **given)
    assert found == again
    (row,), (beyond,) = found.rows, found.largest
    assert row.fits
    assert row.projected is not None
    assert row.projected.vram_reserved_bytes <= int(str(options["vram"]))
    assert beyond.next is not None
    assert "short by" in beyond.next.reason
    names = {"batch": "num_images_per_prompt", "size": "height", "frames": "num_frames"}
    assert getattr(row.workload, names[dimension]) < getattr(beyond.next.workload, names[dimension])
    larger = {
        key: getattr(beyond.next.workload, key) for key in ("height", "width", "num_frames", "num_images_per_prompt")
    }
    with pytest.raises(NothingFitsError):
        vramplan.plan(name, **options, **larger)


def test_the_largest_is_simulated_within_the_budget(small_folder) -> None:  # 10 s: batches are searched by simulating
    name = str(small_folder("sd15-small"))
    found = vramplan.fit(name, device=machine(GIB), vram="96MiB", largest="batch", **SMALL)
    (row,), (beyond,) = found.rows, found.largest
    assert row.confirmed == row.fits
    assert row.fits
    assert row.workload.num_images_per_prompt > 1
    assert beyond.next is None or not beyond.next.fits


def test_models_come_with_the_most_faithful_and_fastest_first_and_what_does_not_fit_last() -> None:
    names = ["flux.1-dev", "stable-diffusion-1.5"]
    found = vramplan.fit(names, device=machine(8 * GIB), simulate=False, vram="1200MiB")
    assert {row.model for row in found.rows} == set(names)
    assert [row.fits for row in found.rows] == sorted((row.fits for row in found.rows), reverse=True)
    assert found.rows[-1].model == "flux.1-dev"
    assert "short by" in found.rows[-1].reason
    assert found.rows[0].fits


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one model"):
        vramplan.fit([])
    with pytest.raises(UsageError, match="the axes are"):
        vramplan.fit("stable-diffusion-1.5", simulate=False, settings={"nonsense": "resident"})
    with pytest.raises(UsageError, match="makes pictures"):
        vramplan.fit("stable-diffusion-1.5", device="rtx-4070", simulate=False, largest="frames")
    with pytest.raises(UsageError, match="makes sound, which has no size"):
        vramplan.fit("stable-audio-open", device="rtx-4070", simulate=False, largest="size")
    with pytest.raises(UsageError, match="makes sound: leave `height` and `width` out"):
        vramplan.plan("stable-audio-open", device="rtx-4070", simulate=False, height=512)


class TestCommandLine:
    def call(self, *args: str) -> object:
        return CliRunner().invoke(main, ["fit", *args])

    def test_json_has_the_keys_scripts_rely_on(self, small_folder) -> None:
        sized = ("--height", "64", "--width", "64", "--steps", "2", "--ram", "16GiB")
        done = self.call(str(small_folder("sd15-small")), "--device", "rtx-3060", *sized, "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["schema_version"] == 1
        assert (found["question"], found["fits"]) == ("models", True)
        (row,) = found["rows"]
        assert {"model", "device", "memory_bytes", "fits", "confirmed", "reason", "settings", "quality"} <= row.keys()
        assert {"vram_reserved_bytes", "seconds_per_call"} <= row["projected"].keys()

    def test_nothing_fits_is_exit_code_3_and_the_table_is_printed(self) -> None:
        small = ("--height", "64", "--width", "64", "--steps", "2")
        done = self.call("stable-diffusion-1.5", "--device", "rtx-3060", "--vram", "64MiB", "--ram", "1GiB", *small)
        assert done.exit_code == 3, done.output
        assert "stable-diffusion-1.5" in done.stdout
        assert done.stderr.count("\n") == 1
        assert "short by" in done.stderr

    @pytest.mark.parametrize(
        "args",
        [(), ("nobody/nothing",), ("flux.1-dev", "--largest", "colour"), ("flux.1-dev", "--device", "rtx-9999")],
    )
    def test_bad_input_is_one_line(self, args: tuple[str, ...]) -> None:
        done = self.call(*args)
        assert done.exit_code == 2, done.output
        assert done.stdout == ""
        assert done.stderr.startswith("vramplan: ")
        assert done.stderr.count("\n") == 1
