"""Released recognizers on a merchant's disk: what is refused, and that one whole recognizer is in use at any time."""

import hashlib
import io
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.releases import KEPT, Releases
from hanse_common import signing, wire
from hanse_common.errors import ConfigError, HanseError, ReleaseRefused, SignatureInvalid
from hanse_common.release import Release, ReleasedFile, SignedRelease
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

from .released import OPERATOR, RECIPE, Made, releases_in


@pytest.fixture(scope="module")
def recognizers(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """Five recognizers of one league."""
    return [Made(tmp_path_factory.mktemp("made"), seed) for seed in range(5)]


@pytest.fixture
def releases(folder_in_memory: Path) -> Releases:
    # Every step is synced to the disk, and there are hundreds.
    return releases_in(folder_in_memory / "recognizers")


def take(releases: Releases, made: Made, number: int, **changes: Any) -> Path:
    return releases.take(releases.consider(made.signed(number, **changes)), made.fetch)


def in_use(releases: Releases) -> str | None:
    """Return the digest of the recognizer in use, which must load whole."""
    folder = releases.folder()
    if folder is None:
        return None
    found = Recognizer.load(folder).digest().hex()
    assert found == folder.name
    return found


def names(releases: Releases) -> set[str]:
    return {path.name for path in releases.path.iterdir()}


# -- honest releases ----------------------------------------------------------------------------------------------


def test_the_first_release_is_fetched_and_in_use(releases: Releases, recognizers: list[Made]) -> None:
    assert (releases.folder(), releases.in_use(), releases.waiting(), releases.number()) == (
        None,
        None,
        None,
        0,
    )
    folder = take(releases, recognizers[0], 1)
    assert in_use(releases) == recognizers[0].digest
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "release.hanse"} == (
        recognizers[0].files
    )
    assert releases.in_use() == recognizers[0].release(1)
    assert (releases.waiting(), releases.number()) == (None, 1)
    assert releases.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_release_that_was_noted_and_not_taken_waits_and_is_taken_later(
    releases: Releases, recognizers: list[Made]
) -> None:
    take(releases, recognizers[0], 1)
    release = releases.consider(recognizers[1].signed(2))
    again = releases_in(releases.path)
    assert (again.waiting(), again.number(), in_use(again)) == (release, 1, recognizers[0].digest)
    assert again.in_use() == recognizers[0].release(1)
    assert again.consider(recognizers[1].signed(2)) == release, "the server is asked again, and says the same"
    again.take(release, recognizers[1].fetch)
    assert (again.waiting(), again.number(), in_use(again)) == (None, 2, recognizers[1].digest)


def test_a_rollback_is_a_later_release_and_fetches_nothing_that_is_here(
    releases: Releases, recognizers: list[Made]
) -> None:
    take(releases, recognizers[0], 1)
    take(releases, recognizers[1], 2, version=2)

    def nothing(file: ReleasedFile) -> Iterable[bytes]:
        raise AssertionError(file)

    releases.take(releases.consider(recognizers[0].signed(3)), nothing)
    assert in_use(releases) == recognizers[0].digest
    assert releases.in_use() == recognizers[0].release(3)


def test_a_recognizer_that_was_damaged_since_is_fetched_again(
    releases: Releases, recognizers: list[Made]
) -> None:
    folder = take(releases, recognizers[0], 1)
    (folder / "model.safetensors").write_bytes(b"no model")
    take(releases, recognizers[0], 2)
    assert in_use(releases) == recognizers[0].digest


def test_the_two_before_are_kept_and_no_more(releases: Releases, recognizers: list[Made]) -> None:
    for number, made in enumerate(recognizers, 1):
        take(releases, made, number)
    kept = {made.digest for made in recognizers[-1 - KEPT :]}
    assert names(releases) == kept | {"current", "latest.hanse", ".lock"}
    take(releases, recognizers[2], 6)  # back, and again forward: the last ones taken are kept
    take(releases, recognizers[0], 7)
    assert names(releases) == {recognizers[i].digest for i in (0, 2, 4)} | {
        "current",
        "latest.hanse",
        ".lock",
    }


