"""How a text of the shop's is spelt: composed, in one line, and so that what looks alike is alike.

    composed("Cafe\\u0301", 64)            # "Café", which another keyboard types as one letter
    printable("\\u06a9\\u0641\\u0634\\u200c\\u0647\\u0627")   # "shoes" in Persian, whose plural hangs on a joiner
    identifier("A\\u200d17")              # ValueError: it would look like A17

One letter may be written in several ways, which look the same and differ in their bytes. So a text is composed (NFC
[1]) where it enters, and where it is looked up.

The joiners U+200C and U+200D are seen only by what they do to their neighbours: Persian, the scripts of India, and
emoji need them. They may stand between two characters, and at a word's end after a virama, as in older Malayalam
[2, section 2.3]. Characters that turn the direction of writing, and all other controls, are refused everywhere. In what
names a product nothing may be invisible.

[1] Unicode Standard Annex 15: Unicode Normalization Forms
[2] Unicode Standard Annex 31: Unicode Identifiers and Syntax
[3] Unicode Standard Annex 44: DerivedCoreProperties, Default_Ignorable_Code_Point
"""

import re
import unicodedata
from typing import Final

EXPANSION: Final = 4
"""A character in composed form is written with so many at most: greatest expansion in UTF-32 [1, section 14]."""

_JOINERS = frozenset("\u200c\u200d")
_APART = _JOINERS | {"", " "}
_VIRAMA = 9  # canonical combining class

# Of the invisible characters [3], those that Python calls printable: they are letters or marks, not controls.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def composed(text: str, most: int) -> str:
    """Return `text` in composed form, unless it is too long to have at most `most` characters in it: then, as it is.

    Composing takes time that grows with the square of a run of marks, so a text is bounded before.
    """
    return unicodedata.normalize("NFC", text) if len(text) <= EXPANSION * most else text


def printable(text: str) -> str:
    """Return `text`. Raises ValueError unless it is one line of printable characters, joiners between others."""
    seen = "".join(one for place, one in enumerate(text) if one not in _JOINERS or not _joins(text, place))
    return _plain(seen, text)


def identifier(text: str) -> str:
    """Return `text`. Raises ValueError unless it is one line of printable characters, none of which is invisible.

    "." and ".." are refused, too: in an address they stand for folders, and are gone before a server sees them.
    """
    if text in {".", ".."}:
        raise ValueError("expected another name than . or ..")
    if _INVISIBLE.search(text):
        raise ValueError("expected no invisible character")
    return _plain(text, text)


def _plain(seen: str, text: str) -> str:
    if not seen.isprintable():
        raise ValueError("expected one line of printable characters")
    if text != text.strip():
        raise ValueError("expected no space at either end")
    return text


def _joins(text: str, place: int) -> bool:
    """Return whether the joiner at `place` has something to join."""
    before, after = text[max(place - 1, 0) : place], text[place + 1 : place + 2]
    return before not in _APART and (after not in _APART or unicodedata.combining(before) == _VIRAMA)
