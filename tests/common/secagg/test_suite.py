"""The suite's primitives against their standards; every key, commitment and statement bound to its place."""

import hashlib
import hmac
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hanse_common import signing
from hanse_common.errors import SignatureInvalid
from hanse_common.secagg import suite, transcript
from hanse_common.secagg.messages import Member
from hanse_common.secagg.suite import Setup

h = bytes.fromhex
bytes32 = st.binary(min_size=32, max_size=32)


# X25519, RFC 7748.


@pytest.mark.parametrize(
    ("scalar", "u", "result"),
    [
        (  # section 5.2
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ],
)
def test_x25519_vectors_of_rfc_7748_section_5_2(scalar: str, u: str, result: str) -> None:
    assert suite.agree(X25519PrivateKey.from_private_bytes(h(scalar)), h(u)) == h(result)


def test_x25519_iterated_as_in_rfc_7748_section_5_2() -> None:
    k = u = h("09" + 31 * "00")
    for done in range(1, 1001):
        k, u = suite.agree(X25519PrivateKey.from_private_bytes(k), u), k
        if done == 1:
            assert k == h("422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079")
    assert k == h("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51")


def test_x25519_vectors_of_rfc_7748_section_6_1() -> None:
    alice = X25519PrivateKey.from_private_bytes(
        h("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = X25519PrivateKey.from_private_bytes(
        h("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    public = [key.public_key().public_bytes_raw() for key in (alice, bob)]
    assert public[0] == h("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert public[1] == h("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = h("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert suite.agree(alice, public[1]) == suite.agree(bob, public[0]) == shared


FIELD = (1 << 255) - 19
LOW_ORDER = (
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    FIELD - 1,
)


def test_the_points_listed_are_of_low_order() -> None:
    """A point is of order 1, 2, 4 or 8 just when doubling it three times gives the neutral element, z = 0."""

    def doubled(x: int, z: int) -> tuple[int, int]:
        above, below = (x + z) ** 2 % FIELD, (x - z) ** 2 % FIELD
        difference = above - below
        return above * below % FIELD, difference * (below + 121666 * difference) % FIELD

    for u in LOW_ORDER:
        point = (u, 1)
        for _ in range(3):
            point = doubled(*point)
        assert point[1] == 0


@pytest.mark.parametrize("u", LOW_ORDER)
def test_points_of_low_order_are_refused_in_every_encoding(u: int) -> None:
    values = [value for value in (u, u + FIELD) if value < 1 << 255]
    encodings = [(value | top << 255).to_bytes(32, "little") for value in values for top in (0, 1)]
    assert len(encodings) == (4 if u < 19 else 2)
    for encoding in encodings:
        for _ in range(3):
            with pytest.raises(ValueError):
                suite.agree(X25519PrivateKey.generate(), encoding)


def test_encodings_of_low_order_are_those_that_libsodium_lists() -> None:
    listed = {
        h("0000000000000000000000000000000000000000000000000000000000000000"),
        h("0100000000000000000000000000000000000000000000000000000000000000"),
        h("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        h("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        h("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        h("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        h("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    }
    ours = {(u + k * FIELD) for u in LOW_ORDER for k in (0, 1)}
    assert {value.to_bytes(32, "little") for value in ours if value < 1 << 255} == listed


def test_a_key_of_another_length_is_refused() -> None:
    for wrong in (b"", bytes(31), b"\x09" * 33):
        with pytest.raises(ValueError):
            suite.agree(X25519PrivateKey.generate(), wrong)


# HKDF-SHA256, RFC 5869.


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 sections 2.2 and 2.3, spelled out."""
    pseudorandom = hmac.digest(salt or bytes(32), secret, "sha256")
    found, block = b"", b""
    for counter in itertools.count(1):
        block = hmac.digest(pseudorandom, block + info + bytes([counter]), "sha256")
        found += block
        if len(found) >= length:
            break
    return found[:length]


@pytest.mark.parametrize(
    ("secret", "salt", "info", "okm"),
    [
        (  # appendix A.1
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (  # appendix A.2
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            (
                "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
                "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"
            ),
        ),
        (  # appendix A.3
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_vectors_of_rfc_5869(secret: bytes, salt: bytes, info: bytes, okm: str) -> None:
    length = len(okm) // 2
    library = HKDF(algorithm=hashes.SHA256(), length=length, salt=salt or None, info=info)
    assert library.derive(secret) == hkdf(secret, salt, info, length) == h(okm)


@given(bytes32, st.sampled_from(["pair mask", "self mask", "shares"]), bytes32, st.lists(bytes32, max_size=2))
def test_derive_is_hkdf_with_what_is_documented(
    secret: bytes, purpose: str, context: bytes, parties: list[bytes]
) -> None:
    info = b"hanse " + purpose.encode() + b"\0" + context + b"".join(parties)
    assert suite.derive(secret, purpose, context, *parties) == hkdf(secret, b"", info, 32)


@given(bytes32, bytes32, bytes32, bytes32)
def test_mask_keys_are_derived_for_their_purpose_and_parties(
    secret: bytes, context: bytes, one: bytes, other: bytes
) -> None:
    pair = suite.pair_mask_key(secret, context, one, other)
    assert pair == suite.pair_mask_key(secret, context, other, one)
    assert pair == hkdf(secret, b"", b"hanse pair mask\0" + context + min(one, other) + max(one, other), 32)
    assert suite.self_mask_key(secret, context, one) == hkdf(
        secret, b"", b"hanse self mask\0" + context + one, 32
    )


# AES-256-GCM, McGrew and Viega, "The Galois/Counter Mode of Operation", test case 16.


def test_gcm_vector_of_nist() -> None:
    key, nonce = h("feffe9928665731c6d6a8f9467308308") * 2, h("cafebabefacedbaddecaf888")
    plain = h(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    sealed = AESGCM(key).encrypt(nonce, plain, h("feedfacedeadbeeffeedfacedeadbeefabaddad2"))
    assert sealed == h(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )


SECRET, CONTEXT, DEALER, HOLDER = (bytes([k]) * 32 for k in range(1, 5))


def test_sealing_is_gcm_under_a_derived_key() -> None:
    sealed = suite.seal(SECRET, CONTEXT, DEALER, HOLDER, b"data")
    key = hkdf(SECRET, b"", b"hanse shares\0" + CONTEXT + DEALER + HOLDER, 32)
    assert sealed == AESGCM(key).encrypt(bytes(12), b"data", CONTEXT + DEALER + HOLDER)
    assert suite.unseal(SECRET, CONTEXT, DEALER, HOLDER, sealed) == b"data"


def test_sealed_data_opens_for_nothing_else() -> None:
    right = [SECRET, CONTEXT, DEALER, HOLDER]
    sealed = suite.seal(*right, b"data")
    for k in range(4):
        wrong = [*right[:k], bytes([right[k][0] ^ 1]) + right[k][1:], *right[k + 1 :]]
        with pytest.raises(InvalidTag):
            suite.unseal(*wrong, sealed)
    with pytest.raises(InvalidTag):  # sent back to its dealer
        suite.unseal(SECRET, CONTEXT, HOLDER, DEALER, sealed)
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidTag):
            suite.unseal(*right, bytes(flipped))
    for end in range(len(sealed)):
        with pytest.raises(InvalidTag):
            suite.unseal(*right, sealed[:end])


# Ed25519, RFC 8032 section 7.1.


@pytest.mark.parametrize(
    ("private", "public", "message", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            (
                "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
                "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
            ),
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            (
                "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
                "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
            ),
        ),
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            (
                "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
                "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
            ),
        ),
    ],
)
def test_ed25519_vectors_of_rfc_8032(private: str, public: str, message: str, signature: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(h(private))
    assert signing.public_bytes(key) == h(public)
    assert key.sign(h(message)) == h(signature)
    # Ours is that over the domain and the message: the vector itself is no signature under any domain.
    ours = signing.sign(key, "join", h(message))
    assert ours == key.sign(b"hanse join\0" + h(message))
    assert transcript.verifies(h(public), "join", h(message), ours)
    for domain in ("", "join", "packet", "survivors", "counter"):
        with pytest.raises(SignatureInvalid):
            signing.verify(h(public), domain, h(message), h(signature))


def test_a_signature_is_for_one_domain_key_and_message() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    public = signing.public_bytes(key)
    domains = ("join", "packet", "survivors", "counter")
    for domain in domains:
        signature = signing.sign(key, domain, b"data")
        assert [name for name in domains if transcript.verifies(public, name, b"data", signature)] == [domain]
        assert not transcript.verifies(public, domain, b"datb", signature)
        assert not transcript.verifies(signing.public_bytes(other), domain, b"data", signature)
        for wrong in (b"", signature[:63], signature + b"\0", bytes(64)):
            assert not transcript.verifies(public, domain, b"data", wrong)
    for malformed in (b"", bytes(31), bytes(33), b"\xff" * 32):
        assert not transcript.verifies(malformed, "join", b"data", signing.sign(key, "join", b"data"))


# What is bound to what.


def setup_of(**changes: Any) -> Setup:
    """Return a set-up, changed by keyword without validation."""
    fields = {"plan_digest": bytes(32), "round": 5, "rounds": 2, "attempt": 0, "directory_digest": bytes(32)}
    return Setup(**fields).model_copy(update=changes)


MEMBERS = tuple(
    Member(
        identity=bytes([k]) * 32,
        sealing_key=bytes([k + 50]) * 32,
        mask_keys=bytes([k + 100]) * 64,
        signature=bytes([k]) * 64,
    )
    for k in range(3)
)

MASKS = {"pair mask", "self mask", "survivor statement"}
NUMBERED = {"commitment", "seed digest"}
ROSTER = {"sealing", "packet statement"}
SETUP = {"join statement"}


def bound(
    setup: Setup | None = None,
    members: tuple[Member, ...] = MEMBERS,
    round_: int = 5,
    model: bytes = bytes(32),
) -> dict[str, bytes]:
    """Return everything that is derived from the contexts, for the same secrets."""
    setup = setup or setup_of()
    context = transcript.roster_context(setup, members)
    of_round = suite.round_context(context, round_, model)
    return {
        "pair mask": suite.pair_mask_key(SECRET, of_round, DEALER, HOLDER),
        "self mask": suite.self_mask_key(SECRET, of_round, DEALER),
        "survivor statement": transcript.survivor_statement(of_round, (0, 1)),
        "commitment": suite.commit(context, DEALER, HOLDER, round_, b"s", SECRET, bytes(33)),
        "seed digest": suite.seed_digest(context, round_, DEALER, SECRET),
        "sealing": suite.seal(SECRET, context, DEALER, HOLDER, b"data"),
        "packet statement": transcript.packet_statement(context, DEALER, HOLDER, b"sealed", b""),
        "join statement": transcript.join_statement(setup, DEALER, HOLDER, bytes(64)),
    }


def changed(other: dict[str, bytes]) -> set[str]:
    """Return the names of what differs from the unchanged settings."""
    return {name for name, value in bound().items() if other[name] != value}


OTHER = b"\x01" + bytes(31)


@pytest.mark.parametrize(
    "changes",
    [
        {"suite": "another"},
        {"plan_digest": OTHER},
        {"round": 4},
        {"rounds": 3},
        {"attempt": 1},
        {"directory_digest": OTHER},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_of_the_setup_enters_every_key(changes: dict[str, Any]) -> None:
    assert changed(bound(setup=setup_of(**changes))) == MASKS | NUMBERED | ROSTER | SETUP


def test_no_field_of_the_setup_is_left_out_above() -> None:
    assert list(Setup.model_fields) == [
        "suite",
        "plan_digest",
        "round",
        "rounds",
        "attempt",
        "directory_digest",
    ]
    assert list(Member.model_fields) == ["identity", "sealing_key", "mask_keys", "signature"]


def test_a_setup_of_another_suite_is_refused() -> None:
    fields = setup_of().model_dump()
    for wrong in (
        "",
        "another",
        suite.SUITE + "x",
        "x" + suite.SUITE,
        suite.SUITE.replace("^", "."),
        suite.SUITE + "\n",
    ):
        with pytest.raises(ValidationError):
            Setup(**(fields | {"suite": wrong}))


@pytest.mark.parametrize("rounds", [0, -1, suite.MAX_SETUP_ROUNDS + 1])
def test_a_setup_of_no_or_too_many_rounds_is_refused(rounds: int) -> None:
    with pytest.raises(ValidationError):
        Setup(**(setup_of().model_dump() | {"rounds": rounds}))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("field", Member.model_fields)
def test_every_field_of_every_member_enters_every_key(place: int, field: str) -> None:
    value = getattr(MEMBERS[place], field)
    other = MEMBERS[place].model_copy(update={field: value[:-1] + b"\xff"})
    members = (*MEMBERS[:place], other, *MEMBERS[place + 1 :])
    assert changed(bound(members=members)) == MASKS | NUMBERED | ROSTER


@pytest.mark.parametrize("members", [MEMBERS[:2], MEMBERS[1:], MEMBERS[::-1], (*MEMBERS, MEMBERS[0])])
def test_another_roster_gives_other_keys(members: tuple[Member, ...]) -> None:
    assert changed(bound(members=members)) == MASKS | NUMBERED | ROSTER


def test_the_round_enters_its_own_keys() -> None:
    assert changed(bound(round_=6)) == MASKS | NUMBERED


def test_the_model_enters_the_masks_and_the_signatures() -> None:
    assert changed(bound(model=OTHER)) == MASKS


def test_nothing_is_equal_to_anything_else() -> None:
    everything = bound()
    assert len(set(everything.values())) == len(everything)


# Commitments.

COMMITTED: dict[str, Any] = {
    "context": CONTEXT,
    "dealer": DEALER,
    "holder": HOLDER,
    "round_": 5,
    "kind": b"s",
    "blinded": SECRET,
    "share": bytes(33),
}


@pytest.mark.parametrize(
    ("argument", "other"),
    [
        ("context", OTHER),
        ("dealer", OTHER),
        ("holder", OTHER),
        ("round_", 6),
        ("kind", b"k"),
        ("blinded", OTHER),
        ("share", bytes(32) + b"\x01"),
    ],
)
def test_a_commitment_is_to_all_of_its_arguments(argument: str, other: Any) -> None:
    assert suite.commit(**(COMMITTED | {argument: other})) != suite.commit(**COMMITTED)


def test_a_commitment_does_not_mix_up_its_arguments() -> None:
    swapped = suite.commit(**(COMMITTED | {"dealer": HOLDER, "holder": DEALER}))
    assert swapped != suite.commit(**COMMITTED)
    header = b"hanse share\0" + CONTEXT + DEALER + HOLDER + b"\0\0\0\x05s"
    assert suite.commit(**COMMITTED) == hashlib.sha256(header + SECRET + bytes(33)).digest()


@given(bytes32)
def test_a_commitment_hides_a_share_behind_a_secret_blind(blinding: bytes) -> None:
    """Whoever knows the share, and other rounds' blinds, cannot tell a commitment without its own blind."""
    blinds = {
        (round_, kind): suite.blind(blinding, round_, kind)
        for round_ in (0, 1, 255, 256)
        for kind in (b"s", b"k")
    }
    assert len({*blinds.values(), blinding}) == 9
    for (round_, kind), value in blinds.items():
        assert value == hmac.digest(blinding, round_.to_bytes(4, "big") + kind, "sha256")
    commitments = {suite.commit(**(COMMITTED | {"blinded": value})) for value in blinds.values()}
    assert len(commitments) == 8


@pytest.mark.parametrize(
    "change",
    [
        lambda context, round_, identity, seed: (OTHER, round_, identity, seed),
        lambda context, round_, identity, seed: (context, round_ + 1, identity, seed),
        lambda context, round_, identity, seed: (context, round_, OTHER, seed),
        lambda context, round_, identity, seed: (context, round_, identity, OTHER),
    ],
)
def test_a_seed_digest_is_of_one_seed_in_one_place(change: Callable[..., tuple[Any, ...]]) -> None:
    arguments = (CONTEXT, 5, DEALER, SECRET)
    assert suite.seed_digest(*change(*arguments)) != suite.seed_digest(*arguments)
