"""What a person sees, in a real headless Chromium: the page of `vramplan ui`, pictures as HTML, and notebook forms.

One browser, one server and one pipeline serve all of them. Without a Chromium they skip; with CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vramplan
from vramplan.api.simulate import simulate_plan
from vramplan.planfile.types import Plan
from vramplan.simulator.types import Simulation
from vramplan.view.plot.save import save_picture

pytestmark = pytest.mark.xdist_group("browser")

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE_MS = 300_000  # a machine that does more than this; nothing waits longer than it must
SCREENS = [(390, "dark"), (1280, "light")]  # what depends on the width does not depend on the colours

# The ratio of luminances of a colour on another, as the Web Content Accessibility Guidelines 2.1 define it.
CONTRAST = """
(selector) => {
  const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = colour => numbers(colour).map(part => part / 255)
    .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(selector)].filter(item => item.getBoundingClientRect().width)
    .map(item => getComputedStyle(item)).map(style => light(style.fill === 'rgb(0, 0, 0)' ? style.color : style.fill))
    .map(text => (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05));
}
"""


def missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing("no Chromium is installed: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A new page that says what it asked for and what went wrong in it."""
    made = browser.new_page()
    made.set_default_timeout(PATIENCE_MS)
    made.asked, made.wrong = [], []
    made.on("request", lambda request: made.asked.append(request.url))
    made.on("pageerror", lambda error: made.wrong.append(str(error)))
    made.on("console", lambda said: made.wrong.append(said.text) if said.type == "error" else None)
    yield made
    made.close()


@pytest.fixture(scope="session")
def model(small_folder: Callable[[str], Path]) -> Path:
    return small_folder("sd15-small")


@pytest.fixture(scope="session")
def plan(model: Path) -> Plan:
    """What the page makes too: its simulations are kept, and not run twice."""
    return vramplan.plan(str(model), device="rtx-3060")


@pytest.fixture(scope="session")
def simulation(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(vramplan.dump_plan(plan), encoding="utf-8")
    return simulate_plan(path, timeline=True)


def fits_the_screen(page: Any, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, once the figures have followed it."""
    page.set_viewport_size({"width": width, "height": 850})
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def stand_apart(page: Any) -> None:
    """Each figure of the page is seen, whole and below the one before it."""
    page.wait_for_function("""() => {
      const boxes = [...document.querySelectorAll('section')].filter(part => !part.hidden)
        .map(part => [part, part.querySelector('.main-svg')].map(item => item.getBoundingClientRect()));
      return boxes.every(([part, drawn], place) => drawn.height > 300 && drawn.bottom <= part.bottom + 1
        && (place === 0 || drawn.top >= boxes[place - 1][1].bottom));
    }""")


def is_legible(page: Any, selector: str, scheme: str) -> None:
    """The ground is of the scheme, and text stands out from it: 4.5 to 1, level AA for text of this size."""
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    page.wait_for_function(
        f"selector => {{ const all = ({CONTRAST})(selector); return all.length && Math.min(...all) >= 4.5; }}",
        arg=selector,
    )


class TestHtml:
    @pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
    def test_a_picture_is_one_file_that_hovers_and_is_legible(
        self, page: Any, tmp_path: Path, simulation: Simulation, plan: Plan, width: int, scheme: str
    ) -> None:
        page.context.set_offline(True)
        for shown, words in ((simulation, "denoise decode activations unet"), (plan, "chosen fits")):
            path = tmp_path / "picture.html"
            save_picture(path, shown)
            page.goto(path.as_uri())
            page.wait_for_selector("#picture .scatterlayer")
            fits_the_screen(page, width, scheme)
            is_legible(page, "h1, p, #picture .xtick text, #picture .ytick text, #picture .legendtext", scheme)
            assert all(word in page.text_content("#picture") for word in words.split())
            page.wait_for_function(
                "[...document.querySelectorAll('#picture text')].map(item => item.getBoundingClientRect())"
                ".every(box => !box.width || (box.left >= 0 && box.right <= innerWidth))"
            )
            self.hovers(page)
        assert {url.split(":")[0] for url in page.asked} <= {"file", "data", "blob"}
        assert page.wrong == []

    def hovers(self, page: Any) -> None:
        box = page.locator("#picture .nsewdrag").first.bounding_box()
        point = page.locator("#picture .point").last
        at = point.bounding_box() if point.count() else None
        middle = at or {"x": box["x"], "y": box["y"], "width": box["width"], "height": box["height"]}
        page.mouse.move(middle["x"] + middle["width"] / 2 - 3, middle["y"] + middle["height"] / 2)
        page.mouse.move(middle["x"] + middle["width"] / 2, middle["y"] + middle["height"] / 2)
        page.wait_for_selector("#picture .hoverlayer .hovertext, #picture .hoverlayer .legend")
        assert "GiB" in page.text_content("#picture .hoverlayer")

    def test_a_notebook_shows_plan_and_simulation(
        self, page: Any, tmp_path: Path, simulation: Simulation, plan: Plan
    ) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "notebook.html"
        path.write_text(f"<meta charset=utf-8>{plan._repr_html_()}{simulation._repr_html_()}", encoding="utf-8")
        page.goto(path.as_uri())
        assert page.evaluate("[...document.images].map(item => item.naturalWidth > 900)") == [True, True]
        assert "chosen" in page.inner_text("body")
        assert page.wrong == []


def choose(page: Any, field: str, text: str) -> None:
    """The first of what is found by this text."""
    page.click(f"#{field}")
    page.fill(".dash-dropdown-search", text)
    page.click(f".dash-dropdown-options .dash-dropdown-option:has-text('{text}') >> nth=0")


class TestUi:
    def test_a_plan_appears_and_changes_with_what_is_chosen(self, page: Any, address: str) -> None:
        page.goto(address)
        choose(page, "model", "sd15-small")
        choose(page, "device", "GeForce RTX 3060 12 GB")
        page.wait_for_selector("#row-for:text('64 x 64')")
        assert page.inner_text("#row-chosen") == "resident"
        assert "GiB VRAM" in page.inner_text("#row-fits")
        page.click("summary:has-text('diffusers')")
        assert "StableDiffusionPipeline.from_pretrained" in page.inner_text("#code")
        page.wait_for_selector("#memory .scatterlayer")
        before = page.inner_text("#words")
        assert page.locator("#frames").is_disabled()

        page.fill("#width", "128")
        page.press("#width", "Enter")
        page.wait_for_selector("#row-for:text('128 x 64')")
        page.wait_for_function("before => document.querySelector('#words').innerText != before", arg=before)
        for width, scheme in SCREENS:
            fits_the_screen(page, width, scheme)
            stand_apart(page)
            is_legible(page, "dd, dt, label, summary, #memory .legendtext, #memory .ytick text", scheme)

        page.fill("#vram", "0.01")
        page.press("#vram", "Enter")
        page.wait_for_selector("[role=alert]:has-text('short by')")
        page.wait_for_selector("#helps li:has-text('a larger card')")
        assert page.locator("#memory-part").is_hidden()
        fits_the_screen(page, 390, "dark")

        assert len(page.asked) > 10
        assert [url for url in page.asked if not url.startswith((address, "data:", "blob:"))] == []
        assert page.wrong == []
