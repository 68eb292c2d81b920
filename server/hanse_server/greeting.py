"""Who opened a stream: a merchant proves by the key in the directory that it is one of the league's.

    greeter = Greeter(fingerprint(certificate), identities)
    with greeter.place("192.0.2.7"):                # raises Crowded
        name, block = await greeter.meet(line)

The server says a fresh nonce, and the merchant signs it together with the certificate that it sees
(`hanse_common.session.Hello`), so that a hello is good for one stream to one server. How many may be about to say who
they are is bounded.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hanse_common import wire
from hanse_common.errors import SignatureInvalid, WireError
from hanse_common.session import MAX_HELLO_BYTES, Challenge, Hello, RecordReader
from hanse_server.conversation import Line

HELLO_SECONDS = 10.0
"""How long a stream may take to say who it is."""

MAX_PENDING = 512
"""Streams at once that have not said who they are."""

MAX_PENDING_PER_ADDRESS = 32
"""Of these, from one network address: a flood from one place shuts nobody else out."""


class Crowded(Exception):
    """Too many streams have not said who they are."""


class Greeter:
    """For the thread of one loop. `identities` returns the merchants' names, as of now, by their directory identities;
    `certificate` is the fingerprint of the server's own.
    """

    def __init__(self, certificate: bytes, identities: Callable[[], Mapping[bytes, str]]) -> None:
        self._certificate = certificate
        self._identities = identities
        self._pending: Counter[str] = Counter()

    @contextmanager
    def place(self, address: str) -> Iterator[None]:
        """Count a stream from `address`, until whoever opened it is met or turned away. Raises `Crowded`."""
        if self._pending[address] >= MAX_PENDING_PER_ADDRESS or self._pending.total() >= MAX_PENDING:
            raise Crowded
        self._pending[address] += 1
        try:
            yield
        finally:
            self._pending[address] -= 1
            if not self._pending[address]:
                del self._pending[address]  # addresses are not collected

    async def meet(self, line: Line) -> tuple[str, bytes]:
        """Return who is at the other end, once it has proven it, and for which block.

        Raises `TimeoutError`, `WireError` and `SignatureInvalid` when there is no valid hello.
        """
        return await asyncio.wait_for(self._hello(line), HELLO_SECONDS)

    async def _hello(self, line: Line) -> tuple[str, bytes]:
        nonce = os.urandom(32)
        await line.write(wire.encode(Challenge(nonce=nonce)))
        record = RecordReader(MAX_HELLO_BYTES).add(await line.read())
        if record is None:
            raise WireError("a hello of more than a frame")
        hello = wire.decode(Hello, record, MAX_HELLO_BYTES)
        name = self._identities().get(hello.identity)
        if name is None:
            raise SignatureInvalid("not a merchant of this league")
        hello.verify(nonce, self._certificate)
        return name, hello.block
