"""What a merchant should know of a catalog before it trains: balance, duplicates, unusable photos, suspect labels.

    found = check(shop, catalog)
    print(found.few, [group.across_classes for group in found.alike])
    print(json.dumps(found.summary()))

Findings are shown and change nothing. Were duplicates merged, or suspects left out, one photo more could change the
fate of another, and the differential privacy of a training, which compares catalogs that differ by one photo, would no
longer cover what happens (see `hanse_client.catalog`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hanse_client import duplicates
from hanse_client.catalog import Catalog, Problem, Record
from hanse_client.embeddings import EmbeddingCache
from hanse_client.examples import resolve_device
from hanse_client.releases import recognizer_folder
from hanse_client.shop import Shop
from hanse_client.suspects import MIN_AGREEMENT, agreement, confident_disagreements, predict
from hanse_common.errors import PhotoError
from hanse_common.vision.recognizer import Recognizer

FEW = 20
"""Photos below which a class is called small: of ten it keeps about one to test with, which tells nothing."""

IMBALANCE = 10
"""How many times as many photos the largest class may have as the smallest before it is said."""

Tell = Callable[[str, int, int], None]
"""Hears what is done, how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class ClassCount:
    """Photos of one class, on both sides of the holdout."""

    name: str
    train: int
    holdout: int

    @property
    def total(self) -> int:
        """All photos of the class."""
        return self.train + self.holdout


@dataclass(frozen=True, slots=True)
class Group:
    """Photos that are the same file, or that look the same: two or more."""

    records: tuple[Record, ...]

    @property
    def across_classes(self) -> bool:
        """Whether they have different labels, of which one at most is right."""
        return len({record.label for record in self.records}) > 1

    @property
    def across_border(self) -> bool:
        """Whether one is trained on while another is kept to test with."""
        return len({record.holdout for record in self.records}) > 1


@dataclass(frozen=True, slots=True)
class Suspect:
    """A photo that the recognizer takes for another class; `given` and `likelier` are its probabilities of the two."""

    record: Record
    instead: str
    given: float
    likelier: float


