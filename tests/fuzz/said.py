"""Parsers of what a server says: messages, what is signed inside them, and streams."""

import hashlib
import queue
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from hanse_common import messages, signing, wire
from hanse_common.charter import MAX_CHARTER_BYTES, SignedCharter, follow
from hanse_common.directory import SignedDirectory, require_admitted
from hanse_common.errors import DirectoryRefused, SignatureInvalid, WireError
from hanse_common.membership import SignedRequest
from hanse_common.plan import SignedPlan
from hanse_common.release import SignedRelease
from hanse_common.session import FRAME_BYTES, Answer, Ask, Assignment, Hello, Latest, RecordReader, frames
from hanse_common.wire import Message

from . import mutate, seeds
from .target import Parse, Target, parts_of, plain, require

# -- messages -----------------------------------------------------------------------------------------------------


def _message(model: type[Message], data: bytes) -> None:
    require(wire.encode(wire.decode(model, data)) == data, "what was taken has another encoding")


def _message_seeds(model: type[Message]) -> list[bytes]:
    """Return its messages of `seeds`, and its bare fields, which a new message has before somebody adds a seed."""
    bare = msgpack.packb([wire.WIRE_VERSION, model.kind, dict.fromkeys(model.model_fields)])
    return [wire.encode(message) for message in seeds.messages() if type(message) is model] + [bare]


def _signed_plan(data: bytes) -> None:
    signed = SignedPlan(plan=data, signature=signing.sign(seeds.OPERATOR, SignedPlan.DOMAIN, data))
    plan = signed.open(signing.public_bytes(seeds.OPERATOR))
    require(plan.digest == hashlib.sha256(data).digest(), "a plan's name is not its bytes' digest")


def _signed_directory(data: bytes) -> None:
    signed = SignedDirectory(charters=seeds.charters()[:1], directory=data).signed_by(seeds.LEAGUE)
    directory = signed.open(seeds.PINNED, seeds.NOW)
    require_admitted(directory, signed.follow(seeds.PINNED), seeds.directory())
    require(
        directory.expires > seeds.NOW and directory.digest == hashlib.sha256(data).digest(),
        "a directory's digest",
    )
    require(len(set(directory.entities(0).values())) == len(directory.entries), "an entity twice")


def _charters(data: bytes) -> None:
    """Follow a chain of charters, a MessagePack array, from the first, all signed by whoever held a key."""
    chain = []
    for charter in parts_of(data) or ():
        if not isinstance(charter, bytes) or len(charter) > MAX_CHARTER_BYTES:
            return
        chain.append(SignedCharter(charter=charter).signed_by(seeds.LEAGUE).signed_by(seeds.MERCHANTS[0]))
    if chain:
        *_, last = follow(chain, hashlib.sha256(chain[0].charter).digest())
        require(
            last == chain[-1].read() and last.threshold <= len(last.holders),
            "a charter that nobody can sign by",
        )


def _charters_seeds() -> list[bytes]:
    chain = [signed.charter for signed in seeds.charters()]
    return [msgpack.packb(chain[:1]), msgpack.packb(chain)]


def _request_seeds() -> list[bytes]:
    return [seeds.request(seeds.MERCHANTS[3], "m3").to_text().encode()]


def _request_text(data: bytes) -> None:
    asked = SignedRequest.from_text(data.decode("utf-8", "replace"))
    require(
        SignedRequest.from_text(asked.to_text()) == asked, "a request that is read otherwise when printed"
    )
    asked.require_sound()


def _model(data: bytes) -> None:
    model = messages.model_from_bytes(data, 21)
    require(model.shape == (21,) and np.isfinite(model).all(), "a model that is none")
    require(messages.model_to_bytes(model) == data, "what was taken has another encoding")


# -- streams ------------------------------------------------------------------------------------------------------

_ZEROS = bytes(FRAME_BYTES + 2)


def _frames(data: bytes) -> None:
    """Read frames of any length: of each 4 bytes the first begins a frame, the others say how long it is."""
    reader, held = RecordReader(3 * FRAME_BYTES), 0
    for at in range(0, len(data) - 3, 4):
        length = int.from_bytes(data[at + 1 : at + 4], "big") % (FRAME_BYTES + 2)
        record = reader.add(data[at : at + 1] + _ZEROS[: length - 1] if length else b"")
        held = 0 if record is not None else held + max(length - 1, 0)
        require(
            held <= reader.max_bytes and len(record or b"") <= reader.max_bytes, "more than the bound is held"
        )


