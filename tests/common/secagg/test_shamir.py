"""Secret sharing: the RFC's vectors, the field's edges, and nothing from t − 1 shares."""

from collections import Counter
from itertools import combinations, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_common.secagg import shamir
from hanse_common.secagg.shamir import PRIME, combine, evaluate, recover, split, weights

secrets = st.one_of(st.integers(0, PRIME - 1), st.sampled_from([0, 1, (1 << 256) - 1, 1 << 256, PRIME - 1]))

# RFC 9591 appendix E: order of the group, byte order of scalars, secret, coefficient, shares of participants 1 to 3.
FROST = {
    "ed25519": (
        (1 << 252) + 27742317777372353535851937790883648493,
        "little",
        "7b1c33d3f5291d85de664833beb1ad469f7fb6025a0ec78b3a790c6e13a98304",
        "178199860edd8c62f5212ee91eff1295d0d670ab4ed4506866bae57e7030b204",
        (
            "929dcc590407aae7d388761cddb0c0db6f5627aea8e217f4a033f2ec83d93509",
            "a91e66e012e4364ac9aaa405fcafd370402d9859f7b6685c07eed76bf409e80d",
            "d3cb090a075eb154e82fdb4b3cb507f110040905468bb9c46da8bdea643a9a02",
        ),
    ),
    "p256": (
        0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
        "big",
        "8ba9bba2e0fd8c4767154d35a0b7562244a4aaf6f36c8fb8735fa48b301bd8de",
        "80f25e6c0709353e46bfbe882a11bdbb1f8097e46340eb8673b7e14556e6c3a4",
        (
            "0c9c1a0fe806c184add50bbdcac913dda73e482daf95dcb9f35dbb0d8a9f7731",
            "8d8e787bef0ff6c2f494ca45f4dad198c6bee01212d6c84067159c52e1863ad5",
            "0e80d6e8f6192c003b5488ce1eec8f5429587d48cf001541e713b2d53c09d928",
        ),
    ),
    "secp256k1": (
        0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141,
        "big",
        "0d004150d27c3bf2a42f312683d35fac7394b1e9e318249c1bfe7f0795a83114",
        "fbf85eadae3058ea14f19148bb72b45e4399c0b16028acaf0395c9b03c823579",
        (
            "08f89ffe80ac94dcb920c26f3f46140bfc7f95b493f8310f5fc1ea2b01f4254c",
            "04f0feac2edcedc6ce1253b7fab8c86b856a797f44d83d82a385554e6e401984",
            "00e95d59dd0d46b0e303e500b62b7ccb0e555d49f5b849f5e748c071da8c0dbc",
        ),
    ),
}


@pytest.mark.parametrize("group", FROST)
def test_vectors_of_rfc_9591(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order, endian, *hexadecimal, shares_hexadecimal = FROST[group]
    secret, coefficient = (int.from_bytes(bytes.fromhex(value), endian) for value in hexadecimal)
    shares = [int.from_bytes(bytes.fromhex(value), endian) for value in shares_hexadecimal]
    assert [evaluate([secret, coefficient], x, order) for x in (1, 2, 3)] == shares
    for pair in permutations(range(3), 2):
        assert recover({holder: shares[holder] for holder in pair}, order) == secret
    assert recover(dict(enumerate(shares)), order) == secret
    monkeypatch.setattr(shamir, "secret_bytes", lambda count: coefficient.to_bytes(count, "big"))
    assert split(secret, 2, 3, order) == shares


def is_prime(number: int) -> bool:
    """Miller-Rabin with the first 40 primes as bases: False is a proof, True is wrong for no number met by chance."""
    bases = [k for k in range(2, 174) if all(k % divisor for divisor in range(2, k))]
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        value = pow(base, odd, number)
        if value not in (1, number - 1) and all(
            (value := value * value % number) != number - 1 for _ in range(twos - 1)
        ):
            return False
    return True


def test_the_field_is_that_of_the_least_prime_above_every_key() -> None:
    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range((1 << 256) + 1, PRIME, 2))
    assert PRIME < 1 << 8 * shamir.SHARE_BYTES


@settings(deadline=None)
@given(secrets, st.data())
def test_any_t_shares_give_the_secret_and_fewer_give_another_number(secret: int, data: st.DataObject) -> None:
    holders = data.draw(st.integers(2, 9))
    threshold = data.draw(st.integers(2, holders))
    shares = split(secret, threshold, holders)
    who = data.draw(st.permutations(range(holders)))
    for count in range(threshold, holders + 1):
        assert recover({holder: shares[holder] for holder in who[:count]}) == secret
    assert recover({holder: shares[holder] for holder in who[: threshold - 1]}) != secret


def test_every_choice_of_t_holders_gives_the_secret_and_no_smaller_one_does() -> None:
    shares = split(12345, 4, 7)
    for count in range(1, 8):
        for who in combinations(range(7), count):
            found = recover({holder: shares[holder] for holder in who})
            assert (found == 12345) == (count >= 4)


