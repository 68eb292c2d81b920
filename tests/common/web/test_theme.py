"""The theme's contrast, by WCAG 2.2's own formulas: text 4.5 to 1, what is drawn 3 to 1, in both schemes."""

import re

import pytest

from hanse_common.web.pages import STATIC

CSS = (STATIC / "theme.css").read_text(encoding="utf-8")
ROOTS = [
    dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", body))
    for body in re.findall(r":root \{(.*?)\}", CSS, re.S)
]
LIGHT, DARK = ROOTS[0], {**ROOTS[0], **ROOTS[1]}
SCHEMES = pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])

TEXT = [
    *((text, behind) for text in ("text", "muted", "accent") for behind in ("page", "surface")),
    *((text, f"{tone}-surface") for tone in ("good", "warning", "bad", "info") for text in ("text", tone)),
    ("on-accent", "accent"),
    ("muted", "track"),
    *(("on-faint" if step < 5 else "on-strong", f"shade-{step}") for step in range(11)),
]
DRAWN = [
    *(
        (drawn, behind)
        for drawn in ("edge", "good", "warning", "bad", "accent")
        for behind in ("page", "surface")
    ),
    *((fill, "track") for fill in ("accent", "good", "warning", "bad", "text")),
]


def luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_formula_is_the_standards_own() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@SCHEMES
@pytest.mark.parametrize(("text", "behind"), TEXT)
def test_text_can_be_read(scheme: dict[str, str], text: str, behind: str) -> None:
    assert contrast(scheme[f"--{text}"], scheme[f"--{behind}"]) >= 4.5


@SCHEMES
@pytest.mark.parametrize(("drawn", "behind"), DRAWN)
def test_what_is_drawn_can_be_seen(scheme: dict[str, str], drawn: str, behind: str) -> None:
    assert contrast(scheme[f"--{drawn}"], scheme[f"--{behind}"]) >= 3


def test_the_dark_scheme_has_every_colour_of_its_own() -> None:
    assert ROOTS[0].keys() == ROOTS[1].keys()


def test_shades_have_the_text_colour_they_are_tested_with() -> None:
    for step in range(11):
        text = "faint" if step < 5 else "strong"
        rule = re.search(
            rf"\.s{step} \{{\n  background: var\(--shade-{step}\);\n  color: var\(--on-(\w+)\);", CSS
        )
        assert rule
        assert rule[1] == text


def test_no_colour_stands_outside_the_two_schemes() -> None:
    rules = re.sub(r":root \{.*?\}", "", CSS, flags=re.S)
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(", rules) == []


def test_every_variable_that_is_used_is_defined() -> None:
    local = {"--tone", "--tone-surface"}
    assert set(re.findall(r"var\((--[\w-]+)\)", CSS)) <= ROOTS[0].keys() | local


def test_nothing_is_fetched_and_a_style_element_can_hold_it() -> None:
    for word in ("url(", "@import", "</", "<!"):
        assert word not in CSS
