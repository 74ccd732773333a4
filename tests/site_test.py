"""The documentation site: it builds without a warning, needs no other host, and has every name, field and command."""

import ast
import html.parser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import mfm_jax
from mfm_jax import manual
from mfm_jax.config import FIELDS

ROOT = Path(__file__).parents[1]
MISSING = [
    name for name in ("mkdocs", "material", "mkdocstrings_handlers", "nbconvert") if not importlib.util.find_spec(name)
]
needs_mkdocs = pytest.mark.skipif(bool(MISSING), reason=f"needs the extra 'docs': no {', '.join(MISSING)}")
# Attributes by which a page loads something; a link in a text, which a reader may follow, is another thing.
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def loaded(name: str):
    """Returns a module of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs/site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_what_the_script_draws():
    for name, draw in loaded("figures").FIGURES.items():
        assert (ROOT / "docs/images" / name).read_text(encoding="utf-8") == draw(), (
            f"python docs/site/figures.py: {name}"
        )


class Page(html.parser.HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads, self.classes = {""}, [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.ids.update(filter(None, (told.get("id"), told.get("name"))))
        self.classes.update((told.get("class") or "").split())
        if tag == "a" and told.get("href"):
            self.links.append(told["href"])
        if told.get(LOADS.get(tag, "")):
            self.loads.append(told[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "NO_MKDOCS_2_WARNING": "1",
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
@needs_mkdocs
def test_every_link_and_anchor_leads_somewhere(pages):
    dead = []
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():  # whose links begin at the site's root
            parts = urlsplit(link)
            if parts.scheme:
                continue
            to = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            known = pages[to].ids if to in pages else {""} if to.is_file() else ()
            if unquote(parts.fragment) not in known:
                dead.append((path.name, link))
    assert not dead


ANSWERS = {  # what a fresh reader asks: the page, the heading on it, and words of the answer
    "what is MFM": ("index", "", "changes how the classifier is trained, not what it is"),
    "is it better than logit adjustment": ("faq", "is-mfm-better-than-logit-adjustment", "MFM saves you the tuning"),
    "how do I train on my folder": ("faq", "how-do-i-train-on-my-own-pictures", "mfm-jax train folder_lt"),
    "how do I resume": ("faq", "it-was-interrupted-do-i-start-again", "run the same command again"),
    "what is meta_held_out": ("faq", "what-is-meta_held_out", "leave the training set before it is made"),
    "where is the loss defined": ("reference/bilevel", "mfm_jax.bilevel.losses", "cross_entropy"),
    "how do I add a method": ("contributing", "how-to-add", "Add an entry to"),
    "what does a step cost": ("performance", "the-meta-step", "The default is 8: 3 F + 6 F / 8 = 1.25 plain steps"),
    "how do I use it on 8 GPUs": ("launch", "one-command-for-each-kind-of-machine", "uses all devices"),
    "what may I cite": ("citing", "", "For the method, the paper"),
}


@pytest.mark.slow
@needs_mkdocs
@pytest.mark.parametrize("question", ANSWERS)
def test_a_fresh_reader_is_two_clicks_from_an_answer(question, site, pages):
    """The first click leads from the start to the page, the second to the heading."""
    page, heading, words = ANSWERS[question]
    path = site / f"{page}.html"
    assert page == "index" or f"{page}.html" in pages[site / "index.html"].links
    assert not heading or f"#{heading}" in pages[path].links
    assert words in " ".join(re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")).split())


@pytest.mark.slow
@needs_mkdocs
def test_a_tutorial_is_a_page_with_its_pictures(site):
    for notebook in (ROOT / "docs" / "tutorials").glob("*.ipynb"):
        page = (site / "tutorials" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert page.count('<img alt="png"') == notebook.read_text(encoding="utf-8").count('"image/png"')


@pytest.mark.slow
@needs_mkdocs
def test_no_page_asks_another_host(site, pages):
    asked = {load for page in pages.values() for load in page.loads if re.match(r"(https?:)?//", load)}
    assert not asked
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path
    # The theme would fetch a program for these two.
    assert not {"mermaid", "arithmatex"} & set().union(*(page.classes for page in pages.values()))


@pytest.mark.slow
@needs_mkdocs
def test_the_search_knows_every_page(site, pages):
    text = (site / "search/search_index.js").read_text(encoding="utf-8")  # which pages on a disk can load
    found = json.loads(text.removeprefix("var __index = "))["docs"]
    where = {str(path.relative_to(site)) for path in pages} - {"404.html"}
    assert {one["location"].partition("#")[0] for one in found} == where

    def pages_with(words: str) -> set[str]:
        return {one["location"].partition("#")[0] for one in found if words in one["title"] + one["text"]}

    assert "how_mfm_works.html" in pages_with("meta-gradient")
    assert "reference/fields.html" in pages_with("meta.images_per_class")
    assert "reference/commands.html" in pages_with("--eval_folder")
    assert "reference/bilevel.html" in pages_with("make_retrain_step")


@pytest.mark.slow
@needs_mkdocs
@pytest.mark.skipif(not all(map(shutil.which, ("chromium", "chromedriver"))), reason="needs chromium and its driver")
def test_the_search_works_on_pages_from_the_disk(site):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra 'browser'")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1300,900"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get((site / "faq.html").as_uri())
        browser.execute_script("document.getElementById('__search').click()")
        browser.find_element("css selector", ".md-search__input").send_keys("fresh statistics")
        browser.implicitly_wait(30)
        first = browser.find_element("css selector", ".md-search-result__link").get_attribute("href")
    assert first.partition("#")[0].removeprefix(site.as_uri()) in ("/how_mfm_works.html", "/design.html")


@pytest.mark.slow
@needs_mkdocs
def test_the_reference_has_every_public_name_field_and_command(site, pages):
    reference = site / "reference"
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent == reference))
    modules = [module for _, names in loaded("pages").MODULES.values() for module in names]
    for module in modules:
        body = ast.parse((ROOT / "mfm_jax" / f"{module.replace('.', '/')}.py").read_text()).body
        names = [one.name for one in body if isinstance(one, ast.FunctionDef | ast.ClassDef)]
        assert {f"mfm_jax.{module}.{name}" for name in names if not name.startswith("_")} <= ids
    index = (reference / "index.html").read_text()
    assert not [name for name in mfm_jax.__all__ if f"<code>{name}</code>" not in index]
    fields = (reference / "fields.html").read_text()
    assert not [path for path in FIELDS if f"<code>{path}</code>" not in fields]
    assert set(manual.COMMANDS) <= pages[reference / "commands.html"].ids


@needs_mkdocs
def test_the_fields_of_a_class_are_a_section_of_its_docstring():
    with_section = loaded("docstrings").with_section
    told = "One.\n\nx: first,\n  on two lines.\ny: second.\n\nRaises:\n  E: never."
    made = "One.\n\nAttributes:\n  x: first,\n    on two lines.\n  y: second.\n\nRaises:\n  E: never."
    assert with_section(told, {"x", "y"}) == made
    assert with_section(told, {"z"}) == told


@needs_mkdocs
def test_links_out_of_the_documentation_lead_into_the_site():
    relinked = loaded("pages").relinked
    assert relinked("[a](../CONTRIBUTING.md#b)", "docs/x.md") == "[a](contributing.md#b)"
    assert relinked("[a](../../CHANGELOG.md)", "docs/results/x.md") == "[a](../changelog.md)"
    assert relinked("[a](docs/data.md#b)", "CONTRIBUTING.md", "docs/contributing.md") == "[a](data.md#b)"
    assert relinked("[a](../configs/b.py), [`configs/b.py`](../configs/b.py)", "docs/x.md") == (
        "a (`configs/b.py`), `configs/b.py`"
    )
    assert relinked("[a](b.ipynb#c)", "docs/tutorials/x.md") == "[a](b.md#c)"
    same = "[a](https://b.c/d), [e](#f), ![g](images/h.svg)"
    assert relinked(same, "docs/x.md") == same
