"""How much memory uploads take, from their frames to the sum, when all merchants send at once.

    python -m hanse_simulations.benchmarks.aggregation_memory 10 1000000        # merchants, numbers

prints, as JSON, by how many vectors of 4·d bytes a fresh server grows while real streams over TLS bring one upload
of each merchant, sum and all. The question is empty: what is sent out is not in the figure. With `send` before the
port it is the merchants, which share one vector.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import signing, wire
from hanse_common.errors import RoundFailed
from hanse_common.messages import MAX_MESSAGE_BYTES, Start
from hanse_common.secagg.aggregator import Aggregator
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Upload
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.suite import Setup
from hanse_common.session import record_bytes
from hanse_common.wire import Buffer
from hanse_server.development_keys import make_keys
from hanse_server.roll import Roll, trip
from hanse_server.stream import StreamServer
from hanse_simulations.benchmarks.connected import Connected
from hanse_simulations.benchmarks.memory import Growth
from hanse_simulations.benchmarks.stream import serve_block

WAIT_SECONDS = 600.0

BLOCK = b"benchmark-block."


def open_aggregator(identities: list[Ed25519PrivateKey]) -> Aggregator:
    """Return an aggregator whose roster is of merchants with these `identities`, ready for uploads."""
    parameters = Parameters(n_min=3, c=1)
    setup = Setup(plan_digest=bytes(32), round=0, rounds=1, attempt=0, directory_digest=bytes(32))
    entities = {signing.public_bytes(key): str(place) for place, key in enumerate(identities)}
    aggregator = Aggregator(setup, parameters, entities)
    for key in identities:
        aggregator.add_member(signing.public_bytes(key), Merchant(setup, parameters, key, entities).join())
    aggregator.roster()
    return aggregator


def measure(merchants: int, dimension: int, folder: Path) -> float:
    """Return the peak of memory, in vectors of 4·d bytes. `folder` is empty; keys are made there."""
    names = [f"m{number:03}" for number in range(merchants)]
    keys = make_keys(folder, ("localhost", "127.0.0.1"), names)
    identities = {name: signing.load_key(own / "identity.key") for name, own in keys.merchants.items()}
    public = {name: signing.public_bytes(key) for name, key in identities.items()}
    certificate, key = keys.certificate.read_bytes(), keys.key.read_bytes()
    by_identity = {identity: name for name, identity in public.items()}
    with StreamServer("127.0.0.1", 0, certificate, key, lambda: by_identity) as streams:
        streams.open_block(BLOCK, record_bytes(dimension))
        words = [sys.executable, "-m", "hanse_simulations.benchmarks.aggregation_memory", "send"]
        words += [str(streams.port), str(dimension), str(keys.certificate)]
        words += [str(own / "identity.key") for own in keys.merchants.values()]
        peers = subprocess.Popen(words)
        try:
            if not streams.wait(WAIT_SECONDS, lambda connected: len(connected) == merchants):
                raise RoundFailed(f"Only {len(streams.connected())} merchants came.")
            growth = Growth()
            sum_ = open_aggregator(list(identities.values())).open_round(0, bytes(32), dimension)
            asked = dict.fromkeys(names, Start(**sum_.work, model=b""))
            came = 0
            for name, _, vector in trip(
                Connected(streams), Upload, asked, WAIT_SECONDS, MAX_MESSAGE_BYTES, Roll()
            ):
                sum_.add_vector(public[name], vector)
                del vector
                came += 1
            if came < merchants:
                raise RoundFailed(f"Only {came} of {merchants} uploads came.")
            return growth.peak_bytes() / (4 * dimension)
        finally:
            streams.close_block()
            peers.kill()
            peers.wait()


def send(port: int, dimension: int, certificate: bytes, identities: list[Ed25519PrivateKey]) -> None:
    """Be merchants that answer a question with zeros as their upload."""
    uploads: dict[int, bytes] = {}

    def handle(question: Buffer) -> bytes:
        start = wire.decode(Start, question)
        if start.round not in uploads:
            uploads[start.round] = wire.encode(Upload(**start.work, vector=bytes(4 * dimension)))
        return uploads[start.round]

    asyncio.run(serve_block(port, certificate, BLOCK, [(identity, handle) for identity in identities]))


def main() -> None:
    """Measure with the numbers on the command line, or be its merchants."""
    if sys.argv[1] == "send":
        port, numbers, certificate, *keys = sys.argv[2:]
        identities = [signing.load_key(Path(key)) for key in keys]
        send(int(port), int(numbers), Path(certificate).read_bytes(), identities)
        return
    merchants, dimension = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"models": measure(merchants, dimension, Path(folder) / "keys")}))


if __name__ == "__main__":
    main()