@settings(deadline=None)
@given(secrets, secrets, st.integers(2, 6))
def test_fewer_shares_fit_any_secret(secret: int, other: int, threshold: int) -> None:
    shares = split(secret, threshold, threshold + 2)
    held = {holder: shares[holder] for holder in range(1, threshold)}
    # Points 0 and `held` are on exactly one polynomial of degree t − 1: its value at a further point completes them.
    points = {0: other} | {holder + 1: share for holder, share in held.items()}
    x = threshold + 1
    value = 0
    for own, y in points.items():
        above, below = 1, 1
        for point in points:
            if point != own:
                above, below = above * (x - point) % PRIME, below * (own - point) % PRIME
        value = (value + y * above * pow(below, -1, PRIME)) % PRIME
    assert recover(held | {threshold: value}) == other


@pytest.mark.parametrize(("prime", "threshold", "holders"), [(5, 2, 4), (7, 3, 5)])
def test_all_views_of_fewer_holders_are_as_likely_for_every_secret(
    prime: int, threshold: int, holders: int
) -> None:
    for count in range(threshold + 1):
        for who in combinations(range(holders), count):
            views = [
                Counter(
                    tuple(evaluate([secret, *rest], holder + 1, prime) for holder in who)
                    for rest in product(range(prime), repeat=threshold - 1)
                )
                for secret in range(prime)
            ]
            if count < threshold:
                assert all(view == views[0] for view in views)
                assert len(views[0]) == prime**count
            else:
                assert not any(one.keys() & other.keys() for one, other in combinations(views, 2))


def test_coefficients_are_drawn_afresh_and_span_the_field() -> None:
    drawn = {split(7, 3, 3)[0] for _ in range(50)}
    assert len(drawn) == 50
    assert max(drawn).bit_length() >= 250
    # Two shares of a threshold of 2 give its coefficient.
    slopes = {(shares[1] - shares[0]) % PRIME for shares in (split(7, 2, 2) for _ in range(50))}
    assert len(slopes) == 50
    assert max(slopes).bit_length() >= 250


def test_each_coefficient_is_drawn_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):
        one, two, three = split(7, 3, 3)
        quadratic = (three - 2 * two + one) * pow(2, -1, PRIME) % PRIME
        linear = (two - one - 3 * quadratic) % PRIME
        assert evaluate([7, linear, quadratic], 1) == one
        assert linear != quadratic
    coefficients = [PRIME - 1, 5, 1 << 200]
    monkeypatch.setattr(shamir, "secret_bytes", lambda count: b"".join(c.to_bytes(48) for c in coefficients))
    assert split(7, 4, 9) == [evaluate([7, *coefficients], x) for x in range(1, 10)]


def test_the_ends_of_the_field() -> None:
    for secret in (0, 1, (1 << 256) - 1, PRIME - 1):
        assert split(secret, 1, 3) == [secret] * 3
        assert evaluate([secret], 5) == secret
    assert evaluate([PRIME - 1, 1], 1) == 0
    assert evaluate([], 3) == 0
    assert split(3, 4, 4, 5)  # as many holders as the field has points besides 0
    assert recover({299: PRIME - 1}) == PRIME - 1


def test_one_wrong_share_gives_another_number() -> None:
    shares = split(99, 3, 5)
    for holder in range(3):
        wrong = dict(enumerate(shares[:3]))
        wrong[holder] = (wrong[holder] + 1) % PRIME
        assert recover(wrong) != 99


def test_weights_serve_every_secret_of_the_same_holders() -> None:
    holders = (4, 0, 2)
    factors = weights(holders)
    for secret in (0, 5, PRIME - 1):
        shares = split(secret, 3, 5)
        assert combine({holder: shares[holder] for holder in holders}, factors) == secret
    with pytest.raises(ValueError):
        combine({0: 1, 1: 2}, factors)


@pytest.mark.parametrize(
    ("secret", "threshold", "holders", "prime"),
    [(-1, 1, 1, PRIME), (PRIME, 1, 1, PRIME), (5, 1, 1, 5)],
)
def test_a_secret_outside_the_field_is_refused(secret: int, threshold: int, holders: int, prime: int) -> None:
    with pytest.raises(ValueError, match="within the field"):
        split(secret, threshold, holders, prime)


@pytest.mark.parametrize(
    ("threshold", "holders", "prime"),
    [(0, 3, PRIME), (-1, 3, PRIME), (4, 3, PRIME), (1, 0, PRIME), (2, 5, 5)],
)
def test_an_impossible_threshold_is_refused(threshold: int, holders: int, prime: int) -> None:
    with pytest.raises(ValueError, match="1 ≤ threshold ≤ holders"):
        split(1, threshold, holders, prime)


def test_no_share_and_one_holder_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one share"):
        recover({})
    for holders in ((), (1, 1), (0, 2, 0)):
        with pytest.raises(ValueError, match="one of each holder"):
            weights(holders)


def test_bytes_are_33_and_within_the_field() -> None:
    for share in (0, 1, (1 << 256) - 1, PRIME - 1):
        data = shamir.to_bytes(share)
        assert len(data) == shamir.SHARE_BYTES == 33
        assert shamir.from_bytes(data) == share
    assert shamir.to_bytes(1) == bytes(32) + b"\x01"
    for wrong in (b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33):
        with pytest.raises(ValueError, match="33 bytes within the field"):
            shamir.from_bytes(wrong)
