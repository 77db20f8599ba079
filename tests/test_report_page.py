"""The report in a real browser: what is drawn, what its controls do, who can use it, and that it asks for nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from mbq.report import report
from tests.report_folders import HOSTILE, SENSITIVITY, WRONG, search_rows, write_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "Chromium and its driver are not installed, so the page is not tested in a browser; run make browser."

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
)
WIDE, PHONE = (1200, 900), (360, 740)


class Page:
    """The page in a tab."""

    def __init__(self, driver: webdriver.Chrome, path: Path) -> None:
        self.driver, self.path = driver, path

    def open(self, size: tuple[int, int] = WIDE, dark: bool = False, still: bool = False) -> Page:
        media = {"prefers-color-scheme": "dark" if dark else "light"}
        media["prefers-reduced-motion"] = "reduce" if still else "no-preference"
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # what earlier pages left
        self.driver.get(self.path.as_uri())
        WebDriverWait(self.driver, 20).until(lambda _: self.run("return document.documentElement.dataset.drawn"))
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def marks(self, chart: str, kind: str) -> int:
        """How many marks of a kind a chart shows, all layers together."""
        return len(
            self.all(
                f"#chart-{chart} .mark-{kind}.role-mark > path, #chart-{chart} .mark-{kind}.role-mark > line,"
                f"#chart-{chart} .mark-{kind}.role-mark > text"
            )
        )

    def settle(self) -> None:
        """Until what the controls changed is drawn: two frames."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30)))"
        )

    def choose(self, selector: str, value: str) -> None:
        Select(self.one(selector)).select_by_value(value)
        self.settle()

    def cards(self) -> list[Any]:
        return [card for card in self.all(".card") if card.is_displayed()]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return report([write_runs(folder / "runs")], folder / "report.html")


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    if CHROMIUM is None or DRIVER is None:
        if os.environ.get("MBQ_BROWSER") == "required":
            pytest.fail(MISSING, pytrace=False)
        pytest.skip(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, html: Path) -> Page:
    return Page(driver, html).open()


def test_it_loads_without_a_word_on_the_console_and_asks_for_nothing(page: Page) -> None:
    assert page.driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [address for address in asked if not address.startswith("data:")] == [page.path.as_uri()]
    entries = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in entries if not name.startswith("data:")] == []


def test_its_policy_stops_what_would_ask(page: Page) -> None:
    """Pictures of elsewhere, requests and scripts that somehow got into the page."""
    stopped = page.driver.execute_async_script("""
        const done = arguments[0], found = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          found.push(event.effectiveDirective);
          if (found.length === 3) done(found);
        });
        new Image().src = "http://127.0.0.1:9/picture.png";
        fetch("http://127.0.0.1:9/data").catch(() => {});
        const script = document.createElement("script");
        script.textContent = "window.harmed = 1";
        document.body.append(script);
        setTimeout(() => done(found), 3000);
    """)
    assert sorted(stopped) == ["connect-src", "img-src", "script-src-elem"]
    assert page.run("return window.harmed") is None


def test_words_of_files_stay_words(page: Page) -> None:
    """Questions and answers hold scripts and pictures with handlers; tooltips are made by the chart library."""
    for option in ("wrong", "lost", "gained"):
        page.choose("#direction0", option)
    assert page.run("return window.harmed") is None
    assert page.all("main img[src=x]") == []
    assert "<script>window.harmed = 1</script>" in page.one("#questions0 h3").get_attribute("textContent")
    page.open(still=True)
    point = page.one("#chart-alphas .mark-text.role-mark > text")
    page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)

    def tooltip(_: Any) -> Any:
        ActionChains(page.driver).move_to_element_with_offset(point, 1, 1).move_to_element(point).perform()
        return [each for each in page.all("#vg-tooltip-element") if each.is_displayed()]

    [shown] = WebDriverWait(page.driver, 10).until(tooltip)
    assert f"left alone {HOSTILE}" in " ".join(shown.text.split())
    assert page.run("return window.harmed") is None


def test_charts_have_a_mark_for_every_number(page: Page) -> None:
    positive = sum(value > 0 for side in ("language", "vision") for value in SENSITIVITY[side]["attn"])
    assert page.marks("gradients", "symbol") == positive
    raised = 4  # the floor lifts them all above 0
    measured = sum(value > 0 for value in SENSITIVITY["vision"]["attn"])
    assert page.marks("ratios", "symbol") == measured + raised
    chosen = sum(row["alpha"] is not None for row in search_rows())
    assert page.marks("alphas", "rect") == chosen + 1  # and the frame around the chosen one
    assert page.marks("alphas", "text") == len(search_rows()) - chosen
    assert page.marks("losses", "symbol") == 20 + 1
    assert page.marks("means0", "symbol") == len(WRONG) * 2
    assert page.marks("differences0", "symbol") == 3
    assert page.marks("errors", "symbol") == 4 + 4
    assert page.marks("steps", "rect") == 2 * 4
    for chart in page.all("[data-chart]"):
        assert chart.find_elements(By.CSS_SELECTOR, "svg[role='graphics-document'][aria-label], svg [aria-label]")


