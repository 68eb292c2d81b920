"""The charter: the league's key as m of n, how one follows another, and who cannot make it."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hanse_common import signing, wire
from hanse_common.charter import (
    MAX_CHARTER_BYTES,
    MAX_CHARTERS,
    MAX_HOLDERS,
    Charter,
    CharterFile,
    SignedCharter,
    follow,
    founded,
    with_signature,
)
from hanse_common.errors import DirectoryRefused, SignatureInvalid, WireError

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 8)]
PUBLIC = [signing.public_bytes(key) for key in KEYS]


def charter(count: int = 3, threshold: int = 2, endorsements: int = 2) -> Charter:
    return Charter(
        league="test",
        version=1,
        holders=tuple(sorted(PUBLIC[:count])),
        threshold=threshold,
        endorsements=endorsements,
    )


def signed(made: Charter, *keys: Ed25519PrivateKey) -> SignedCharter:
    found = SignedCharter.of(made)
    for key in keys:
        found = found.signed_by(key)
    return found


def test_any_two_of_three_found_a_league_and_one_does_not() -> None:
    made = charter()
    for pair in (KEYS[:2], KEYS[1:3], [KEYS[0], KEYS[2]]):
        assert follow((signed(made, *pair),), made.digest)[-1] == made
    for fewer in ([], KEYS[:1], [KEYS[0], KEYS[0]], [KEYS[0], KEYS[4]], KEYS[3:6]):
        with pytest.raises(SignatureInvalid, match="of the 2 signatures"):
            follow((signed(made, *fewer),), made.digest)


def test_a_league_is_known_by_its_founding_charter_alone() -> None:
    made, other = charter(), charter(endorsements=1)
    with pytest.raises(DirectoryRefused, match="another league's"):
        follow((signed(other, *KEYS[:3]),), made.digest)


def test_one_lost_key_is_replaced_by_the_others() -> None:
    """The rehearsed recovery: birch's key is gone; alder and cedar sign a charter with a new key in its place."""
    first = charter()
    second = first.succeeded_by([PUBLIC[0], PUBLIC[2], PUBLIC[3]], 2, 2)
    chain = (signed(first, KEYS[0], KEYS[1]), signed(second, KEYS[0], KEYS[2]))
    assert follow(chain, first.digest)[-1] == second
    third = second.succeeded_by([PUBLIC[3], PUBLIC[4]], 2, 2)
    complete = signed(third, KEYS[0], KEYS[3], KEYS[4])  # KEYS[3] is of both
    assert follow((*chain, complete), first.digest)[-1] == third


@pytest.mark.parametrize(
    "signers",
    [
        (3, 4),  # the new holders alone
        (0, 1),  # the old ones alone
        (1, 3, 4),  # one of the old ones and the new ones
        (0, 1, 3),  # the old ones and one of the new ones
        (),
    ],
)
def test_a_charter_needs_both_thresholds(signers: tuple[int, ...]) -> None:
    first = charter()
    second = first.succeeded_by(PUBLIC[3:6], 2, 2)
    chain = (signed(first, *KEYS[:2]), signed(second, *(KEYS[n] for n in signers)))
    with pytest.raises(SignatureInvalid):
        follow(chain, first.digest)
    whole = signed(second, KEYS[0], KEYS[1], KEYS[3], KEYS[4])
    assert follow((chain[0], whole), first.digest)[-1] == second


def test_holders_cannot_do_away_with_the_members_word() -> None:
    first = charter()
    second = first.succeeded_by(PUBLIC[:3], 2, 1)
    with pytest.raises(DirectoryRefused, match="asks for 1 endorsements, expected 2 or more"):
        follow((signed(first, *KEYS[:2]), signed(second, *KEYS[:3])), first.digest)
    third = first.succeeded_by(PUBLIC[:3], 2, 3)
    assert follow((signed(first, *KEYS[:2]), signed(third, *KEYS[:3])), first.digest) == (first, third)


@pytest.mark.parametrize(
    "change",
    [
        lambda second: second.model_copy(update={"league": "other"}),
        lambda second: second.model_copy(update={"version": 3}),
        lambda second: second.model_copy(update={"previous": b"p" * 32}),
    ],
)
def test_a_charter_follows_the_one_before_and_no_other(change: Callable[[Charter], Charter]) -> None:
    first = charter()
    stray = change(first.succeeded_by(PUBLIC[:3], 2, 2))
    with pytest.raises(DirectoryRefused, match="does not follow"):
        follow((signed(first, *KEYS[:2]), signed(stray, *KEYS[:3])), first.digest)


def test_a_wrong_signature_of_a_holder_is_refused_and_a_strangers_counts_for_nothing() -> None:
    made = charter()
    good = signed(made, *KEYS[:2])
    strange = good.signed_by(KEYS[6])
    assert follow((strange,), made.digest)[-1] == made
    spoilt = good.signatures[0].model_copy(update={"signature": bytes(64)})
    with pytest.raises(SignatureInvalid):
        follow((good.model_copy(update={"signatures": (spoilt, good.signatures[1])}),), made.digest)
    elsewhere = with_signature(good.signatures[:1], KEYS[1], "directory", good.charter)
    with pytest.raises(SignatureInvalid):
        follow((good.model_copy(update={"signatures": elsewhere}),), made.digest)


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 4},
        {"threshold": 0},
        {"holders": ()},
        {"holders": (PUBLIC[0], PUBLIC[0])},
        {"holders": tuple(sorted(PUBLIC[:2], reverse=True))},
        {"version": 2},
        {"previous": b"p" * 32},
        {"endorsements": -1},
        {"league": "No"},
    ],
)
def test_charters_that_make_no_sense(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Charter(**(charter().model_dump() | fields))


def test_the_largest_file_can_be_read() -> None:
    keys = [Ed25519PrivateKey.generate() for _ in range(MAX_HOLDERS)]
    one = founded("a" * 63, *keys, endorsements=4)
    assert len(one.charter) <= MAX_CHARTER_BYTES
    file = CharterFile(charters=(one,) * MAX_CHARTERS)
    assert wire.decode(CharterFile, wire.encode(file)) == file


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_what_is_no_charter_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        follow((SignedCharter(charter=data),), bytes(32))
