"""The owner's own labels: durable, removable, and one word a photo."""

import hashlib
import io
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from PIL import Image

from hanse_client.personal.corrections import LIMITS, MAX_LABEL, Corrections, normalised
from hanse_common.errors import CatalogError, PhotoTooLarge, PhotoUnreadable


def jpeg(seed: int, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "corrections.sqlite"


@pytest.fixture
def corrections(path: Path) -> Iterator[Corrections]:
    with Corrections(path) as opened:
        yield opened


def test_what_was_said_is_there_after_reopening(path: Path, corrections: Corrections) -> None:
    shirt = corrections.add(jpeg(1), label="  Herrenhemd,\n kariert ")
    shoe = corrections.add(jpeg(2), sku="S-1")
    with Corrections(path) as again:
        assert again.list() == [shirt, shoe]
        assert again.photo(shirt.photo) == jpeg(1)
        assert again.count() == 2
    assert (shirt.label, shirt.sku) == ("Herrenhemd, kariert", None)
    assert (shoe.label, shoe.sku) == (None, "S-1")
    assert shirt.photo == hashlib.sha256(jpeg(1)).digest()
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_last_word_on_a_photo_holds_and_undo_takes_it_back(corrections: Corrections) -> None:
    first = corrections.add(jpeg(1), label="shirt")
    last = corrections.add(jpeg(1), label="blouse")
    assert corrections.list() == [last]
    assert corrections.of(first.photo) == last
    assert corrections.labels() == {"blouse": 1}
    assert corrections.undo() == last
    assert corrections.list() == [first]
    assert corrections.undo() == first
    assert corrections.undo() is None
    assert (corrections.count(), corrections.photo(first.photo)) == (0, None)


def test_the_same_said_twice_is_said_once(corrections: Corrections) -> None:
    assert corrections.add(jpeg(1), label="shirt") == corrections.add(jpeg(1), label="shirt")
    assert corrections.undo() is not None
    assert corrections.undo() is None


def test_labels_that_differ_in_case_or_unicode_form_alone_are_one(corrections: Corrections) -> None:
    corrections.add(jpeg(1), label="Bl\N{LATIN SMALL LETTER U WITH DIAERESIS}te")
    corrections.add(jpeg(2), label="blu\N{COMBINING DIAERESIS}TE")
    corrections.add(jpeg(3), label="Hemd")
    assert corrections.labels() == {"Bl\N{LATIN SMALL LETTER U WITH DIAERESIS}te": 2, "Hemd": 1}


def test_pages_follow_one_another(corrections: Corrections) -> None:
    made = [corrections.add(jpeg(seed), label="shirt") for seed in range(5)]
    first = corrections.list(limit=2)
    assert first == made[:2]
    assert corrections.list(after=first[-1].number) == made[2:]


@pytest.mark.parametrize(
    "label", ["", " \n", "a" * (MAX_LABEL + 1), "a\x00b", "a\N{RIGHT-TO-LEFT OVERRIDE}b"]
)
def test_a_label_that_is_none_is_refused(corrections: Corrections, label: str) -> None:
    with pytest.raises(CatalogError, match="label"):
        corrections.add(jpeg(1), label=label)
    assert corrections.count() == 0


def test_a_correction_says_one_thing(corrections: Corrections) -> None:
    for said in ({}, {"label": "shirt", "sku": "S-1"}):
        with pytest.raises(CatalogError, match="either"):
            corrections.add(jpeg(1), **said)
    with pytest.raises(CatalogError, match="SKU"):
        corrections.add(jpeg(1), sku="s" * 65)


def test_only_a_jpeg_within_bounds_is_kept(corrections: Corrections) -> None:
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    with pytest.raises(PhotoUnreadable):
        corrections.add(png.getvalue(), label="shirt")
    with pytest.raises(PhotoTooLarge):
        corrections.add(bytes(LIMITS.max_bytes + 1), label="shirt")


def test_no_more_is_kept_than_the_bound(corrections: Corrections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanse_client.personal.corrections.MAX_CORRECTIONS", 2)
    for seed in range(2):
        corrections.add(jpeg(seed), label="shirt")
    with pytest.raises(CatalogError, match="remove some"):
        corrections.add(jpeg(2), label="shirt")


def test_what_is_removed_is_in_no_file_any_more(path: Path, corrections: Corrections) -> None:
    gone = corrections.add(jpeg(1, 64), label="a word never said again")
    kept = corrections.add(jpeg(2, 64), label="shirt")
    assert any(jpeg(1, 64)[-900:] in each.read_bytes() for each in path.parent.iterdir())
    assert corrections.remove(gone.photo)
    assert not corrections.remove(gone.photo)
    for each in path.parent.iterdir():
        data = each.read_bytes()
        assert jpeg(1, 64)[-900:] not in data
        assert b"a word never said again" not in data
    assert corrections.photo(kept.photo) == jpeg(2, 64)
    assert corrections.clear() == 1
    assert corrections.list() == []
    assert not any(jpeg(2, 64)[-900:] in each.read_bytes() for each in path.parent.iterdir())


VICTIM = """
import pathlib, sys
from hanse_client.personal.corrections import Corrections
photos = sorted(pathlib.Path(sys.argv[2]).iterdir())
with Corrections(pathlib.Path(sys.argv[1])) as corrections:
    while True:
        for number, path in enumerate(photos):
            made = corrections.add(path.read_bytes(), label=f"label {number}")
            print("+", made.photo.hex(), flush=True)
        for path in photos[::2]:
            digest = corrections.list()[0].photo
            print("?", digest.hex(), flush=True)
            corrections.remove(digest)
            print("-", digest.hex(), flush=True)
"""


@pytest.mark.parametrize("answers", [1, 6, 13])
def test_killed_at_any_time_nothing_that_was_acknowledged_is_lost(tmp_path: Path, answers: int) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(6):
        (photos / f"{seed}.jpg").write_bytes(jpeg(seed))
    path = tmp_path / "corrections.sqlite"
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(path), str(photos)], stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    said = [victim.stdout.readline() for _ in range(answers)]
    os.kill(victim.pid, signal.SIGKILL)
    said += victim.stdout.readlines()
    victim.wait()
    known: set[str] = set()
    open_question = ""
    for sign, digest in (line.split() for line in said if line.endswith("\n")):
        open_question = digest if sign == "?" else ""
        if sign == "+":
            known.add(digest)
        elif sign == "-":
            known.discard(digest)
    with Corrections(path) as corrections:
        found = {correction.photo.hex() for correction in corrections.list()}
        # At most one more was on its way, in or out.
        assert len(found ^ known) <= 1
        assert known - found <= {open_question}
        assert all(corrections.photo(bytes.fromhex(digest)) for digest in found)
        assert corrections.count() == len(found)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_threads_and_another_process_may_write_at_once(path: Path, corrections: Corrections) -> None:
    with Corrections(path) as other:
        threads = [
            threading.Thread(target=each.add, args=(jpeg(seed),), kwargs={"label": "shirt"})
            for seed, each in enumerate([corrections, other] * 4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert corrections.labels() == {"shirt": 8}


def test_damage_and_other_programs_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "corrections.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(CatalogError, match=r"corrections\.sqlite: cannot be used"):
        Corrections(path)
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE other (x)")
    with pytest.raises(CatalogError, match="another program"):
        Corrections(path)


def test_a_photo_that_the_disk_altered_is_not_handed_out(path: Path, corrections: Corrections) -> None:
    made = corrections.add(jpeg(1), label="shirt")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE photo SET jpeg = ?", (jpeg(2),))
    with pytest.raises(CatalogError, match="not the one"):
        corrections.photo(made.photo)


class Model(RuleBasedStateMachine):
    """Against a list of all that was said."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.real = Corrections(Path(self.folder.name) / "corrections.sqlite")
        self.said: list[tuple[bytes, str]] = []

    def last(self) -> dict[bytes, str]:
        return dict(self.said)

    @rule(seed=st.integers(0, 3), label=st.sampled_from(["a", "b", "B"]))
    def add(self, seed: int, label: str) -> None:
        made = self.real.add(jpeg(seed), label=label)
        spelt = next((known for _, known in self.said if known.lower() == label.lower()), label)
        assert made.label == spelt
        if self.last().get(made.photo) != spelt:
            self.said.append((made.photo, spelt))

    @precondition(lambda self: self.said)
    @rule()
    def undo(self) -> None:
        undone = self.real.undo()
        assert undone is not None
        assert (undone.photo, undone.label) == self.said.pop()

    @rule(seed=st.integers(0, 3))
    def remove(self, seed: int) -> None:
        digest = hashlib.sha256(jpeg(seed)).digest()
        assert self.real.remove(digest) == (digest in self.last())
        self.said = [each for each in self.said if each[0] != digest]

    @invariant()
    def agrees(self) -> None:
        assert {each.photo: each.label for each in self.real.list()} == self.last()
        assert self.real.count() == len(self.last())

    def teardown(self) -> None:
        self.real.close()
        self.folder.cleanup()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_a_product_is_one_however_its_sku_is_spelt(corrections: Corrections) -> None:
    composed, apart = "Caf\u00e9", "Cafe\u0301"
    assert corrections.add(jpeg(1), sku=apart).sku == composed
    assert corrections.add(jpeg(1), sku=composed) == corrections.of(corrections.list()[0].photo)
    assert corrections.forget(apart) == 1
    for sku in ("a\u200db", " a", "a\n", "e\u0301" * 65):
        with pytest.raises(CatalogError, match="A correction's SKU"):
            corrections.add(jpeg(1), sku=sku)


def test_what_no_product_can_be_called_is_forgotten_of_nothing(corrections: Corrections) -> None:
    for sku in ("\udcff", "", "a\nb", "x" * 9999):
        assert corrections.forget(sku) == 0


def test_a_label_has_the_joiners_that_its_script_needs(corrections: Corrections) -> None:
    word = "\u06a9\u0641\u0634\u200c\u0647\u0627"
    assert corrections.add(jpeg(1), label=word).label == word
    with pytest.raises(CatalogError, match="printable"):
        corrections.add(jpeg(1), label=f"{word}\u202e")
    with pytest.raises(CatalogError, match="A correction's label"):  # at once, though it is long
        corrections.add(jpeg(1), label="e" + "\u0301\u0323" * 1_000_000)


def test_normalising_twice_changes_nothing() -> None:
    text = " u\N{COMBINING DIAERESIS}  b\t"
    assert normalised(text) == "\N{LATIN SMALL LETTER U WITH DIAERESIS} b" == normalised(normalised(text))