def test_controls_choose_what_charts_show(page: Page) -> None:
    page.choose("#diagnosis-part", "mlp")
    assert page.marks("errors", "symbol") == 4  # no vision tokens there
    page.choose("#diagnosis-error", "own")
    page.choose("#diagnosis-part", "attn")
    assert page.marks("errors", "symbol") == 8
    wanted = "Block 0, attention, error of the block alone: language 0.005, vision 0.01."
    assert page.one("#diagnosis .readout").text == wanted
    row = next(row for row in search_rows() if row["block"] == 2 and row["group"] == "down")
    slider = page.one("#search-block")
    slider.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.choose("#search-group", "down")
    said = page.one("#search .readout").text
    assert said.startswith(f"Block 2, down: alpha {row['alpha']:.2f}, loss {min(row['losses']):.3g}")
    page.choose("#search-group", "o")
    assert page.marks("losses", "symbol") == 0
    assert page.one("#search .readout").text == f"Block 2, o: {HOSTILE}."


def test_a_click_on_a_cell_chooses_its_group(page: Page) -> None:
    cells = page.all("#chart-alphas .mark-rect.role-mark > path[aria-label*='block: 3']")
    cell = next(cell for cell in cells if "gate_up" in cell.get_attribute("aria-label"))
    page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", cell)
    ActionChains(page.driver).move_to_element(cell).click().perform()
    page.settle()
    assert page.one("#search-group").get_attribute("value") == "gate_up"
    assert page.one("#search-block").get_attribute("value") == "3"
    assert page.one("#search .readout").text.startswith("Block 3, gate_up: alpha")


def test_the_filter_shows_the_questions_that_fit(page: Page) -> None:
    def fitting(model: str, task: str | None, before: bool | None, after: bool | None) -> int:
        places = {(task, index) for wrong in WRONG.values() for task, each in wrong.items() for index in each}
        return sum(
            (task in (None, place[0]))
            and before in (None, place[1] not in WRONG["float"].get(place[0], set()))
            and after in (None, place[1] not in WRONG[model].get(place[0], set()))
            for place in places
        )

    assert len(page.cards()) == fitting("W3A16-mbq", None, None, None)
    for model in ("W3A16-mbq", "W3A16-rtn"):
        page.choose("#model0", model)
        for direction, before, after in (("lost", True, False), ("gained", False, True), ("wrong", False, False)):
            page.choose("#direction0", direction)
            assert len(page.cards()) == fitting(model, None, before, after) > 0 or direction == "wrong"
            page.choose("#task0", "shapes")
            wanted = fitting(model, "shapes", before, after)
            assert len(page.cards()) == wanted
            assert page.one("#questions0 .readout").text.startswith(f"{wanted} of ")
            page.choose("#task0", "")
    page.choose("#direction0", "")
    pictures = [image for card in page.cards() for image in card.find_elements(By.TAG_NAME, "img")]
    assert pictures
    assert all(
        page.run("return arguments[0].complete && arguments[0].naturalWidth === 64", image) for image in pictures
    )


def test_it_fits_a_phone(page: Page) -> None:
    page.open(PHONE)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    page.settle()
    assert page.run("return window.innerWidth") == 360
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for chart in page.all("[data-chart]"):
        width = page.run("return arguments[0].querySelector('svg').getBoundingClientRect().width", chart)
        assert 200 < width <= 360


def test_dark_is_dark_whether_the_system_or_the_reader_asks(page: Page) -> None:
    def colours() -> list[str]:
        return page.run("""return [
            getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector('#chart-gradients .role-axis-label text')).fill,
            getComputedStyle(document.querySelector('#chart-gradients .mark-symbol.role-mark path')).fill]""")

    light = colours()
    page.one("input[value=dark]").click()
    by_hand = colours()
    dark = page.open(dark=True) and colours()
    assert dark == by_hand
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.one("input[value=light]").click()
    assert colours() == light


def test_a_keyboard_reaches_everything_that_does_something(page: Page) -> None:
    wanted = set(
        page.run("""return [...document.querySelectorAll('select, input:not([type=hidden]), summary, a[href], button')]
        .filter((each) => each.checkVisibility() && !(each.type === 'radio' && !each.checked))
        .map((each, number) => { each.dataset.number = number; return String(number); })""")
    )
    reached = set()
    for _ in range(3 * len(wanted)):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        reached.add(page.run("return document.activeElement.dataset.number || ''"))
    assert wanted <= reached
    slider = page.one("#sensitivity-block")
    page.run("arguments[0].focus()", slider)
    before = page.one("#sensitivity .readout").text
    slider.send_keys(Keys.ARROW_RIGHT)
    page.settle()
    assert page.one("#sensitivity .readout").text != before
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize(("size", "dark"), [(WIDE, True), (PHONE, False)])
def test_axe_finds_nothing_that_shuts_people_out(page: Page, size: tuple[int, int], dark: bool) -> None:
    """Contrast, names of controls, order of headings and what else axe-core checks (WCAG 2.1 AA and more)."""
    page.open(size, dark)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    found = Axe().run(page.driver, options={"resultTypes": ["violations"]})["violations"]
    told = [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"][:3]]
    assert not told, "\n".join(told)


def test_headings_and_tables_carry_the_page_without_charts(page: Page) -> None:
    levels = page.run("return [...document.querySelectorAll('h1,h2,h3,h4')].map((each) => Number(each.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.run("return document.documentElement.lang") == "en"
    ids = page.run("return [...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    for panel in page.all("[data-panel]"):
        assert panel.find_elements(By.CSS_SELECTOR, "details table caption")


def test_nothing_moves_for_those_who_want_it_still(page: Page) -> None:
    moving = "return getComputedStyle(document.documentElement).scrollBehavior"
    assert page.run(moving) == "smooth"
    assert page.open(still=True).run(moving) == "auto"
