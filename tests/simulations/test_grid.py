"""The in-process transport: order, and dropouts that follow from seed, merchant, round and try alone."""

from hanse_common import wire
from hanse_common.messages import Start
from hanse_common.secagg.messages import Agreement, Survivors
from hanse_simulations.grid import TRIPS, LocalGrid
from hanse_simulations.seeded import RoundRandomness, SeededRandomness

NAMES = tuple(f"m{index:02}" for index in range(50))


def grid(rate: float, seed: int = 0) -> LocalGrid:
    return LocalGrid({name: lambda data: data + b"!" for name in reversed(NAMES)}, rate, seed)


def question(trip: str, round_: int) -> bytes:
    work = {"plan_digest": bytes(32), "round": round_, "attempt": 0}
    asked = {
        "upload": Start(**work, model=b""),
        "agreed": Survivors(**work, places=(0, 1)),
        "unmasked": Agreement(**work, places=(), signatures=b""),
    }
    return wire.encode(asked[trip])


def dropouts(of: LocalGrid, round_: int) -> dict[str, str]:
    """Return who dropped out of one try at a round, and in which trip."""
    lost = {}
    for trip in TRIPS:
        heard = [name for name, _ in of.exchange(trip, dict.fromkeys(NAMES, question(trip, round_)), 1.0)]
        lost |= dict.fromkeys(set(NAMES) - set(heard), trip)
    return lost


def test_everyone_is_asked_and_answers_in_order() -> None:
    assert grid(0).gather() == grid(0).merchants() == NAMES
    replies = list(grid(0).exchange("joined", {"m03": b"x", "m01": b"y"}, 1.0))
    assert replies == [("m01", b"y!"), ("m03", b"x!")]


def test_merchants_drop_out_at_the_rate_and_in_any_trip() -> None:
    used = grid(0.3)
    lost = [trip for round_ in range(200) for trip in dropouts(used, round_).values()]
    # 10 000 merchants in rounds: five standard deviations are 229.
    assert abs(len(lost) - 3000) < 229
    for trip in TRIPS:
        assert abs(lost.count(trip) - 1000) < 150


def test_as_many_drop_out_of_each_try_as_is_said_and_not_always_the_same() -> None:
    used = LocalGrid(dict.fromkeys(NAMES, lambda data: data), seed=3, dropouts=2)
    rounds = [dropouts(used, round_ % 50) for round_ in range(300)]
    assert {len(lost) for lost in rounds} == {2}
    names = [name for lost in rounds for name in lost]
    trips = [trip for lost in rounds for trip in lost.values()]
    for name in NAMES:
        assert abs(names.count(name) - 600 / len(NAMES)) < 5 * (600 / len(NAMES)) ** 0.5
    for trip in TRIPS:
        assert abs(trips.count(trip) - 200) < 60


def test_set_ups_lose_nobody() -> None:
    assert len(list(grid(0.99).exchange("shares", dict.fromkeys(NAMES, b"x"), 1.0))) == len(NAMES)


def test_dropouts_follow_from_seed_merchant_round_and_try_alone() -> None:
    used = grid(0.5)
    for round_ in range(20):
        dropouts(used, round_)
    fresh = grid(0.5)
    once = dropouts(fresh, 30)
    assert dropouts(used, 30) == once
    assert dropouts(fresh, 31) != once
    assert dropouts(fresh, 30) != once  # another try
    assert dropouts(grid(0.5, seed=1), 30) != once


def test_a_merchant_works_even_when_its_reply_is_lost() -> None:
    worked = []

    def handle(data: bytes) -> bytes:
        worked.append(data)
        return data

    lossy = LocalGrid({"a": handle}, 0.999999)
    answers = [reply for trip in TRIPS for reply in lossy.exchange(trip, {"a": question(trip, 0)}, 1.0)]
    assert len(answers) == 2
    assert len(worked) == 3


def test_a_round_draws_the_same_whatever_was_drawn_before() -> None:
    fresh, used = RoundRandomness(1, "alder"), RoundRandomness(1, "alder")
    used.begin(0)
    used.words(100)
    for source in (fresh, used):
        source.begin(3)
    assert (fresh.words(8) == used.words(8)).all()


def test_streams_differ_by_seed_name_round_and_try() -> None:
    def first(seed: int, name: str, *rounds: int) -> int:
        source = RoundRandomness(seed, name)
        for round_ in rounds:
            source.begin(round_)
        return int(source.words(1)[0])

    drawn = [
        first(0, "a"),
        first(0, "a", 0),
        first(0, "a", 0, 0),
        first(0, "a", 1),
        first(0, "b", 0),
        first(1, "a", 0),
        int(SeededRandomness(0, "b").words(1)[0]),
    ]
    assert len(set(drawn)) == len(drawn)
