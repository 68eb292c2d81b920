"""Messages: what is within the bounds round-trips, what is not is refused, and no two are of one kind."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import hanse_common
from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.secagg import messages, suite, transcript
from hanse_common.secagg.messages import (
    COMMITMENTS_BYTES,
    COUNTER_BYTES,
    MAX_SETUP_BYTES,
    OPENING_BYTES,
    SEALED_BYTES,
    SHARES_BYTES,
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Member,
    Packet,
    Ready,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
    Work,
)
from hanse_common.secagg.parameters import MAX_ROSTER
from hanse_common.secagg.ring import MAX_VECTOR_BYTES
from hanse_common.secagg.suite import MAX_SETUP_ROUNDS
from hanse_common.secagg.witness import NO_WITNESS
from hanse_common.wire import WIRE_VERSION, Message, Value


def fixed(length: int) -> st.SearchStrategy[bytes]:
    """Return the strategy of byte strings of one length."""
    return st.binary(min_size=length, max_size=length)


numbers = st.integers(0, (1 << 31) - 1)
work = {"plan_digest": fixed(32), "round": numbers, "attempt": numbers}
places = st.sets(st.integers(0, MAX_ROSTER - 1), max_size=9).map(lambda found: tuple(sorted(found)))
members = st.builds(
    Member,
    identity=fixed(32),
    sealing_key=fixed(32),
    mask_keys=st.binary(min_size=32, max_size=96),
    signature=fixed(64),
)
packets = st.lists(
    st.builds(Packet, sealed=st.binary(max_size=99), commitments=st.binary(max_size=99), signature=fixed(64)),
    max_size=3,
).map(tuple)


@st.composite
def agreements(draw: st.DrawFn) -> Agreement:
    found = draw(places)
    fields = {name: draw(strategy) for name, strategy in work.items()}
    return Agreement(**fields, places=found, signatures=draw(fixed(64 * len(found))))


STRATEGIES: dict[type[Message], st.SearchStrategy[Any]] = {
    Joined: st.builds(Joined, **work, member=members),
    Roster: st.builds(Roster, **work, members=st.lists(members, min_size=1, max_size=3).map(tuple)),
    Shares: st.builds(Shares, **work, seed_digests=st.binary(max_size=99), packets=packets),
    Delivery: st.builds(Delivery, **work, packets=packets),
    Ready: st.builds(Ready, **work),
    Upload: st.builds(Upload, **work, vector=st.binary(max_size=99)),
    Survivors: st.builds(Survivors, **work, places=places),
    Agreed: st.builds(Agreed, **work, signature=fixed(64)),
    Agreement: agreements(),
    Unmasked: st.builds(Unmasked, **work, openings=st.binary(max_size=99)),
    suite.Setup: st.builds(
        suite.Setup,
        plan_digest=fixed(32),
        round=numbers,
        rounds=st.integers(1, MAX_SETUP_ROUNDS),
        attempt=numbers,
        directory_digest=fixed(32),
    ),
    suite.CounterStatement: st.builds(
        suite.CounterStatement, identity=fixed(32), counter=st.integers(0, (1 << 63) - 1)
    ),
    suite.JoinStatement: st.builds(
        suite.JoinStatement,
        context=fixed(32),
        identity=fixed(32),
        sealing_key=fixed(32),
        mask_keys=st.binary(max_size=99),
    ),
    suite.PacketStatement: st.builds(
        suite.PacketStatement,
        context=fixed(32),
        dealer=fixed(32),
        holder=fixed(32),
        sealed=st.binary(max_size=99),
        commitments=st.binary(max_size=99),
    ),
    suite.SurvivorStatement: st.builds(suite.SurvivorStatement, context=fixed(32), survivors=places),
}


def kinds(base: type[Message]) -> Iterator[type[Message]]:
    """Yield all messages of the product below `base` that have a kind of their own."""
    for model in base.__subclasses__():
        if model.__module__.startswith("hanse_") and "kind" in vars(model):
            yield model
        yield from kinds(model)


def test_every_message_of_the_protocol_is_tried_here() -> None:
    own = (messages.__name__, suite.__name__, transcript.__name__)
    found = {
        model for model in kinds(Message) if model.__module__ in own and not model.__name__.startswith("_")
    }
    assert found == set(STRATEGIES)


@pytest.mark.parametrize("model", STRATEGIES, ids=lambda model: model.__name__)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_message_round_trips_and_is_no_other(model: type[Message], data: st.DataObject) -> None:
    message = data.draw(STRATEGIES[model])
    encoded = wire.encode(message)
    assert wire.decode(model, encoded) == message
    for other in STRATEGIES:
        if other is not model:
            with pytest.raises(WireError, match="kind"):
                wire.decode(other, encoded)
    for end in {0, 1, len(encoded) // 2, len(encoded) - 1}:
        with pytest.raises(WireError):
            wire.decode(model, encoded[:end])
    with pytest.raises(WireError):
        wire.decode(model, encoded + b"\0")


def test_no_two_messages_are_of_one_kind() -> None:
    for module in pkgutil.walk_packages(hanse_common.__path__, "hanse_common."):
        importlib.import_module(module.name)
    by_kind: dict[int, set[str]] = {}
    for model in kinds(Message):
        by_kind.setdefault(model.kind, set()).add(f"{model.__module__}.{model.__qualname__}")
    assert {kind: names for kind, names in by_kind.items() if len(names) > 1} == {}
    assert len(by_kind) >= len(STRATEGIES) + 6


def test_sizes_are_of_what_they_name() -> None:
    assert (SHARES_BYTES, COMMITMENTS_BYTES, OPENING_BYTES) == (66, 64, 65)
    assert len(NO_WITNESS.to_bytes()) == COUNTER_BYTES == 72
    sealed = suite.seal(bytes(32), bytes(32), bytes(32), bytes(32), bytes(32 + 2 * COUNTER_BYTES))
    assert len(sealed) == SEALED_BYTES


WORK: dict[str, Any] = {"plan_digest": bytes(32), "round": 0, "attempt": 0}
MEMBER: dict[str, Any] = {
    "identity": bytes(32),
    "sealing_key": bytes(32),
    "mask_keys": bytes(32),
    "signature": bytes(64),
}
PACKET: dict[str, Any] = {"sealed": b"", "commitments": b"", "signature": bytes(64)}


def test_the_largest_setup_fits_in_its_bound() -> None:
    packet = Packet(
        sealed=bytes(SEALED_BYTES + SHARES_BYTES * MAX_SETUP_ROUNDS),
        commitments=bytes(COMMITMENTS_BYTES * MAX_SETUP_ROUNDS),
        signature=bytes(64),
    )
    member = Member(**(MEMBER | {"mask_keys": bytes(32 * MAX_SETUP_ROUNDS)}))
    largest: list[Message] = [
        Roster(**WORK, members=(member,) * MAX_ROSTER),
        Shares(**WORK, seed_digests=bytes(32 * MAX_SETUP_ROUNDS), packets=(packet,) * MAX_ROSTER),
        Delivery(**WORK, packets=(packet,) * (MAX_ROSTER - 1)),
    ]
    for message in largest:
        encoded = wire.encode(message)
        assert len(encoded) <= 3 * MAX_SETUP_BYTES // 4
        assert wire.decode(type(message), encoded, MAX_SETUP_BYTES) == message
    everyone = tuple(range(MAX_ROSTER))
    small: list[Message] = [
        Survivors(**WORK, places=everyone),
        Agreement(**WORK, places=everyone, signatures=bytes(64 * MAX_ROSTER)),
        Unmasked(**WORK, openings=bytes(OPENING_BYTES * MAX_ROSTER)),
    ]
    for message in small:
        assert wire.decode(type(message), wire.encode(message)) == message


TOO_MUCH: list[tuple[Any, dict[str, Any]]] = [
    (Member, MEMBER | {"identity": bytes(31)}),
    (Member, MEMBER | {"identity": bytes(33)}),
    (Member, MEMBER | {"sealing_key": bytes(31)}),
    (Member, MEMBER | {"mask_keys": bytes(31)}),
    (Member, MEMBER | {"mask_keys": bytes(32 * MAX_SETUP_ROUNDS + 1)}),
    (Member, MEMBER | {"signature": bytes(63)}),
    (Member, MEMBER | {"signature": bytes(65)}),
    (Packet, PACKET | {"sealed": bytes(SEALED_BYTES + SHARES_BYTES * MAX_SETUP_ROUNDS + 1)}),
    (Packet, PACKET | {"commitments": bytes(COMMITMENTS_BYTES * MAX_SETUP_ROUNDS + 1)}),
    (Packet, PACKET | {"signature": b""}),
    (Packet, PACKET | {"signature": bytes(65)}),
    (Roster, WORK | {"members": ()}),
    (Roster, WORK | {"members": (Member(**MEMBER),) * (MAX_ROSTER + 1)}),
    (Shares, WORK | {"seed_digests": bytes(32 * MAX_SETUP_ROUNDS + 1), "packets": ()}),
    (Shares, WORK | {"seed_digests": b"", "packets": (Packet(**PACKET),) * (MAX_ROSTER + 1)}),
    (Delivery, WORK | {"packets": (Packet(**PACKET),) * (MAX_ROSTER + 1)}),
    (Survivors, WORK | {"places": tuple(range(MAX_ROSTER + 1))}),
    (Survivors, WORK | {"places": (MAX_ROSTER,)}),
    (Survivors, WORK | {"places": (-1,)}),
    (Survivors, WORK | {"places": (True,)}),
    (Survivors, WORK | {"places": (1.0,)}),
    (Survivors, WORK | {"places": (0, 0)}),
    (Survivors, WORK | {"places": (1, 0)}),
    (Survivors, WORK | {"places": (0, 2, 1)}),
    (Agreed, WORK | {"signature": bytes(63)}),
    (Agreed, WORK | {"signature": bytes(65)}),
    (Agreement, WORK | {"places": (0, 1), "signatures": bytes(127)}),
    (Agreement, WORK | {"places": (0, 1), "signatures": bytes(64)}),
    (Agreement, WORK | {"places": (0, 1), "signatures": bytes(192)}),
    (Agreement, WORK | {"places": (), "signatures": bytes(64)}),
    (Agreement, WORK | {"places": (1, 1), "signatures": bytes(128)}),
    (Agreement, WORK | {"places": (2, 1), "signatures": bytes(128)}),
    (Agreement, WORK | {"places": (MAX_ROSTER,), "signatures": bytes(64)}),
    (Unmasked, WORK | {"openings": bytes(OPENING_BYTES * MAX_ROSTER + 1)}),
    (Ready, WORK | {"plan_digest": bytes(31)}),
    (Ready, WORK | {"round": -1}),
    (Ready, WORK | {"attempt": 1 << 31}),
    (Ready, WORK | {"more": 1}),
]


@pytest.mark.parametrize(("model", "fields"), TOO_MUCH, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_out_of_bounds_is_refused(model: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model(**fields)
    if issubclass(model, Message):
        # The same over the wire, where nothing has checked the sender.
        plain = {
            name: tuple(v.model_dump() if isinstance(v, Value) else v for v in value)
            if isinstance(value, tuple)
            else value
            for name, value in fields.items()
        }
        data = msgpack.packb([WIRE_VERSION, model.kind, plain], use_bin_type=True)
        with pytest.raises(WireError, match=model.__name__):
            wire.decode(model, data, 1 << 24)


def test_what_would_be_in_bounds_is_not_refused_above() -> None:
    for model in {model for model, _ in TOO_MUCH}:
        fields: dict[str, Any] = {Member: MEMBER, Packet: PACKET}.get(model, WORK)
        more: dict[Any, dict[str, Any]] = {
            Roster: {"members": (Member(**MEMBER),)},
            Shares: {"seed_digests": b"", "packets": ()},
            Delivery: {"packets": ()},
            Survivors: {"places": (0, 1)},
            Agreed: {"signature": bytes(64)},
            Agreement: {"places": (0, 1), "signatures": bytes(128)},
            Unmasked: {"openings": b""},
        }
        assert model(**(fields | more.get(model, {})))


def test_an_upload_longer_than_any_model_is_refused() -> None:
    assert Upload.model_fields["vector"].metadata[0].max_length == MAX_VECTOR_BYTES


def test_longer_bytes_than_a_trip_allows_are_refused_before_they_are_parsed() -> None:
    encoded = wire.encode(Unmasked(**WORK, openings=bytes(100)))
    assert wire.decode(Unmasked, encoded, len(encoded))
    with pytest.raises(WireError, match="expected at most"):
        wire.decode(Unmasked, encoded, len(encoded) - 1)


def test_work_is_what_all_messages_of_a_round_share() -> None:
    fields = {"plan_digest": bytes(32), "round": 3, "attempt": 4}
    for model in STRATEGIES:
        if issubclass(model, Work):
            assert list(model.model_fields)[:3] == list(fields)
    assert Ready(**fields).work == fields
