"""The page in a real browser: no console errors, tables that sort, pictures at any width."""

import pytest
from browser import chromium, console_errors, resize
from finished import HOSTILE, made_run, made_sweep

from prune2onnx.runs.pages.page import write_page, write_pages

WIDTHS = (400, 1400)


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made_run(folder, hostile=True)
    return write_page(folder)


def opened(driver, path, width=1400):
    resize(driver, width)
    driver.get(path.as_uri())


def column(driver, heading):
    """The cells below a heading, in the order of the rows."""
    return driver.execute_script(
        "const cells = [...document.querySelectorAll('table.sortable thead th')];"
        "const at = cells.findIndex((cell) => cell.textContent.trim() === arguments[0]);"
        "const rows = document.querySelector('table.sortable').tBodies[0].rows;"
        "return [...rows].map((row) => row.cells[at].textContent.trim());",
        heading,
    )


def orders(driver):
    """The headings that say they sort, and how."""
    return driver.execute_script(
        "return [...document.querySelectorAll('[aria-sort]')].map("
        "(cell) => [cell.textContent.trim(), cell.getAttribute('aria-sort')])"
    )


def button(driver, heading):
    return driver.find_element(
        "xpath", f"//table[contains(@class, 'sortable')]//button[normalize-space()='{heading}']"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_are_there_and_the_page_is_no_wider_than_the_screen(browser, page, width):
    opened(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg.picture')].map((svg) => {"
        "const box = svg.getBoundingClientRect(), drawn = svg.getBBox();"
        "return [box.left, box.right, box.height, drawn.width, drawn.height]})"
    )
    assert len(boxes) == 1 + 4 + 4
    for left, right, height, *drawn in boxes:
        assert left >= 0 and right <= width and right - left > 200 and height > 60
        assert min(drawn) > 50
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('svg.picture text')].map("
        "(text) => text.getBoundingClientRect().height))"
    )
    assert smallest >= 8  # pixels, ascenders and descenders included
    assert console_errors(browser) == []


def test_what_came_from_a_file_does_not_run(browser, page):
    opened(browser, page)
    assert HOSTILE in browser.find_element("id", "weights").text
    assert HOSTILE in browser.find_element("id", "environment").text
    assert len(browser.find_elements("tag name", "script")) == 1
    browser.execute_script(
        "const one = document.createElement('script'); one.textContent = 'window.ran = true';"
        "document.body.append(one)"
    )
    assert browser.execute_script("return window.ran") is None
    assert any("Content Security Policy" in error for error in console_errors(browser))


def test_the_table_sorts_by_click(browser, page):
    opened(browser, page)
    assert orders(browser) == []
    before = [int(cell.replace(",", "")) for cell in column(browser, "bytes")]
    button(browser, "bytes").click()
    assert orders(browser) == [["bytes", "descending"]]
    assert column(browser, "bytes") == [f"{n:,}" for n in sorted(before, reverse=True)]
    button(browser, "bytes").click()
    assert orders(browser) == [["bytes", "ascending"]]
    assert column(browser, "bytes") == [f"{n:,}" for n in sorted(before)]
    button(browser, "weight").click()
    assert orders(browser) == [["weight", "ascending"]]
    names = column(browser, "weight")
    assert names == [HOSTILE, "fc1.bias", "fc2.bias", "fc2.weight"]
    said = browser.find_element("css selector", "#weights [aria-live]").text
    assert said == "sorted by weight, ascending"
    assert console_errors(browser) == []


def test_the_table_sorts_by_keyboard(browser, page):
    opened(browser, page)
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    chosen = button(browser, "levels")
    browser.execute_script("arguments[0].focus()", chosen)
    chosen.send_keys(keys.ENTER)
    assert column(browser, "levels") == ["300", "10", "4", "4"]
    chosen.send_keys(keys.SPACE)
    assert column(browser, "levels") == ["4", "4", "10", "300"]
    chosen.send_keys(keys.TAB)
    following = browser.execute_script("return document.activeElement.textContent")
    assert following == "codec"


def test_unknown_figures_come_last_either_way(browser, tmp_path):
    made_sweep(tmp_path)
    write_pages(tmp_path)
    opened(browser, tmp_path / "report.html")
    for last in (["", ""], ["", ""]):
        button(browser, "bytes").click()
        assert column(browser, "bytes")[-2:] == last
    browser.find_element("link text", "100,000 bytes").click()
    assert browser.find_element("id", "front").is_displayed()
    browser.find_element("link text", "a sweep").click()
    assert browser.title == "Size and error - prune2onnx"
    assert console_errors(browser) == []


def test_ink_stands_out_from_paper_in_light_dark_and_print(page):
    for dark in (False, True):
        with chromium(width=400, dark=dark) as driver:
            driver.get(page.as_uri())
            assert contrast(driver) >= 7
            paper = luminance(colour(driver, "document.body", "backgroundColor"))
            assert (paper < 0.1) is dark
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
            assert luminance(colour(driver, "document.body", "backgroundColor")) == 1
            assert contrast(driver) >= 7


def contrast(driver) -> float:
    """The contrast between the text of a picture and the page, as WCAG defines it."""
    text = luminance(colour(driver, "document.querySelector('#training svg text')", "fill"))
    paper = luminance(colour(driver, "document.body", "backgroundColor"))
    return (max(text, paper) + 0.05) / (min(text, paper) + 0.05)


def colour(driver, element, name) -> list[int]:
    value = driver.execute_script(f"return getComputedStyle({element}).{name}")
    return [int(part) for part in value.removeprefix("rgb(").rstrip(")").split(",")]


def luminance(rgb: list[int]) -> float:
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_on_paper_what_is_folded_is_shown(browser, page):
    opened(browser, page)
    assert not browser.find_element("css selector", "details dl").is_displayed()
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert len(pdf["data"]) > 10_000
    assert browser.find_element("css selector", "details dl").is_displayed()
