"""How texts are spelt: one form for what looks alike, joiners where scripts need them, and nothing else unseen."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse_client.gallery.spelling import EXPANSION, composed, identifier, printable

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
RAINBOW = "\U0001f3f3\ufe0f\u200d\U0001f308"


@given(st.text(max_size=40))
def test_all_spellings_of_a_text_are_composed_to_one(text: str) -> None:
    apart = unicodedata.normalize("NFD", text)
    assert composed(apart, 64) == composed(text, 64) == composed(composed(text, 64), 64)


def test_a_composed_character_is_never_written_with_more_than_the_bound() -> None:
    """Over all of Unicode: so no text is taken for too long that has few enough characters once composed."""
    longest = max(
        len(unicodedata.normalize("NFD", chr(code)))
        for code in range(sys.maxunicode + 1)
        if unicodedata.is_normalized("NFC", chr(code))
    )
    assert longest == EXPANSION


def test_a_text_far_too_long_is_left_as_it_is() -> None:
    """Composing a run of marks takes time that grows with its square."""
    text = "a" + "\u0301\u0323" * 1_000_000
    assert composed(text, 64) is text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Trail shoe",
        "\u06a9\u0641\u0634\u200c\u0647\u0627",  # shoes, in Persian
        "\u0915\u094d\u200d\u0937",  # a half form, in Hindi
        "\u0d05\u0d35\u0d28\u0d4d\u200d",  # he, in older Malayalam: a joiner after a virama ends the word
        "\u0d05\u0d35\u0d28\u0d4d\u200d \u0d05",
        f"T-shirt {FAMILY}",
        RAINBOW,
    ],
)
def test_joiners_stand_where_scripts_and_emoji_need_them(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("joiner", ["\u200c", "\u200d"])
@pytest.mark.parametrize("text", ["{}", "{}a", "a{}", "a {}b", "a{} b", "a{}{}b", "\u094d{}{}", " {} "])
def test_a_joiner_that_joins_nothing_is_refused(text: str, joiner: str) -> None:
    with pytest.raises(ValueError, match="one line of printable characters"):
        printable(text.replace("{}", joiner))


UNSEEN = [
    "\u202e",
    "\u2066",
    "\u200e",
    "\u200f",
    "\u061c",
    "\u200b",
    "\u2060",
    "\ufeff",
    "\x1b",
    "\n",
    "\x85",
    "\u2028",
]


@pytest.mark.parametrize("unseen", [*UNSEEN, "\u00a0", "\ud800", "\ue000", "\U000e0041"])
@pytest.mark.parametrize("check", [printable, identifier])
def test_what_turns_the_direction_and_other_controls_are_refused_everywhere(check, unseen: str) -> None:
    with pytest.raises(ValueError, match="one line of printable characters"):
        check(f"a{unseen}b")


@pytest.mark.parametrize("text", [" a", "a ", "a\u200cb "])
def test_spaces_at_the_ends_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no space at either end"):
        printable(text)


INVISIBLE = [
    "\u200c",
    "\u200d",
    "\u034f",
    "\u3164",
    "\u115f",
    "\uffa0",
    "\ufe0f",
    "\u180b",
    "\u17b4",
    "\U000e0101",
]


@pytest.mark.parametrize("unseen", INVISIBLE)
def test_nothing_invisible_is_in_what_names_a_product(unseen: str) -> None:
    with pytest.raises(ValueError, match=r"expected (no invisible|one line of printable)"):
        identifier(f"A{unseen}17")


@given(st.text(max_size=12).filter(str.isprintable).map(str.strip))
def test_a_text_without_joiners_is_judged_as_python_judges_it(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("folder", [".", ".."])
def test_what_an_address_takes_for_a_folder_names_no_product(folder: str) -> None:
    with pytest.raises(ValueError, match=r"another name than \. or \.\."):
        identifier(folder)
    assert identifier(f"A{folder}") == f"A{folder}"