def _frames_seeds() -> list[bytes]:
    whole = struct.pack(">I", 1 << 24 | FRAME_BYTES)
    return [whole + b"\0\0\0\5", b"\0\0\0\1" * 3, whole * 3 + b"\0\0\0\1", b"\0" + whole[1:]]


@contextmanager
def _stream(_: Path) -> Iterator[Parse]:
    from hanse_client.stream import Limits, Lost, Stream, _Block

    certificate = bytes(32)
    assignment = next(m for m in seeds.messages() if isinstance(m, Assignment))

    def parse(data: bytes) -> None:
        heard = parts_of(data)
        if heard is None or not all(type(frame) is bytes for frame in heard):
            return
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        handled: list[bytes] = []

        def handle(request: bytes) -> bytes:
            handled.append(request)
            return hashlib.sha256(request).digest()

        block = _Block(
            assignment,
            seeds.MERCHANTS[0],
            b"",
            handle,
            threading.Event(),
            Limits(1 << 16, 1, 1),
            lambda _: None,
            lambda _: None,
        )
        try:
            stream = Stream(iter(heard), said, certificate)
            stream.greet(seeds.MERCHANTS[0], assignment.block)
            block._converse(stream)
        except Lost:
            require(not handled, "something was answered before a challenge")
        finally:
            answers = [said.get_nowait()[1:] for _ in range(said.qsize())]
            if answers:
                require(wire.decode(Hello, answers.pop(0)).block == assignment.block, "another hello")
            asked: dict[int, bytes] = {}
            for frame in heard[1 : len(answers) + 1]:
                ask = wire.decode(Ask, frame[1:])
                require(
                    asked.setdefault(ask.trip, ask.payload) == ask.payload, "one trip, two questions answered"
                )
            trips = [wire.decode(Answer, answer).trip for answer in answers]
            require(
                trips == sorted(trips) and len(set(trips)) == len(handled),
                "a trip answered twice, or backwards",
            )

    yield parse


def _release_stream_seeds() -> list[bytes]:
    signed = SignedRelease.sign(seeds.release(), seeds.MERCHANTS[0])
    files = [frame for file in seeds.release().files for frame in frames(bytes(file.size))]
    told = list(frames(wire.encode(Latest(signed=signed))))
    return [msgpack.packb(said) for said in ([*told, *files], told, [*frames(wire.encode(Latest()))])]


def _release_stream(data: bytes) -> None:
    """A server that hands recognizers out; what it says, in frames."""
    from hanse_client.release_stream import ReleaseStream
    from hanse_client.stream import Lost, Stream

    heard = parts_of(data)
    if heard is None or not all(type(frame) is bytes for frame in heard):
        return
    fetching = ReleaseStream(lambda: False, lambda moved: None)
    fetching._stream = Stream(iter(heard), queue.SimpleQueue(), bytes(32))
    try:
        signed = fetching.latest(0)
        if signed is None:
            return
        signed.open(signing.public_bytes(seeds.MERCHANTS[0]))
        for file in seeds.release().files:
            moved = sum(map(len, fetching.pieces(file)))
            require(moved <= file.size, "more of a file than was announced")
    except Lost:
        return


def targets() -> list[Target]:
    """Return the targets of this module."""
    plans, listed = [wire.encode(plan) for plan in seeds.plans()], [wire.encode(seeds.directory())]
    pack, flat = mutate.messagepack, mutate.BYTES
    wrong = (WireError, SignatureInvalid)
    refused = (*wrong, DirectoryRefused)
    frames_of = [msgpack.packb(said) for said in seeds.stream()]
    return [
        *(
            Target(
                f"message-{model.__name__.lower().strip('_')}",
                22_000,
                pack,
                partial(_message_seeds, model),
                plain(partial(_message, model)),
                (WireError,),
            )
            for model in seeds.message_types()
        ),
        Target("signed-plan", 30_000, pack, lambda: plans, plain(_signed_plan), wrong),
        Target("signed-directory", 30_000, pack, lambda: listed, plain(_signed_directory), refused),
        Target("charters", 20_000, pack, _charters_seeds, plain(_charters), refused),
        Target("request-text", 20_000, mutate.text, _request_seeds, plain(_request_text), wrong),
        Target(
            "model",
            30_000,
            flat,
            lambda: [bytes(84), np.ones(21, "<f4").tobytes()],
            plain(_model),
            (WireError,),
        ),
        Target("frames", 30_000, flat, _frames_seeds, plain(_frames), (WireError,)),
        Target("stream", 20_000, pack, lambda: frames_of, _stream, (WireError,)),
        Target("release-stream", 20_000, pack, _release_stream_seeds, plain(_release_stream), wrong),
    ]
