"""Versions side by side: what version 1 wrote is read and written by the same bytes, what is new says so."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hanse_common import wire
from hanse_common.errors import WireError, WireVersionUnknown
from hanse_common.modes import LocalSchedule, LocalTraining
from hanse_common.plan import Plan
from hanse_common.protocol import WIRE_VERSION, Since, unsaid
from hanse_common.wire import Message, Value

RECORDED: list[dict[str, str]] = json.loads(
    (Path(__file__).parent / "protocol" / "version-1.json").read_text()
)


class Inner(Value):
    size: int = 1
    colour: Annotated[str, Since(4)] = "grey"


class Fresh(Value):
    since: ClassVar[int] = 2

    length: int = 1


class Outer(Message):
    kind: ClassVar[int] = 900
    tail: ClassVar[str | None] = "body"

    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    either: Inner | Fresh | None = None
    pause: Annotated[float, Since(2)] = 0.0
    body: Annotated[bytes, Field(max_length=100)] = b""


def version(message: Message) -> Any:
    return msgpack.unpackb(wire.encode(message), use_list=False)[0]


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["type"].rpartition(".")[2])
def test_what_version_1_wrote_is_read_and_written_by_the_same_bytes(recorded: dict[str, str]) -> None:
    module, _, name = recorded["type"].rpartition(".")
    model = getattr(importlib.import_module(module), name)
    data = bytes.fromhex(recorded["bytes"])
    message = wire.decode(model, data, 1 << 24)
    assert wire.encode(message) == data


def test_each_kind_of_message_of_version_1_is_recorded() -> None:
    kinds = {msgpack.unpackb(bytes.fromhex(one["bytes"]), use_list=False)[1] for one in RECORDED}
    assert len(kinds) == 37 - 1  # one number was never used


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (Outer(), 1),
        (Outer(many=(Inner(), Inner(size=5)), body=b"x"), 1),
        (Outer(pause=0.5), 2),
        (Outer(either=Fresh()), 2),
        (Outer(either=Inner()), 1),
        (Outer(inner=Inner(colour="red")), 4),
        (Outer(pause=0.5, many=(Inner(), Inner(colour="red"))), 4),
    ],
)
def test_a_message_says_the_earliest_version_that_can_say_it(message: Outer, needed: int) -> None:
    assert version(message) == needed
    if needed <= WIRE_VERSION:
        assert wire.decode(Outer, wire.encode(message)) == message
    else:
        with pytest.raises(WireVersionUnknown, match="later release"):
            wire.decode(Outer, wire.encode(message))


def test_what_goes_without_saying_is_not_said() -> None:
    fields = {"inner": {"size": 1}, "many": (), "either": None, "body": b""}
    assert wire.encode(Outer()) == msgpack.packb([1, 900, fields])
    said = fields | {"pause": 0.0, "body": b""}
    for number in (1, 2):
        with pytest.raises(WireError, match="canonical"):
            wire.decode(Outer, msgpack.packb([number, 900, said]))
    with pytest.raises(WireError, match="canonical"):
        wire.decode(Outer, msgpack.packb([2, 900, fields]))


@given(st.integers(-1, 5), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["grey", "red"]))
def test_there_is_one_encoding_of_a_value(number: int, pause: float, colour: str) -> None:
    message = Outer(pause=pause, inner=Inner(colour=colour))
    data = wire.encode(message)
    changed = bytes([data[0], number % 128]) + data[2:]
    if changed != data:
        with pytest.raises(WireError):
            wire.decode(Outer, changed)


@pytest.mark.parametrize("number", [0, -1, True, "1", 1.0, None])
def test_a_version_is_a_number_from_1(number: Any) -> None:
    fields = {"inner": {"size": 1}, "many": (), "either": None, "body": b""}
    with pytest.raises(WireError) as found:
        wire.decode(Outer, msgpack.packb([number, 900, fields]))
    assert not isinstance(found.value, WireVersionUnknown)


def test_fedprox_needs_version_2_and_plans_without_it_version_1(make_plan: Any) -> None:
    plan: Plan = make_plan()
    assert version(plan) == 1
    assert isinstance(plan.training, LocalTraining)
    with_it = plan.model_copy(update={"training": plan.training.model_copy(update={"proximal": 0.1})})
    assert version(with_it) == 2
    assert wire.decode(Plan, wire.encode(with_it)) == with_it
    assert LocalSchedule.model_fields["proximal"].default == 0.0


def test_what_goes_without_saying_is_left_out_of_json_too() -> None:
    message = Outer(many=(Inner(), Inner(colour="red")), either=Fresh())
    assert unsaid(message) == {"inner": {"colour": True}, "many": {0: {"colour": True}}, "pause": True}
    kept = json.loads(message.model_dump_json(exclude=unsaid(message)))
    assert kept["many"] == [{"size": 1}, {"size": 1, "colour": "red"}]
    assert kept["either"] == {"length": 1}
    assert Outer.model_validate_json(json.dumps(kept)) == message
    assert unsaid(Outer(pause=0.5, inner=Inner(colour="red"))) == {}
