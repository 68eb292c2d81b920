"""Fingerprints in words, to be compared over the telephone.

    words(charter.digest)         # "abandon amount liar amount expire adjust cage candy arch gather drum buyer"

Twelve words of BIP-39's list stand for the first 128 bits of a digest; the last word holds a checksum of four bits,
so that most slips of the tongue make no fingerprint at all. Who wants to pass another document off as this one has
to find a second one with the same 128 bits.
"""

from typing import Literal

from mnemonic import Mnemonic

FINGERPRINT_BYTES = 16

Language = Literal["en", "zh"]

_LISTS = {"en": "english", "zh": "chinese_simplified"}


def words(digest: bytes, language: Language = "en") -> str:
    """Return the twelve words of `digest`, 16 bytes or more."""
    text: str = Mnemonic(_LISTS[language]).to_mnemonic(digest[:FINGERPRINT_BYTES])
    return text