# -- what is refused ----------------------------------------------------------------------------------------------


def test_an_earlier_release_is_never_believed_again_not_after_a_restart_either(
    releases: Releases, recognizers: list[Made]
) -> None:
    take(releases, recognizers[0], 1)
    take(releases, recognizers[1], 2)
    for again in (releases, releases_in(releases.path)):
        with pytest.raises(ReleaseRefused, match="release 1, release 2 was seen"):
            again.consider(recognizers[0].signed(1))
        with pytest.raises(ReleaseRefused, match="release 2, release 2 was seen"):
            again.consider(recognizers[2].signed(2))
    assert in_use(releases) == recognizers[1].digest


def test_what_was_seen_counts_though_it_was_never_fetched(
    releases: Releases, recognizers: list[Made]
) -> None:
    releases.consider(recognizers[1].signed(9))
    with pytest.raises(ReleaseRefused, match="release 8, release 9"):
        releases_in(releases.path).consider(recognizers[0].signed(8))


def test_another_operator_and_another_league(releases: Releases, recognizers: list[Made]) -> None:
    with pytest.raises(SignatureInvalid):
        releases.consider(recognizers[0].signed(1, key=Ed25519PrivateKey.generate()))
    with pytest.raises(ReleaseRefused, match="of league other, expected test"):
        releases.consider(recognizers[0].signed(1, league="other"))
    signed = recognizers[0].signed(1)
    changed = wire.encode(recognizers[0].release(2))
    with pytest.raises(SignatureInvalid):
        releases.consider(signed.model_copy(update={"release": changed}))
    assert releases.latest() is None


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("shirt", "shoe", "hat"), "it also has 'hat'; it lacks 'bag'"),
        (("shoe", "shirt", "bag"), "the same in another order"),
    ],
)
def test_another_taxonomy_is_refused_and_named(
    releases: Releases, recognizers: list[Made], tmp_path: Path, classes: tuple[str, ...], said: str
) -> None:
    take(releases, recognizers[0], 1)
    other = Made(tmp_path / "other", classes=classes)
    with pytest.raises(ReleaseRefused, match=said) as refused:
        take(releases, other, 2)
    assert refused.value.exit_code == 27
    assert in_use(releases) == recognizers[0].digest
    assert releases.waiting() == other.release(2)


def test_a_recipe_that_the_policy_does_not_name(tmp_path: Path, recognizers: list[Made]) -> None:
    with pytest.raises(ReleaseRefused, match="recipe: found"):
        take(releases_in(tmp_path / "a", recipes=("0" * 16,)), recognizers[0], 1)
    allowed = releases_in(tmp_path / "b", recipes=(RECIPE.digest().hex()[:16],))
    take(allowed, recognizers[0], 1)
    assert in_use(allowed) == recognizers[0].digest


def test_a_recognizer_that_is_here_is_judged_again_when_it_comes_back(
    releases: Releases, recognizers: list[Made]
) -> None:
    take(releases, recognizers[0], 1)
    take(releases, recognizers[1], 2)
    narrowed = releases_in(releases.path, taxonomy=Taxonomy(classes=("shirt", "shoe", "bag", "hat")))
    with pytest.raises(ReleaseRefused, match="it lacks 'hat'"):
        take(narrowed, recognizers[0], 3)
    assert in_use(releases) == recognizers[1].digest


def test_only_the_release_that_was_seen_last_is_taken(releases: Releases, recognizers: list[Made]) -> None:
    older = releases.consider(recognizers[0].signed(1))
    releases.consider(recognizers[1].signed(2))
    with pytest.raises(ReleaseRefused, match="another was seen since"):
        releases.take(older, recognizers[0].fetch)
    with pytest.raises(ReleaseRefused, match="another was seen since"):
        releases.take(recognizers[2].release(3), recognizers[2].fetch)


def changed(made: Made, name: str, data: bytes) -> Callable[[ReleasedFile], Iterator[bytes]]:
    return lambda file: iter([data]) if file.name == name else made.fetch(file)