@dataclass(frozen=True, slots=True)
class Doubts:
    """The recognizer's `agreement` with the labels, in [0, 1], and its suspects, most doubtful first.

    There are none when it agrees too little to judge.
    """

    agreement: float
    suspects: tuple[Suspect, ...]

    @property
    def can_judge(self) -> bool:
        """Whether the recognizer knows these photos well enough for its doubts to mean something."""
        return self.agreement > MIN_AGREEMENT


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was found. `copies` have the same content; `alike` look the same and differ in content.

    `problems` are the catalog's and those that only decoding shows. `doubts` is None without a recognizer.
    """

    catalog: Catalog
    classes: tuple[ClassCount, ...]
    problems: tuple[Problem, ...]
    copies: tuple[Group, ...]
    alike: tuple[Group, ...]
    doubts: Doubts | None

    @property
    def empty(self) -> tuple[ClassCount, ...]:
        """The league's classes of which the catalog has no photo."""
        return tuple(each for each in self.classes if not each.total)

    @property
    def few(self) -> tuple[ClassCount, ...]:
        """The classes with fewer than `FEW` photos, but some."""
        return tuple(each for each in self.classes if 0 < each.total < FEW)

    @property
    def uneven(self) -> tuple[ClassCount, ClassCount] | None:
        """The largest and the smallest class that has photos, when they differ by more than `IMBALANCE` times."""
        some = [each for each in self.classes if each.total]
        if not some:
            return None
        large, small = (choose(some, key=lambda each: each.total) for choose in (max, min))
        return (large, small) if large.total > IMBALANCE * small.total else None

    def summary(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        names = [each.name for each in self.classes]

        def groups(found: Sequence[Group]) -> list[dict[str, Any]]:
            return [
                {
                    "photos": [str(record.path) for record in group.records],
                    "classes": [names[record.label] for record in group.records],
                    "across_classes": group.across_classes,
                    "across_border": group.across_border,
                }
                for group in found
            ]

        return {
            "classes": [
                {"name": each.name, "train": each.train, "holdout": each.holdout} for each in self.classes
            ],
            "unmapped": dict(self.catalog.unmapped),
            "problems": [{"photo": str(each.path), "reason": each.reason} for each in self.problems],
            "copies": groups(self.copies),
            "alike": groups(self.alike),
            "agreement": self.doubts and self.doubts.agreement,
            "suspects": self.doubts
            and [
                {
                    "photo": str(each.record.path),
                    "class": names[each.record.label],
                    "probability": each.given,
                    "instead": each.instead,
                    "probability_instead": each.likelier,
                }
                for each in self.doubts.suspects
            ],
        }


def check(shop: Shop, catalog: Catalog, tell: Tell = lambda what, done, total: None) -> Findings:
    """Return what is to be known of `catalog`; every photo is decoded, nothing leaves this machine.

    Raises `RecognizerError` when there is a recognizer that is damaged, `CatalogError` when the cache of embeddings
    cannot be used.
    """
    recognizer = load_recognizer(shop)
    alike, damaged = _alike(catalog.records, tell)
    problems = sorted((*catalog.problems, *damaged), key=lambda each: (str(each.path), each.reason))
    digests = [record.digest for record in catalog.records]
    return Findings(
        catalog,
        class_counts(catalog, shop.config.league.taxonomy.classes),
        tuple(problems),
        tuple(_group(catalog.records, indices) for indices in duplicates.exact_copies(digests)),
        alike,
        None if recognizer is None else _doubts(shop, catalog.records, recognizer, tell),
    )


def class_counts(catalog: Catalog, names: Sequence[str]) -> tuple[ClassCount, ...]:
    """Return the counts of all classes `names`, in their order."""
    train, holdout = (
        np.bincount([record.label for record in side], minlength=len(names))
        for side in (catalog.train, catalog.holdout)
    )
    return tuple(ClassCount(name, int(train[i]), int(holdout[i])) for i, name in enumerate(names))


def load_recognizer(shop: Shop) -> Recognizer | None:
    """Return the recognizer of the configuration or the released one, None when there is none, or no such folder yet.

    Raises `RecognizerError` for one that is damaged.
    """
    folder = recognizer_folder(shop.config)
    if folder is None or not folder.exists():
        return None
    return Recognizer.load(folder, backbone_weights=shop.config.backbone_weights)


def _alike(records: Sequence[Record], tell: Tell) -> tuple[tuple[Group, ...], list[Problem]]:
    """Return the groups of photos that look the same, and the photos that cannot be decoded.

    Photos of one content count once in the comparison; a group then has all of them.
    """
    by_digest: dict[bytes, list[int]] = {}
    for index, record in enumerate(records):
        by_digest.setdefault(record.digest, []).append(index)
    places: list[list[int]] = []
    thumbnails = np.empty((len(by_digest), duplicates.EDGE, duplicates.EDGE, 3), dtype=np.uint8)
    problems: list[Problem] = []
    for done, indices in enumerate(by_digest.values(), start=1):
        try:
            thumbnails[len(places)] = duplicates.thumbnail(records[indices[0]].open())
        except PhotoError:
            problems += [problem for index in indices for problem in _problems(records[index])]
        else:
            places.append(indices)
        tell("looking at photos", done, len(by_digest))
    found = duplicates.look_alikes(
        thumbnails[: len(places)], lambda done, total: tell("comparing photos", done, total)
    )
    groups = [sorted(index for place in group for index in places[place]) for group in found]
    return tuple(_group(records, group) for group in groups), problems


def _problems(record: Record) -> Iterator[Problem]:
    try:
        record.open()
    except PhotoError as error:
        yield Problem(record.path, str(error))


def _group(records: Sequence[Record], indices: Sequence[int]) -> Group:
    return Group(tuple(records[index] for index in indices))


def _doubts(shop: Shop, records: Sequence[Record], recognizer: Recognizer, tell: Tell) -> Doubts:
    """Return the recognizer's doubts about the photos whose class it knows, by name."""
    theirs = recognizer.card.taxonomy.classes
    ours = shop.config.league.taxonomy.classes
    known = [record for record in records if ours[record.label] in theirs]
    with EmbeddingCache(shop.config.state / "embeddings.sqlite") as cache:
        predicted = predict(
            recognizer,
            known,
            cache,
            device=resolve_device(shop.config.device),
            progress=lambda done, total: tell("asking the recognizer", done, total),
        )
    seen = [known[index] for index in predicted.kept]
    if not seen:
        return Doubts(0.0, ())
    labels = np.array([theirs.index(ours[record.label]) for record in seen], dtype=np.int64)
    share = agreement(predicted.probabilities, labels)
    if share <= MIN_AGREEMENT:
        return Doubts(share, ())
    return Doubts(
        share,
        tuple(
            Suspect(seen[each.index], theirs[each.instead], each.given, each.likelier)
            for each in confident_disagreements(predicted.probabilities, labels)
        ),
    )


def relative(path: Path, folder: Path) -> str:
    """Return `path` as it is seen from `folder`, or whole when it lies elsewhere."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
