"""Many light merchants in one process: real streams over TLS and real secure aggregation, and no photos.

    python -m hanse_simulations.benchmarks.stream PORT BLOCK SERVER.crt KEY…

BLOCK is in hex; each KEY is the file of a merchant's identity. All serve one block of the aggregator at
localhost:PORT, each on a connection of its own, until the server ends it. One works at a time.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import signing, wire
from hanse_common.credentials import fingerprint
from hanse_common.secagg.ring import MAX_DIMENSION
from hanse_common.session import (
    FRAME_BYTES,
    METHOD,
    Answer,
    Ask,
    Challenge,
    Hello,
    RecordReader,
    frames,
    record_bytes,
)
from hanse_common.wire import Buffer
from hanse_simulations.benchmarks.masking_merchant import MaskingMerchant

_OPTIONS = (
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each merchant
)

_AGAIN = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED}
"""Too many at once have not said who they are yet; or a slow one lost its turn to upload."""

PAUSE_SECONDS = 0.1

Handler = Callable[[Buffer], Buffer]


async def serve_block(
    port: int, certificate: bytes, block: bytes, merchants: Sequence[tuple[Ed25519PrivateKey, Handler]]
) -> None:
    """Serve `block` of the aggregator at localhost for all `merchants`, each an identity and what answers for it.

    `certificate` is the PEM of the server's own.
    """
    pinned = grpc.ssl_channel_credentials(certificate)
    async with asyncio.TaskGroup() as tasks:
        for identity, handle in merchants:
            merchant = _Merchant(block, fingerprint(certificate), identity, handle)
            tasks.create_task(merchant.serve(port, pinned))


class _Merchant:
    def __init__(self, block: bytes, shown: bytes, identity: Ed25519PrivateKey, handle: Handler) -> None:
        self._block = block
        self._shown = shown
        self._identity = identity
        self._handle = handle
        self._trip = 0
        self._answer: Buffer = b""

    async def serve(self, port: int, pinned: Any) -> None:
        """Serve the block to its end, on one stream after another."""
        async with grpc.aio.secure_channel(f"localhost:{port}", pinned, options=_OPTIONS) as channel:
            while True:
                call = channel.stream_stream(METHOD)()
                try:
                    return await self._converse(call)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _AGAIN:
                        raise
                except asyncio.InvalidStateError:  # it ended while we spoke
                    if await call.code() not in _AGAIN:
                        raise
                await asyncio.sleep(PAUSE_SECONDS)

    async def _converse(self, call: Any) -> None:
        records = _records(call)
        challenge = wire.decode(Challenge, await anext(records))
        await _say(call, wire.encode(Hello.sign(self._identity, challenge.nonce, self._shown, self._block)))
        async for record in records:
            ask, question = wire.decode_tailed((Ask,), record, record_bytes(MAX_DIMENSION))
            if ask.trip > self._trip:
                self._trip, self._answer = ask.trip, self._handle(question)
            await _say(call, wire.head(Answer(trip=ask.trip, payload=b""), len(self._answer)), self._answer)


async def _records(call: Any) -> AsyncIterator[memoryview]:
    reader = RecordReader(record_bytes(MAX_DIMENSION))
    while (frame := await call.read()) is not grpc.aio.EOF:
        record = reader.add(frame)
        if record is not None:
            yield record


async def _say(call: Any, *pieces: Buffer) -> None:
    for frame in frames(*pieces):
        await call.write(frame)


def main() -> None:
    """Run the merchants named on the command line."""
    port, block, certificate, *keys = sys.argv[1:]
    identities = [signing.load_key(Path(key)) for key in keys]
    merchants = [(identity, MaskingMerchant(identity).handle) for identity in identities]
    asyncio.run(serve_block(int(port), Path(certificate).read_bytes(), bytes.fromhex(block), merchants))


if __name__ == "__main__":
    main()
