"""The site in a real browser, without a network: tables filter and sort, pages fit, and text can be read."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocs")

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
SHOTS = Path(os.environ.get("GRAPHPEFT_SCREENSHOTS", "build/screenshots"))
PAGES = ["", "quickstart/own_model", "howto/own_layers", "coverage", "third_party", "concepts", "benchmarks"]
PAGES += ["reference/adapting", "reference/methods", "changelog", "troubleshooting", "command", "pictures"]
TALLEST = 100_000  # pixels; the reference of all methods has some 85,000
READABLE = 4.5  # the contrast that WCAG asks for


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Opened:
    """A page in a tab, and the errors that it has met; a request to elsewhere is one."""

    def __init__(self, browser: Any, site: str, page: str, **options: Any) -> None:
        self.errors: list[str] = []
        settings = {"viewport": {"width": 1280, "height": 900}, **options}
        self.tab = browser.new_context(**settings).new_page()
        self.tab.set_default_timeout(10_000)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", lambda request: self.errors.append(request.url) if site not in request.url else None)
        self.tab.goto(f"{site}{page}/" if page else site, wait_until="networkidle")

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=SHOTS / f"site-{name}.png")

    def shown_rows(self) -> list[str]:
        return self.tab.evaluate(
            "[...document.querySelectorAll('tbody tr')].filter((row) => row.offsetParent).map((row) => row.innerText)"
        )

    def column(self, heading: str) -> list[str]:
        return self.tab.evaluate(
            """(heading) => {
                const table = [...document.querySelectorAll("table")].find((each) => each.querySelector(".table-sort"));
                const heads = [...table.tHead.rows[0].cells];
                const place = heads.findIndex((head) => head.innerText.startsWith(heading));
                return [...table.tBodies[0].rows].map((row) => row.cells[place].innerText);
            }""",
            heading,
        )

    def contrast(self, selector: str) -> float:
        """Returns the contrast of an element's text to what is behind it."""
        ink, paper = self.tab.evaluate(
            """(selector) => {
                let behind = document.querySelector(selector);
                const ink = getComputedStyle(behind).color;
                const paper = () => getComputedStyle(behind).backgroundColor;
                while (behind.parentElement && /, 0\\)$/.test(paper())) behind = behind.parentElement;
                const canvas = document.createElement("canvas").getContext("2d");
                return [paper(), ink].map((colour) => {
                    canvas.fillStyle = colour;
                    canvas.fillRect(0, 0, 1, 1);  // over what was painted before, as a colour may be half clear
                    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
                }).reverse();
            }""",
            selector,
        )
        bright, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        return (bright + 0.05) / (dark + 0.05)


def luminance(colour: list[int]) -> float:
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture
def coverage(browser: Any, site: str) -> Opened:
    return Opened(browser, site, "coverage")


def test_a_filter_leaves_rows_with_all_words_in_all_tables_of_the_same_headings(coverage: Opened):
    everything = coverage.shown_rows()
    assert coverage.tab.locator(".table-filter").count() == 1
    coverage.tab.fill(".table-filter input", "EFF guard")
    shown = coverage.shown_rows()
    assert 0 < len(shown) < len(everything)
    assert shown == [row for row in everything if "eff" in row.lower() and "guard" in row.lower()]
    assert coverage.tab.inner_text(".table-filter output") == f"{len(shown)} of {len(everything)} rows"
    coverage.tab.fill(".table-filter input", "")
    assert coverage.shown_rows() == everything
    assert coverage.errors == []


def test_a_section_without_a_row_is_hidden_with_its_text(browser: Any, site: str):
    opened = Opened(browser, site, "third_party")
    opened.tab.fill(".table-filter input", "demucs")
    assert opened.tab.evaluate(
        "[...document.querySelectorAll('h2')].filter((each) => each.offsetParent).map((each) => each.id)"
    ) == ["demucs"]
    opened.tab.fill(".table-filter input", "no such model")
    assert opened.shown_rows() == []
    assert opened.tab.is_visible(".table-filter input")


def test_columns_sort_by_their_numbers_by_mouse_and_by_keyboard(coverage: Opened):
    def numbers() -> list[int]:
        return [int(text) for text in coverage.column("nodes")]

    before = numbers()
    head = coverage.tab.locator("th", has=coverage.tab.locator("button", has_text="nodes")).first
    head.locator("button").click()
    assert numbers() == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    coverage.tab.keyboard.press("Enter")
    assert numbers() == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"