@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_wrong_bytes_are_noticed_and_nothing_of_them_stays(
    releases: Releases, recognizers: list[Made], name: str
) -> None:
    take(releases, recognizers[0], 1)
    release = releases.consider(recognizers[1].signed(2))
    data = recognizers[1].files[name]
    wrong = {
        "flipped": bytes([data[0] ^ 1]) + data[1:],
        "short": data[:-1],
        "long": data + b"x",
        "of the one before": recognizers[0].files[name],
    }
    before = names(releases)
    for bytes_ in wrong.values():
        with pytest.raises(ReleaseRefused, match=name):
            releases.take(release, changed(recognizers[1], name, bytes_))
        assert names(releases) == before
        assert in_use(releases) == recognizers[0].digest
    releases.take(release, recognizers[1].fetch)
    assert in_use(releases) == recognizers[1].digest


def test_a_file_without_end_is_read_no_further_than_was_announced(
    releases: Releases, recognizers: list[Made]
) -> None:
    read = 0

    def endless(file: ReleasedFile) -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield bytes(1000)

    with pytest.raises(ReleaseRefused, match="more than the"):
        releases.take(releases.consider(recognizers[0].signed(1)), endless)
    assert read <= recognizers[0].release(1).files[0].size + 1000


@pytest.mark.parametrize(
    "name", ["../../evil.json", "/etc/passwd", "current", "card.json/x", "evil.safetensors"]
)
def test_no_other_name_is_ever_a_file_of_a_release(
    releases: Releases, recognizers: list[Made], name: str
) -> None:
    release = recognizers[0].release(1)
    fields = release.model_dump()
    fields["files"][1]["name"] = name
    data = msgpack.packb([2, Release.kind, fields], use_bin_type=True)
    signed = SignedRelease(release=data, signature=signing.sign(OPERATOR, SignedRelease.DOMAIN, data))
    with pytest.raises(HanseError, match="files"):
        releases.consider(signed)
    assert releases.latest() is None


def test_a_card_that_claims_gigabytes_is_refused_before_anything_of_the_kind_is_made(
    releases: Releases, recognizers: list[Made]
) -> None:
    card = json.loads(recognizers[0].files["card.json"])
    card["recipe"]["preprocessing"]["size"] = 224
    card["recipe"]["backbone"] = {"name": "scattering", "scales": 1, "angles": 8, "groups": None}
    card["recipe_digest"] = Recipe.model_validate_json(json.dumps(card["recipe"])).digest().hex()
    large = Made.__new__(Made)
    large.files = recognizers[0].files | {"card.json": json.dumps(card).encode()}
    asked: list[str] = []

    def fetch(file: ReleasedFile) -> Iterator[bytes]:
        asked.append(file.name)
        return large.fetch(file)

    with pytest.raises(
        ReleaseRefused, match=r"model.safetensors: found \d+ bytes announced, expected \d{6,}"
    ):
        releases.take(releases.consider(large.signed(1)), fetch)
    assert asked == ["card.json"]


def test_announced_sizes_are_bounded_by_the_card(releases: Releases, recognizers: list[Made]) -> None:
    card, model = recognizers[0].release(1).files
    huge = model.model_copy(update={"size": 1 << 31})
    with pytest.raises(ReleaseRefused, match=r"model\.safetensors: found 2147483648 bytes announced"):
        take(releases, recognizers[0], 1, files=(card, huge))
    with pytest.raises(ReleaseRefused, match=r"card\.json: found 2147483648 bytes announced"):
        take(releases, recognizers[0], 2, files=(card.model_copy(update={"size": 1 << 31}), model))


def test_files_that_the_card_does_not_name(releases: Releases, recognizers: list[Made]) -> None:
    card, model = recognizers[0].release(1).files
    more = ReleasedFile(name="whitening.safetensors", digest=bytes(32), size=5)
    with pytest.raises(ReleaseRefused, match=r"files: found model\.safetensors, whitening.safetensors"):
        take(releases, recognizers[0], 1, files=(card, model, more))
    other = model.model_copy(update={"digest": bytes(32)})
    with pytest.raises(ReleaseRefused, match=r"files: found model\.safetensors, expected"):
        take(releases, recognizers[0], 2, files=(card, other))


