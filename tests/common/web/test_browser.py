"""The shared page in a real browser: what is read can be read, and nothing is fetched or blocked."""

from pathlib import Path
from typing import Any

import pytest

from hanse_common.web.pages import STATIC, Pages
from hanse_common.web.security import HEADERS

pytestmark = pytest.mark.slow

PAGE = """{% extends "base.html" %}
{% import "macros.html" as m with context %}
{% block title %}All parts{% endblock %}
{% block navigation %}<nav><a href="#a" aria-current="page">Here</a><a href="#b">There</a></nav>{% endblock %}
{% block main %}<h1>All parts</h1><p class="lead">Of a page</p>
<dl class="tiles">{{ m.tile("Rounds", 60, "of 60", "good") }}</dl>
{% for kind in ("good", "warning", "bad", "info") %}
{% call m.notice(kind) %}<p>First</p><p>Second <a href="#c">link</a></p>{% endcall %}
<span class="badge {{ kind }}">{{ kind }}</span>
{% endfor %}
{{ m.meter(2, 3, "2 of 3") }}{{ m.interval(0.5, 0.4, 0.6, "half") }}
{{ m.confusion(counts, names, names, [0, 1], "All", "is", "said") }}
<button>Go</button><button class="plain">Stay</button><button disabled>Not now</button>
<label>Name <input value="Ada"></label><pre>code</pre><details open><summary>More</summary><p>Text</p></details>
{% endblock %}
{% block footer %}The end{% endblock %}
"""

CONTRASTS = """() => {
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    let behind = element;
    while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(behind ?? document.body).backgroundColor];
    const [dark, light] = pair.map(c => luminance(numbers(c))).sort((a, b) => a - b);
    found.push([element.outerHTML.slice(0, 60), (light + 0.05) / (dark + 0.05)]);
  }
  return found;
}"""


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    (tmp_path / "page.html").write_text(PAGE, encoding="utf-8")
    return Pages(tmp_path)


VALUES = {"counts": [[9, 1], [1, 3]], "names": ["shirt", "shoe"]}
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


def opened(browser: Any, url: str, scheme: str, answers: dict[str, tuple[str, str]]) -> tuple[Any, list[str]]:
    """Return the page at `url`, and what the browser complained of or fetched beside `answers`."""
    page, complaints = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800}), []
    page.on("console", lambda message: complaints.append(message.text))

    def answer(route: Any) -> None:
        if route.request.url in answers:
            kind, body = answers[route.request.url]
            route.fulfill(body=body, headers=HEADERS | {"Content-Type": kind})
        elif route.request.url == url:
            route.continue_()
        else:
            complaints.append(route.request.url)
            route.abort()

    page.route("**/*", answer)
    page.goto(url)
    return page, complaints


@SCHEMES
def test_a_page_in_a_file(browser: Any, pages: Pages, tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "out.html"
    file.write_text(pages.render("page.html", **VALUES), encoding="utf-8")
    page, complaints = opened(browser, file.as_uri(), scheme, {})
    assert complaints == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 25
    assert [pair for pair in contrasts if pair[1] < 4.5] == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


@SCHEMES
def test_a_served_page_under_the_headers(browser: Any, pages: Pages, scheme: str) -> None:
    text = pages.render("page.html", served=True, **VALUES)
    theme = (STATIC / "theme.css").read_text(encoding="utf-8")
    answers = {
        "http://localhost:1/": ("text/html; charset=utf-8", text),
        "http://localhost:1/static/theme.css": ("text/css", theme),
    }
    page, complaints = opened(browser, "http://localhost:1/", scheme, answers)
    assert [each for each in complaints if "favicon" not in each] == []
    assert [pair for pair in page.evaluate(CONTRASTS) if pair[1] < 4.5] == []
    assert page.evaluate("getComputedStyle(document.querySelector('td.hit')).fontWeight") == "700"
    page.close()


def test_print_is_on_white(browser: Any, pages: Pages, tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    file.write_text(pages.render("page.html", **VALUES), encoding="utf-8")
    page, _ = opened(browser, file.as_uri(), "dark", {})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [pair for pair in page.evaluate(CONTRASTS) if pair[1] < 4.5] == []
    page.close()
