"""Every parser that a server reaches, at inputs kept and new: refusals only, in bounded time and memory."""

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from . import mutate, parsers, seeds
from .mutate import Mutator
from .target import Broken, Parse, Target, plain, require

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 5
"""One input's time at most. It takes less than a hundredth of that."""

MEMORY_BYTES = 256 << 20
"""What all inputs of a target together may add to the peak of this process's memory."""

QUICK = 1500
PART = 25_000
TARGETS = {target.name: target for target in parsers.targets()}
PARTS = [(name, part) for name, target in TARGETS.items() for part in range(-(-target.inputs // PART))]


def kept(target: Target) -> list[bytes]:
    """Return the inputs that were kept for `target`, in a fixed order."""
    return [path.read_bytes() for path in sorted((CORPUS / target.name).glob("*"))]


@contextmanager
def bounded_time() -> Iterator[Callable[[], None]]:
    """Give a function that begins a new input's time; raises when one takes more than `SECONDS`."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise Broken(f"one input takes more than {SECONDS} s")

    if threading.current_thread() is not threading.main_thread():
        pytest.fail("signals reach the main thread only")
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_bytes() -> int:
    """Return the most memory that this process held since it was last asked to begin anew."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run(target: Target, folder: Path, inputs: Iterator[bytes]) -> int:
    """Parse all `inputs`, and return how many there were. Fails with the input that broke something."""
    count = 0
    folder.mkdir(exist_ok=True)
    with target.opened(folder) as parse, bounded_time() as begin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = peak_bytes()
        for data in inputs:
            count += 1
            begin()
            try:
                parse(data)
            except target.refusals:
                pass
            except Exception as error:
                pytest.fail(
                    f"{target.name}: input {count}, {type(error).__name__}: {error}\n"
                    f"Keep it in {CORPUS / target.name}: bytes.fromhex({data.hex()!r})"
                )
        grown = peak_bytes() - before
    assert grown < MEMORY_BYTES, f"{target.name}: memory grew by {grown >> 20} MiB"
    return count


def mutations(target: Target, seed: int, number: int) -> Iterator[bytes]:
    mutator = Mutator(random.Random(f"{target.name} {seed}"), target.seeds() + kept(target), target.dialect)
    for _ in range(number):
        yield mutator.next()


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_taken(name: str, folder_in_memory: Path) -> None:
    """Else the rest would show little: what is near a valid input gets furthest."""
    target = TARGETS[name]
    with target.opened(folder_in_memory) as parse:
        for data in target.seeds()[
            : -1 if name.startswith("message-") else None
        ]:  # a message's last one is bare
            parse(data)


def test_every_message_has_a_seed() -> None:
    """A message that was added needs one in `seeds.messages`."""
    assert not set(seeds.message_types()) - {type(message) for message in seeds.messages()}


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_were_kept_and_some_more(name: str, folder_in_memory: Path) -> None:
    target = TARGETS[name]
    run(target, folder_in_memory, iter(kept(target)))
    run(target, folder_in_memory / "more", mutations(target, -1, min(QUICK, target.inputs // 20)))


def test_a_million_inputs_are_tried() -> None:
    assert sum(target.inputs for target in TARGETS.values()) >= 10**6
    assert sum(min(PART, TARGETS[name].inputs - PART * part) for name, part in PARTS) >= 10**6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_million_inputs(name: str, part: int, folder_in_memory: Path) -> None:
    target = TARGETS[name]
    number = min(PART, target.inputs - PART * part)
    assert run(target, folder_in_memory, mutations(target, part, number)) == number
    print(f"{target.name}: {number} inputs, of {sum(each.inputs for each in TARGETS.values())} in all")


def test_the_corpus_is_small_and_of_targets_that_there_are() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= set(TARGETS)
    assert sum(path.stat().st_size for path in files) <= 200_000


# That a test of all this can fail.


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (lambda data: [][len(data)], "IndexError"),
        (lambda data: require(len(data) < 3, "too long"), "Broken: too long"),
    ],
)
def test_what_breaks_is_reported_with_its_input(parse: Parse, words: str, folder_in_memory: Path) -> None:
    target = Target("x", 1, mutate.BYTES, lambda: [b"abc"], plain(parse), (ValueError,))
    with pytest.raises(pytest.fail.Exception, match=words) as caught:
        run(target, folder_in_memory, iter([b"abcd"]))
    assert b"abcd".hex() in str(caught.value)


def test_an_input_that_takes_long_is_noticed(folder_in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.test_fuzz.SECONDS", 0.05)
    target = Target("x", 1, mutate.BYTES, list, plain(lambda _: threading.Event().wait(20)), ())
    with pytest.raises(pytest.fail.Exception, match="one input takes more than"):
        run(target, folder_in_memory, iter([b""]))


def test_an_input_that_takes_much_memory_is_noticed(folder_in_memory: Path) -> None:
    target = Target("x", 1, mutate.BYTES, list, plain(lambda _: b"x" * 2 * MEMORY_BYTES), ())
    with pytest.raises(AssertionError, match="memory grew by"):
        run(target, folder_in_memory, iter([b""]))