def test_a_card_of_another_kind_of_bytes(releases: Releases, recognizers: list[Made]) -> None:
    wrong = Made.__new__(Made)
    wrong.files = recognizers[0].files | {"card.json": b"{}"}
    with pytest.raises(ReleaseRefused, match="card is not sound"):
        take(releases, wrong, 1)


# -- tricks in the folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/etc", "..", "../elsewhere", "", "0" * 64, "missing"])
def test_current_never_leads_out_of_the_folder(
    releases: Releases, recognizers: list[Made], tmp_path: Path, target: str
) -> None:
    take(releases, recognizers[0], 1)
    (tmp_path / "elsewhere").mkdir()
    (releases.path / ("0" * 64)).symlink_to(tmp_path / "elsewhere")
    current = releases.path / "current"
    current.unlink()
    if target:
        current.symlink_to(target)
    else:
        current.mkdir()
    assert releases.folder() is None
    take(releases, recognizers[1], 2)
    assert in_use(releases) == recognizers[1].digest
    assert current.is_symlink()


def test_links_in_place_of_a_recognizer_are_not_followed(
    releases: Releases, recognizers: list[Made], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    releases.path.mkdir()
    (releases.path / recognizers[0].digest).symlink_to(elsewhere)
    (releases.path / ".incoming-link").symlink_to(elsewhere)
    (releases.path / ("f" * 64)).symlink_to(elsewhere)
    for number, made in enumerate(recognizers, 1):
        take(releases, made, number)
    assert in_use(releases) == recognizers[-1].digest
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


def test_a_lock_that_is_a_link_is_not_followed(
    releases: Releases, recognizers: list[Made], tmp_path: Path
) -> None:
    releases.path.mkdir()
    (releases.path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="cannot be written"):
        take(releases, recognizers[0], 1)
    assert not (tmp_path / "victim").exists()


def test_a_damaged_note_of_what_was_seen_stops_everything_until_it_is_mended(
    releases: Releases, recognizers: list[Made]
) -> None:
    take(releases, recognizers[0], 1)
    (releases.path / "latest.hanse").write_bytes(b"damaged")
    for attempt in (
        releases.latest,
        releases.number,
        lambda: releases.consider(recognizers[1].signed(2)),
    ):
        with pytest.raises(ReleaseRefused, match=r"latest\.hanse.*Restore it from a backup"):
            attempt()
    assert in_use(releases) == recognizers[0].digest
    assert releases.in_use() == recognizers[0].release(1), "known by its own folder"


def test_a_note_that_somebody_else_signed_is_not_believed(
    releases: Releases, recognizers: list[Made]
) -> None:
    releases.path.mkdir()
    (releases.path / "latest.hanse").write_bytes(
        wire.encode(recognizers[0].signed(1, key=Ed25519PrivateKey.generate()))
    )
    with pytest.raises(ReleaseRefused, match="operator's signature"):
        releases.number()


def test_two_do_not_fetch_at_once(releases: Releases, recognizers: list[Made]) -> None:
    release = releases.consider(recognizers[0].signed(1))
    other = releases_in(releases.path)

    def fetch(file: ReleasedFile) -> Iterator[bytes]:
        with pytest.raises(ConfigError, match="another hanse-client"):
            other.take(release, recognizers[0].fetch)
        return recognizers[0].fetch(file)

    releases.take(release, fetch)
    assert in_use(other) == recognizers[0].digest


# -- crashes ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """This process is dead."""


class Reaper:
    """Kills at the `at`-th change of the disk: from then on nothing changes any more, whatever clean-up there is."""

    CHANGES = ("open", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync", "chmod", "fchmod")

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.at = at
        self.log: list[str] = []
        for name in self.CHANGES:
            patch.setattr(os, name, self.watched(name, getattr(os, name)))
        patch.setattr(io, "open", self.watched("io.open", io.open))

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.step(name)
            return function(*arguments, **options)

        return call

    def step(self, name: str) -> None:
        self.log.append(name)
        if len(self.log) >= self.at:
            raise Killed(name)


@contextmanager
def reaped(at: int) -> Iterator[Reaper]:
    with pytest.MonkeyPatch.context() as patch:
        reaper = Reaper(patch, at)
        with suppress(Killed):
            yield reaper


def swap(releases: Releases, made: Made, number: int, reaper: Reaper) -> None:
    def fetch(file: ReleasedFile) -> Iterator[bytes]:
        for part in made.fetch(file):
            reaper.step("fetch")
            yield part

    releases.take(releases.consider(made.signed(number)), fetch)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_a_crash_at_any_step_leaves_one_whole_recognizer_and_the_next_attempt_ends_well(
    folder_in_memory: Path, recognizers: list[Made], *, back: bool
) -> None:
    """Forward deletes the oldest, too; back finds what it needs on the disk."""
    target = recognizers[1] if back else recognizers[4]
    steps = 0
    log: list[str] = []
    before = releases_in(folder_in_memory / "before")
    for number, made in enumerate(recognizers[:3], 1):
        take(before, made, number)
    for at in range(1, 1000):
        releases = releases_in(folder_in_memory / str(at))
        shutil.copytree(before.path, releases.path, symlinks=True)
        with reaped(at) as reaper:
            swap(releases, target, 4, reaper)
        steps, log = len(reaper.log), reaper.log
        survivor = releases_in(releases.path)
        assert in_use(survivor) in (recognizers[2].digest, target.digest), log
        assert survivor.in_use() is not None
        waiting = survivor.waiting()
        assert waiting is None or waiting.number == 4
        if steps < at:
            break
        assert survivor.number() in (3, 4)
        take(survivor, target, 4)
        assert in_use(survivor) == target.digest, log
        assert len(names(survivor)) == 3 + 1 + KEPT, log
    assert steps > (20 if back else 40), "there were steps to die at"
    if not back:
        renamed = max(index for index, name in enumerate(log) if name == "rename")
        assert log[:renamed].count("fsync") >= 6, "files and folders reach the disk before their names"


def test_a_full_disk_is_named_and_the_old_one_stays(releases: Releases, recognizers: list[Made]) -> None:
    """The kernel refuses to write more than some bytes into one file, as on a disk that is full."""
    take(releases, recognizers[0], 1)
    release = releases.consider(recognizers[1].signed(2))
    before = names(releases)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written.*Make room"):
            releases.take(release, recognizers[1].fetch)
        with pytest.raises(ConfigError, match=r"latest\.hanse: cannot be written"):
            releases.consider(recognizers[2].signed(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(releases) == before
    assert in_use(releases) == recognizers[0].digest
    releases.take(release, recognizers[1].fetch)
    assert in_use(releases) == recognizers[1].digest


def test_who_reads_meanwhile_never_finds_a_mixture(releases: Releases, recognizers: list[Made]) -> None:
    take(releases, recognizers[0], 1)
    over = threading.Event()
    seen: set[str] = set()
    wrong: list[str] = []

    def read() -> None:
        while not over.is_set():
            folder = releases.folder()
            try:
                if folder is None:
                    raise FileNotFoundError("no recognizer is in use")
                for name in ("card.json", "model.safetensors"):
                    data = hashlib.sha256((folder / name).read_bytes()).hexdigest()
                    if name == "card.json" and data != folder.name:
                        raise ValueError("another card")
                    if name != "card.json" and data not in (folder / "card.json").read_text():
                        raise ValueError("another model")
            except (OSError, ValueError) as error:
                wrong.append(str(error))
                return
            seen.add(folder.name)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(2, 14):
        take(releases, recognizers[number % 3], number)
        # On a busy machine all could be over before a reader comes to look once.
        deadline = time.monotonic() + 30
        while in_use(releases) not in seen and not wrong and time.monotonic() < deadline:
            time.sleep(0.001)
    over.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert len(seen) == 3
