"""The in-process transport: order, and dropouts that follow from seed and request alone."""

from hanse_simulations.grid import LocalGrid
from hanse_simulations.seeded import RoundRandomness, SeededRandomness

NAMES = tuple(f"m{index:02}" for index in range(50))


def grid(rate: float, seed: int = 0) -> LocalGrid:
    return LocalGrid({name: lambda data: data + b"!" for name in reversed(NAMES)}, rate, seed)


def heard(of: LocalGrid, payload: bytes, kind: str = "join") -> list[str]:
    return [name for name, _ in of.exchange(kind, dict.fromkeys(NAMES, payload), 1.0)]


def test_everyone_is_asked_and_answers_in_order() -> None:
    assert grid(0).merchants() == NAMES
    replies = list(grid(0).exchange("join", {"m03": b"x", "m01": b"y"}, 1.0))
    assert replies == [("m01", b"y!"), ("m03", b"x!")]


def test_replies_are_lost_at_the_rate() -> None:
    kept = sum(len(heard(grid(0.3), f"round {index}".encode())) for index in range(200))
    # 10 000 replies: five standard deviations are 229.
    assert abs(kept - 7000) < 229


def test_losses_follow_from_seed_merchant_and_request_alone() -> None:
    used = grid(0.5)
    for index in range(20):
        heard(used, f"earlier {index}".encode())
    assert heard(used, b"now") == heard(grid(0.5), b"now")
    assert heard(grid(0.5), b"now") != heard(grid(0.5), b"then")
    assert heard(grid(0.5), b"now") != heard(grid(0.5, seed=1), b"now")
    assert heard(grid(0.5), b"now") != heard(grid(0.5), b"now", kind="upload")


def test_a_merchant_works_even_when_its_reply_is_lost() -> None:
    worked = []

    def handle(data: bytes) -> bytes:
        worked.append(data)
        return data

    lossy = LocalGrid({"a": handle}, 0.999999)
    assert list(lossy.exchange("upload", {"a": b"x"}, 1.0)) == []
    assert worked == [b"x"]


def test_a_round_draws_the_same_whatever_was_drawn_before() -> None:
    fresh, used = RoundRandomness(1, "alder"), RoundRandomness(1, "alder")
    used.begin(0, 0)
    used.words(100)
    for source in (fresh, used):
        source.begin(3, 1)
    assert (fresh.words(8) == used.words(8)).all()


def test_streams_differ_by_seed_name_round_and_attempt() -> None:
    def first(seed: int, name: str, *work: int) -> int:
        source = RoundRandomness(seed, name)
        if work:
            source.begin(*work)
        return int(source.words(1)[0])

    drawn = [
        first(0, "a"),
        first(0, "a", 0, 0),
        first(0, "a", 0, 1),
        first(0, "a", 1, 0),
        first(0, "b", 0, 0),
        first(1, "a", 0, 0),
        int(SeededRandomness(0, "b").words(1)[0]),
    ]
    assert len(set(drawn)) == len(drawn)
