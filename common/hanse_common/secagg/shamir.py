"""Shamir's secret sharing over a prime field: any t shares give the secret, t − 1 give nothing.

    shares = split(secret, threshold=3, holders=5)     # shares[k] belongs to holder k, evaluated at k + 1
    secret = recover({0: shares[0], 2: shares[2], 4: shares[4]})

The field is that of the least prime above 2²⁵⁶, so that every 32-byte key is an element, and a share takes 33
bytes. Fewer than t shares are independent of the secret, whatever the secret's distribution.

Reference: Shamir 1979, "How to Share a Secret". Recovery is Lagrange interpolation at 0.
"""

from collections.abc import Mapping

from hanse_common.randomness import secret_bytes

PRIME = (1 << 256) + 297
"""The least prime above 2²⁵⁶."""

SHARE_BYTES = 33

_COEFFICIENT_BYTES = 48
"""Reduced mod `PRIME`, 48 random bytes are within 2⁻¹²⁷ of uniform."""


def split(secret: int, threshold: int, holders: int, prime: int = PRIME) -> list[int]:
    """Return a share of `secret` for each of the `holders`, of which any `threshold` recover it.

    Raises `ValueError` unless 0 ≤ secret < prime and 1 ≤ threshold ≤ holders < prime.
    """
    if not 0 <= secret < prime:
        raise ValueError("Expected a secret within the field.")
    if not 1 <= threshold <= holders < prime:
        raise ValueError(f"Expected 1 ≤ threshold ≤ holders, found {threshold} of {holders}.")
    drawn = secret_bytes(_COEFFICIENT_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(drawn[first : first + _COEFFICIENT_BYTES], "big") % prime
        for first in range(0, len(drawn), _COEFFICIENT_BYTES)
    ]
    return [evaluate([secret, *coefficients], holder + 1, prime) for holder in range(holders)]


def evaluate(coefficients: list[int], x: int, prime: int = PRIME) -> int:
    """Return the polynomial's value at `x`, by Horner's rule; `coefficients` begin with the constant term."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % prime
    return value


def recover(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """Return the secret that `shares`, by holder counted from 0, are of, if they are as many as the threshold.

    With fewer, or with a wrong one among them, the result is another number: the caller checks it.
    Raises `ValueError` for no shares.
    """
    return combine(shares, weights(tuple(shares), prime), prime)


def weights(holders: tuple[int, ...], prime: int = PRIME) -> tuple[int, ...]:
    """Return the factor of each holder's share in the secret, in the order of `holders`, counted from 0.

    They depend on the holders alone, so one computation serves all secrets that the same holders recover.
    Raises `ValueError` for no holder or one named twice.
    """
    if not holders or len(set(holders)) != len(holders):
        raise ValueError("Expected at least one share, and one of each holder.")
    points = [holder + 1 for holder in holders]
    found = []
    for own in points:
        above, below = 1, 1
        for other in points:
            if other != own:
                above = above * other % prime
                below = below * (other - own) % prime
        found.append(above * pow(below, -1, prime) % prime)
    return tuple(found)


def combine(shares: Mapping[int, int], factors: tuple[int, ...], prime: int = PRIME) -> int:
    """Return the secret from `shares` and their `weights`, in the same order."""
    return sum(share * factor for share, factor in zip(shares.values(), factors, strict=True)) % prime


def to_bytes(share: int) -> bytes:
    """Return a share as `SHARE_BYTES` bytes, big-endian."""
    return share.to_bytes(SHARE_BYTES, "big")


def from_bytes(data: bytes) -> int:
    """Return the share in `data`. Raises `ValueError` unless it is `SHARE_BYTES` long and in the field."""
    share = int.from_bytes(data, "big")
    if len(data) != SHARE_BYTES or share >= PRIME:
        raise ValueError(
            f"Expected a share of {SHARE_BYTES} bytes within the field, found {len(data)} bytes."
        )
    return share