def test_columns_of_text_sort_as_words_and_empty_cells_come_last(coverage: Opened):
    coverage.tab.locator("th button", has_text="kept").first.click()
    found = coverage.column("kept")
    filled = [text for text in found if text]
    assert found == filled + [""] * (len(found) - len(filled))


def test_times_in_other_units_sort_by_their_size(browser: Any, site: str):
    opened = Opened(browser, site, "benchmarks")
    opened.tab.locator("th button", has_text="graphpeft").first.click()
    sizes = {"µs": 1e-6, "ms": 1e-3, "s": 1, "MB": 1e6}
    found = [text.split() for text in opened.column("graphpeft") if text]
    values = [float(value) * sizes[unit] for value, unit in found]
    assert values == sorted(values)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_a_narrow_window_and_loads_nothing_from_elsewhere(browser: Any, site: str, page: str):
    opened = Opened(browser, site, page, viewport={"width": 400, "height": 800})
    opened.shoot(f"{page.replace('/', '-') or 'home'}-narrow")
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= 400
    assert opened.errors == []


@pytest.mark.parametrize(
    "page", ["reference/methods", "reference/models", "reference/rules", "methods", "architecture"]
)
def test_a_long_page_can_still_be_scrolled(browser: Any, site: str, page: str):
    opened = Opened(browser, site, page)
    assert opened.tab.evaluate("document.documentElement.scrollHeight") <= TALLEST


def test_a_table_of_pages_has_no_filter(browser: Any, site: str):
    opened = Opened(browser, site, "")
    assert opened.tab.locator("table").count() == 1
    assert opened.tab.locator(".table-filter, .table-sort").count() == 0


def test_names_in_a_table_are_whole_where_there_is_room(browser: Any, site: str):
    opened = Opened(browser, site, "methods")
    lines = opened.tab.evaluate(
        "[...document.querySelectorAll('td:nth-child(2) > code')].map((code) => code.getClientRects().length)"
    )
    assert {*lines} == {1}


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("torchrun", "howto/processes"),
        ("QLoRA", "howto/qlora"),
        ("merge", "adapters"),
        ("save", "adapters"),
        ("load adapter", "adapters"),
        ("target modules", "adapting"),
        ("learning rate", "training"),
        ("FSDP", "howto/processes"),
        ("trl", "howto/trl"),
        ("onnx", "export"),
        ("DoRA", "lora"),
    ],
)
def test_the_search_finds_a_page_for_people_first(browser: Any, site: str, words: str, page: str):
    opened = Opened(browser, site, "")
    # typed, since the theme listens to keys: a value that is set is only seen by an index that isn't there yet
    opened.tab.locator(".md-search__input").press_sequentially(words)
    # a list of fewer letters may be there before
    opened.tab.wait_for_function(
        """(page) => {
            const first = document.querySelector(".md-search-result__link");
            return first && new URL(first.href).pathname === `/${page}/`;
        }""",
        arg=page,
    )


@pytest.mark.parametrize("page", ["howto/qlora"])
def test_a_page_has_copy_buttons_and_its_neighbours(browser: Any, site: str, page: str):
    opened = Opened(browser, site, page)
    assert opened.tab.locator(".md-code__button[data-md-type=copy], .md-clipboard").count() > 0
    assert opened.tab.locator(".md-footer__link--prev, .md-footer__link--next").count() == 2


@pytest.mark.parametrize(
    ("page", "copied"),
    [
        ("howto/serving", "python examples/ship.py"),
        ("command", "graphpeft explain timm:resnet18 --set r=4 --set target_modules=layer4.1.conv1,fc"),
        ("reference/adapting", "model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))\nget_peft_model("),
    ],
)
def test_a_copied_example_has_no_prompts_and_no_output(browser: Any, site: str, page: str, copied: str):
    opened = Opened(browser, site, page)
    opened.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    blocks = opened.tab.locator(".highlight", has=opened.tab.locator(".gp"))
    blocks.first.locator("[data-md-type=copy], .md-clipboard").first.click(force=True)
    opened.tab.wait_for_function("async () => (await navigator.clipboard.readText()).length > 0")
    text = opened.tab.evaluate("navigator.clipboard.readText()")
    assert text.strip().startswith(copied)
    assert not any(line.startswith((">>>", "$", "──")) for line in text.splitlines())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "selector",
    [".table-filter input", ".table-filter output", ".table-sort", "tbody td", ".md-typeset p", ".md-nav__link"],
)
def test_text_can_be_read_in_both_schemes(browser: Any, site: str, scheme: str, selector: str):
    opened = Opened(browser, site, "coverage", color_scheme=scheme)
    assert opened.contrast(selector) >= READABLE
