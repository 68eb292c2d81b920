from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from hanse_common.errors import ConfigError
from hanse_common.web.pages import STATIC, TEMPLATES, Pages, faults, placeholders

PAGE = """{% extends "base.html" %}
{% import "macros.html" as m with context %}
{% block title %}{{ _("Hello %(name)s", name=name) }}{% endblock %}
{% block main %}
<p>{% trans %}
  A text over
  two lines
{% endtrans %}</p>
<p>{% trans count %}one photo{% pluralize %}{{ count }} photos{% endtrans %}</p>
<p>{{ _("half, 50 %% of it") }}</p>
{% call m.notice("warning") %}<p>{{ name }}</p>{% endcall %}
{% endblock %}
"""
CATALOG = """Hello %(name)s: 你好 %(name)s
A text over two lines: 两行文字
"%(count)s photos": "%(count)s 张照片"
"half, 50 %% of it": "一半，50 %%"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "page.html").write_text(PAGE, encoding="utf-8")
    (tmp_path / "zh.yaml").write_text(CATALOG, encoding="utf-8")
    return tmp_path


def render(folder: Path, language: str = "en", **values: object) -> str:
    return Pages(folder, language).render("page.html", **{"name": "Ada", "count": 2, **values})


def test_a_page_is_in_its_language(folder: Path) -> None:
    english, chinese = render(folder), render(folder, "zh")
    assert '<html lang="en">' in english
    assert '<html lang="zh-Hans">' in chinese
    assert "<title>Hello Ada</title>" in english
    assert "<title>你好 Ada</title>" in chinese
    assert "<p>A text over two lines</p>" in english
    assert "<p>两行文字</p>" in chinese
    assert "half, 50 % of it" in english
    assert "一半，50 %" in chinese
    assert 'aria-label="Warning"' in english
    assert 'aria-label="注意"' in chinese  # from the shared catalog


def test_plurals_follow_the_language(folder: Path) -> None:
    assert "<p>one photo</p>" in render(folder, count=1)
    assert "<p>2 photos</p>" in render(folder, count=2)
    assert "<p>1 张照片</p>" in render(folder, "zh", count=1)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_value_is_escaped(folder: Path, language: str) -> None:
    page = render(folder, language, name="<b>&\"'%(count)s")
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;&#34;&#39;%(count)s") == 2


def test_a_value_that_is_missing_is_an_error(folder: Path) -> None:
    with pytest.raises(UndefinedError, match="count"):
        Pages(folder).render("page.html", name="Ada")


class Loads(HTMLParser):
    """Whatever a browser would fetch or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        self.found += [
            f"{tag} {key}={names[key]}" for key in ("src", "href", "style", "srcset") if key in names
        ]
        self.found += [f"{tag} {key}" for key in names if key.startswith("on")]
        if tag in ("script", "style", "iframe", "object", "base", "form"):
            self.found.append(tag)


def test_a_page_in_a_file_needs_nothing_else_and_says_so(folder: Path) -> None:
    page = render(folder)
    assert Loads(page).found == ["style"]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert "url(" not in page
    assert "@import" not in page
    assert (STATIC / "theme.css").read_text(encoding="utf-8") in page


def test_a_served_page_has_nothing_inline(folder: Path) -> None:
    page = Pages(folder).render("page.html", served=True, name="Ada", count=2)
    assert Loads(page).found == ["link href=/static/theme.css"]


def test_the_shared_catalog_is_whole() -> None:
    assert faults(TEMPLATES) == []


def test_a_catalog_that_is_not_whole_is_found_out(folder: Path) -> None:
    assert faults(folder) == []
    lines = CATALOG.replace("你好 %(name)s", "你好 %(nom)s").replace("two lines", "three lines")
    (folder / "zh.yaml").write_text(lines, encoding="utf-8")
    assert faults(folder) == [
        "no Chinese for: A text over two lines",
        "no template has: A text over three lines",
        "other placeholders than its English: Hello %(name)s",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "mapping"), ("a: 1\n", ":1: a: found int"), ("a: b\na: c\n", "again")],
)
def test_a_catalog_is_a_flat_mapping_of_texts(folder: Path, text: str, message: str) -> None:
    (folder / "zh.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Pages(folder, "zh")


def test_a_lone_percent_sign_is_no_placeholder() -> None:
    assert placeholders("%(a)s of %(b)s, 5 %%") == {"a", "b"}
    with pytest.raises(ValueError, match="lone %"):
        placeholders("5 % of it")


def test_confusion_cells_are_shaded_by_their_share_of_the_row(folder: Path) -> None:
    (folder / "page.html").write_text(
        '{% import "macros.html" as m %}{{ m.confusion(counts, rows, rows, [0, 1], "all", "true", "said") }}',
        encoding="utf-8",
    )
    page = Pages(folder).render("page.html", counts=[[99, 1], [0, 0]], rows=["<a>", "b"])
    assert '<td class="s10 hit">99</td><td class="s1">1</td>' in page.replace("\n", "")
    assert '<td class="s0"></td><td class="s0 hit"></td>' in page.replace("\n", "")
    assert "&lt;a&gt;" in page
    assert "<a>" not in page


def test_a_meter_stays_within_its_track(folder: Path) -> None:
    (folder / "page.html").write_text(
        '{% import "macros.html" as m %}{{ m.meter(value, most, "spent") }}', encoding="utf-8"
    )
    widths = [
        Pages(folder)
        .render("page.html", value=value, most=most)
        .split('class="fill" width="')[1]
        .split('"')[0]
        for value, most in ((0, 3), (1.5, 3), (9, 3), (-1, 3), (0, 0))
    ]
    assert widths == ["0.00", "50.00", "100.00", "0.00", "0.00"]
