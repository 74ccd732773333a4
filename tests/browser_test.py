"""The pages in a real browser: nothing is cut off, all text has contrast, and sorting, tips and zoom work.

It also takes the pictures of the pages that the docs show, to the folder in `MFM_JAX_PICTURES`.
"""

import base64
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, write_run
from PIL import Image

from mfm_jax.pages import report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.usefixtures("drawn"),
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]
webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra 'browser'")

PAGES = ("compare", "report", "many")
SCHEMES = ("light", "dark")
EPOCHS = 60 if os.environ.get("MFM_JAX_PICTURES") else 8  # pictures for readers are of whole runs
COMPARE = (
    f"--config=configs/digits_lt.py --methods=ce,mfm --seeds=0,1,2 --jobs=2 --config.train.epochs={EPOCHS}"
    " --config.data.val_images_per_class=5"
)
# What of the page is wider than its place; figures may be scrolled on a telephone, and a matrix once it is enlarged.
OVERFLOWING = """
const narrow = innerWidth < 600;
const wide = [...document.querySelectorAll("main, section, table, .tile, .scroll, .matrix, dd, p, li")].filter(
  (e) => e.scrollWidth > e.clientWidth + 1 && !(narrow && e.querySelector("svg")));
const name = (e) => `${e.tagName} ${e.textContent.trim().slice(0, 40)}`;
return [document.documentElement.scrollWidth - innerWidth, wide.map(name)];
"""
# The text whose contrast with what is behind it is below WCAG's AA: 4.5, or 3 where it is large.
FAINT = """
const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
const behind = (e) => {
  if (!e) return [255, 255, 255];
  const color = parse(getComputedStyle(e).backgroundColor);
  return color[3] === 1 ? color.slice(0, 3) : over(color, behind(e.parentElement));
};
const luminance = (color) => {
  const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const cells = new Map([...document.querySelectorAll(".matrix g g rect")].map(
  (r) => [`${r.getAttribute("x")} ${r.getAttribute("y")}`, r]));
const faint = [];
for (const e of document.querySelectorAll("main *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest("title, details:not([open]) > :not(summary)") || !e.getClientRects().length) continue;
  const style = getComputedStyle(e), svg = e instanceof SVGElement;
  let ground = behind(svg ? e.closest("svg").parentElement : e);
  if (e.classList.contains("number")) {
    const classes = document.querySelectorAll(".matrix text:not(.number)").length / 2;  // each has a row and a column
    const side = Number(document.querySelector(".matrix .frame").getAttribute("width")) / classes;
    const at = ["x", "y"].map((name) => Math.floor(e.getAttribute(name) / side)).join(" ");
    const cell = getComputedStyle(cells.get(at));
    ground = over([...parse(cell.fill).slice(0, 3), Number(cell.fillOpacity)], ground);
  }
  const color = over(parse(svg ? style.fill : style.color), ground);
  const [dark, light] = [luminance(color), luminance(ground)].sort((a, b) => a - b);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const contrast = (light + 0.05) / (dark + 0.05);
  if (contrast < (large ? 3 : 4.5)) faint.push(`${contrast.toFixed(2)} ${e.textContent.trim().slice(0, 40)}`);
}
return faint;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A comparison that was trained here, a report of it, and one of 121 classes with made-up results."""
    workdir, many = tmp_path_factory.mktemp("trained") / "runs", tmp_path_factory.mktemp("many")
    command = [sys.executable, "-m", "mfm_jax.compare", *COMPARE.split(), f"--workdir={workdir}"]
    subprocess.run(command, check=True, cwd=REPOSITORY, env={**os.environ, "XLA_FLAGS": ""})
    write_run(many, classes=121, images=10)
    made = report.write_report(many)
    return {"compare": workdir / "compare.html", "report": workdir / "mfm/seed0/report.html", "many": made}


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def look(browser, path: Path, width: int = 1400, scheme: str = "light", height: int = 1000) -> None:
    """Opens a page at a width in a scheme of colours, in the one font of a bare system, which is a wide one."""
    emulate = browser.execute_cdp_cmd
    emulate("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    emulate("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    browser.execute_script("document.documentElement.style.setProperty('--font', '\"DejaVu Sans\", sans-serif')")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_cut_off(browser, pages, page, width, scheme):
    look(browser, pages[page], width, scheme)
    browser.execute_script("for (const part of document.querySelectorAll('#per-class details')) part.open = true")
    beyond, wide = browser.execute_script(OVERFLOWING)
    assert beyond <= 0
    assert not wide


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("page", PAGES)
def test_text_has_contrast(browser, pages, page, scheme):
    look(browser, pages[page], scheme=scheme)
    assert browser.execute_script(FAINT) == []


def test_the_measure_of_contrast_finds_faint_text(browser, pages):
    look(browser, pages["compare"])
    browser.execute_script("document.querySelector('h1').style.color = '#bbb'")
    (found,) = browser.execute_script(FAINT)
    assert found.endswith("Comparison on digits")


@pytest.mark.parametrize("page", PAGES)
def test_the_browser_has_nothing_to_complain_of(browser, pages, page):
    browser.get_log("browser")
    look(browser, pages[page])
    assert browser.get_log("browser") == []


def test_a_click_on_the_head_of_a_column_sorts(browser, pages):
    look(browser, pages["compare"])
    table = browser.find_element("css selector", "#accuracy table")

    def column() -> list[float]:
        cells = table.find_elements("css selector", "tbody td:nth-child(2)")
        return [float(cell.text.split()[0]) for cell in cells]

    before, head = column(), table.find_elements("css selector", "thead button")[1]
    head.click()
    assert column() == sorted(before, reverse=True)
    head.click()
    assert column() == sorted(before)
    difference = table.find_elements("css selector", "thead button")[2]
    for _ in range(2):
        difference.click()
        assert table.find_elements("css selector", "tbody tr:last-child th")[0].text.startswith("ce")  # has no value


@pytest.mark.parametrize(
    ("page", "selector", "told"),
    [
        ("compare", "#gains [data-tip]", "points|, balanced: "),
        ("compare", "#time [data-tip], #cost [data-tip]", ", steps: "),
        ("report", "#confusion rect[data-tip]", " images"),
        ("report", "#reliability [data-tip]", "mean confidence"),
        ("many", "#classes [data-tip]", " to train"),
    ],
)
def test_the_pointer_is_told_values(browser, pages, page, selector, told):
    look(browser, pages[page])
    tip = browser.find_element("id", "tip")
    assert not tip.is_displayed()
    shape = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", shape)
    webdriver.ActionChains(browser).move_to_element(shape).perform()
    assert any(part in tip.text for part in told.split("|"))
    place = tip.rect
    assert 0 <= place["x"] <= place["x"] + place["width"] <= 1400


def test_the_matrix_can_be_enlarged(browser, pages):
    look(browser, pages["many"])
    matrix = browser.find_element("css selector", ".matrix svg")
    before = matrix.size["width"]
    browser.find_element("css selector", "#zoom4").click()
    assert matrix.size["width"] > 3 * before
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1400
    letters = browser.execute_script("return document.querySelector('.matrix text').getBoundingClientRect().height")
    assert letters > 12


def test_links_lead_to_the_reports(browser, pages):
    look(browser, pages["compare"])
    browser.find_element("css selector", "#runs a").click()
    assert "ce on digits" in browser.title


def test_it_can_be_read_without_scripts(browser, pages):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(pages["report"].as_uri())
        assert not browser.find_elements("id", "tip")
        assert browser.find_element("css selector", "#summary td").text
        assert browser.find_elements("css selector", "svg title")  # which the browser itself shows
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize(("page", "height"), [("compare", 1500), ("report", 1500)])
def test_a_picture_of_each_page(browser, pages, page, height, tmp_path):
    look(browser, pages[page], width=1100, height=height)
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    picture = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    path = Path(os.environ.get("MFM_JAX_PICTURES", tmp_path), f"{page}.png")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert picture.size == (1100, height)
    assert len(picture.getcolors(1 << 24)) > 100
    assert path.stat().st_size < 150_000
