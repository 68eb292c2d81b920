"""How often somebody may do something: token buckets by key, in bounded memory.

    refusals = Rates(Rate(burst=60, per_second=1.0))
    if wait := refusals.wait("203.0.113.7"):   # seconds until it may try again, 0.0 when it may now
        ...
    refusals.charge("203.0.113.7")

A key starts with `burst` tokens and gets `per_second` back, up to `burst`. What fills up again is forgotten: a full
bucket is as none. Buckets are kept for `MOST_KEYS` keys, those that were charged last.
"""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

MOST_KEYS = 4096
"""With more keys than that, one that waits long enough between two charges is forgotten; a flood from as many addresses
is bounded elsewhere, by what all of them may have at once."""


@dataclass(frozen=True)
class Rate:
    """`burst` at once, and `per_second` in the long run."""

    burst: int
    per_second: float


class Rates:
    """One token bucket for each key, for one thread. `clock` counts seconds and never goes back."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Return for how many keys something is remembered."""
        return len(self._left)

    def wait(self, key: Hashable) -> float:
        """Return the seconds until there is a token for `key`, 0.0 if there is one."""
        return max(0.0, (1.0 - self._tokens(key)) / self._rate.per_second)

    def charge(self, key: Hashable) -> None:
        """Take one token of `key`; a bucket is never emptier than empty, so that waiting always helps."""
        left = max(0.0, self._tokens(key) - 1.0)
        self._left[key] = (left, self._clock())
        self._left.move_to_end(key)
        if len(self._left) > MOST_KEYS:
            self._left.popitem(last=False)

    def take(self, key: Hashable) -> float:
        """Charge `key` if it has a token; return the seconds to wait for one if not, else 0.0."""
        seconds = self.wait(key)
        if not seconds:
            self.charge(key)
        return seconds

    def _tokens(self, key: Hashable) -> float:
        if key not in self._left:
            return float(self._rate.burst)
        left, when = self._left[key]
        tokens = left + (self._clock() - when) * self._rate.per_second
        if tokens >= self._rate.burst:
            del self._left[key]
        return min(tokens, float(self._rate.burst))


def origin_of(address: str) -> str:
    """Return whose requests those from `address` are: whoever has one IPv6 address has all of its /64."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.IPv6Network((ip, 64), strict=False))
