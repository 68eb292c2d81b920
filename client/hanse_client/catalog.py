"""A merchant's photos: where they lie, their class, and on which side of the holdout each one is.

    catalog = Catalog.load(Path("photos"), LabelMap(taxonomy), holdout_key=key, holdout_fraction=0.1)
    print(len(catalog.train), len(catalog.holdout), catalog.unmapped)

The source is a folder with a sub-folder for each category, or a CSV file with the columns `path` and `label`,
optionally `sku` and `title`, whose paths count from the file's own folder and may not lead out of it.

**A record's fate depends on that record alone.** Its side is HMAC-SHA256(holdout key, content digest), with
nothing drawn, counted or stratified, and duplicates are not removed. Differential privacy compares a catalog
with the same catalog less one photo: a split or a clean-up that looked at other records would move those too,
and the two catalogs would differ by more than the one photo that the accounting covers.

Loading reads each photo, unless an index knows it, and checks its header. A photo that cannot be used becomes a
`Problem`, never an error; pixels are decoded where they are needed, which may find more damage.
"""

import csv
import hashlib
import hmac
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

from hanse_client.photo_index import PhotoIndex
from hanse_common.errors import CatalogError, PhotoError, PhotoUnreadable
from hanse_common.vision import photo
from hanse_common.vision.photo import PhotoLimits

MAX_ROWS = 1_000_000
"""Bound of the rows of a CSV file."""

MAX_FIELD = 4096
"""Bound of one field of a CSV file, in characters; a line may have 16 times as many bytes."""

_CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"}


def is_clutter(name: str) -> bool:
    """Return whether a file or folder called `name` is the system's own, hidden or a by-product."""
    return name.startswith(".") or name.casefold() in _CLUTTER


class Labels(Protocol):
    """What gives photos' labels their numbers: `LabelMap`, or another with the same two questions."""

    def encode(self, label: str) -> int | None:
        """Return the number of a shop's label, None for one without."""
        ...

    def left_out(self, label: str) -> bool:
        """Return whether `label` has no number on purpose."""
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """One usable photo: its file, its class index, and the SHA-256 of its file's bytes."""

    path: Path
    label: int
    sku: str | None
    title: str | None
    digest: bytes
    holdout: bool
    limits: PhotoLimits = field(repr=False)

    def open(self) -> Image.Image:
        """Return the photo in mode RGB; raises `PhotoError`, also when its content is no longer `digest`."""
        data = photo.read(self.path, self.limits)
        if photo.content_digest(data) != self.digest:
            raise PhotoUnreadable(
                f"{photo.shown(self.path)}: found other content than when the catalog was loaded, "
                "expected the same. Load the catalog again."
            )
        return photo.decode(data, self.limits, self.path)


@dataclass(frozen=True, slots=True)
class Problem:
    """One photo that cannot be used, and why, in a line for the merchant's eyes."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    label: str
    sku: str | None = None
    title: str | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """Usable records in a fixed order, photos with problems, and labels that have no class, with their count.

    Labels that the map leaves out on purpose appear nowhere.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    unmapped: Mapping[str, int]

    @property
    def train(self) -> tuple[Record, ...]:
        """The records to train on."""
        return tuple(record for record in self.records if not record.holdout)

    @property
    def holdout(self) -> tuple[Record, ...]:
        """The records kept for evaluation, never trained on."""
        return tuple(record for record in self.records if record.holdout)

    @classmethod
    def load(
        cls,
        source: Path,
        labels: Labels,
        *,
        holdout_key: bytes,
        holdout_fraction: float,
        limits: PhotoLimits = photo.LIMITS,
        progress: Callable[[int, int], None] | None = None,
        index: PhotoIndex | None = None,
    ) -> "Catalog":
        """Return the catalog in a folder or CSV file; `progress` is called with photos done and in all.

        Files that have not changed since they were noted in `index` are not read again; it then knows this catalog's
        files and no others.

        `holdout_key` is the merchant's own secret of at least 16 bytes; changing it moves photos between the
        sides. Raises `CatalogError` when the source is missing, a CSV file is malformed, or no photo can be
        used.
        """
        entries, problems = _entries(source)
        unmapped = Counter(e.label for e in entries if labels.encode(e.label) is None)
        mapped = [(e, code) for e in entries if (code := labels.encode(e.label)) is not None]
        records = []
        for done, (entry, code) in enumerate(mapped, start=1):
            try:
                digest = (index.digest if index else _digest)(entry.path, limits)
            except PhotoError as error:
                problems.append(Problem(entry.path, str(error)))
            else:
                side = in_holdout(holdout_key, digest, holdout_fraction)
                records.append(Record(entry.path, code, entry.sku, entry.title, digest, side, limits))
            if progress is not None:
                progress(done, len(mapped))
        if index is not None:
            index.keep(entry.path for entry, _ in mapped)
        unmapped = Counter({label: n for label, n in sorted(unmapped.items()) if not labels.left_out(label)})
        if not records:
            raise CatalogError(f"{source}: found no usable photo. {_why(problems, unmapped)}")
        problems.sort(key=lambda problem: (str(problem.path), problem.reason))
        return cls(tuple(records), tuple(problems), unmapped)


def in_holdout(key: bytes, digest: bytes, fraction: float) -> bool:
    """Return whether the photo of content `digest` is held out: HMAC-SHA256 / 2²⁵⁶ < `fraction`.

    Raises ValueError for a key under 16 bytes and a fraction outside [0, 1).
    """
    if len(key) < 16:
        raise ValueError(f"Expected a holdout key of at least 16 bytes, found {len(key)}.")
    if not 0 <= fraction < 1:
        raise ValueError(f"Expected a holdout fraction in [0, 1), found {fraction}.")
    drawn = int.from_bytes(hmac.digest(key, digest, hashlib.sha256)[:8])
    return drawn < int(fraction * 2**64)


def _digest(path: Path, limits: PhotoLimits) -> bytes:
    data = photo.read(path, limits)
    photo.check(data, limits, path)
    return photo.content_digest(data)


def _entries(source: Path) -> tuple[list[_Entry], list[Problem]]:
    if source.is_dir():
        return _from_folder(source)
    if source.is_file():
        return _from_csv(source)
    raise CatalogError(
        f"{source}: found neither a folder nor a CSV file, expected the folder of photos. Check the path."
    )


def _from_folder(source: Path) -> tuple[list[_Entry], list[Problem]]:
    entries, problems = [], []
    for child in _visible(source):
        if child.is_dir():
            entries += [_Entry(path, child.name) for path in _files(child)]
        else:
            problems.append(
                Problem(child, f"{child}: lies in no category, expected it in a category's folder.")
            )
    return entries, problems


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in and below `folder`; links to folders are not followed, so that no loop can be."""
    for child in _visible(folder):
        if child.is_dir() and not child.is_symlink():
            yield from _files(child)
        elif not child.is_dir():
            yield child


def _visible(folder: Path) -> list[Path]:
    try:
        names = sorted(child.name for child in folder.iterdir())
    except OSError as error:
        raise CatalogError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from None
    return [folder / name for name in names if not is_clutter(name)]


def _from_csv(source: Path) -> tuple[list[_Entry], list[Problem]]:
    entries, problems = [], []
    folder = os.path.realpath(source.parent)
    lines: dict[str, int] = {}  # a photo listed twice would pay twice for each charge
    for line, row in _rows(source):
        path = source.parent / row["path"]
        if "\0" in row["path"]:
            raise CatalogError(f"{source}:{line}: path holds a NUL character, expected a path.")
        real = os.path.realpath(path)
        if not Path(real).is_relative_to(folder):
            reason = (
                f"{source}:{line}: path {row['path']!r} leads out of the file's folder, expected one inside."
            )
            problems.append(Problem(path, reason))
        elif (first := lines.setdefault(real, line)) != line:
            reason = f"{source}:{line}: found {row['path']!r} again, expected it once (line {first})."
            problems.append(Problem(path, reason))
        else:
            entries.append(_Entry(path, row["label"], row.get("sku") or None, row.get("title") or None))
    entries.sort(key=lambda e: (str(e.path), e.label, e.sku or "", e.title or ""))
    return entries, problems


def _rows(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and fields by lower-case column name of each row that is not blank."""
    try:
        opened = source.open("rb")
    except OSError as error:
        raise CatalogError(f"{source}: cannot be read ({error.strerror}). Check its permissions.") from None
    with opened as file:
        reader = csv.reader(_lines(source, file), strict=True)
        try:
            columns = [name.strip().casefold() for name in next(reader, [])]
            for needed in ("path", "label"):
                if columns.count(needed) != 1:
                    raise CatalogError(
                        f"{source}:1: found the columns {', '.join(columns)[:99]!r}, expected {needed!r} "
                        "once. Name the columns path, label and, if you like, sku, title; use commas."
                    )
            for count, row in enumerate(filter(None, reader)):
                if count >= MAX_ROWS:
                    raise CatalogError(
                        f"{source}:{reader.line_num}: more than {MAX_ROWS} rows. Split the file."
                    )
                yield reader.line_num, _fields(f"{source}:{reader.line_num}", columns, row)
        except csv.Error as error:
            raise CatalogError(
                f"{source}:{reader.line_num}: not CSV ({error}). Mind quotes and commas."
            ) from None


def _fields(place: str, columns: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(columns):
        raise CatalogError(
            f"{place}: found {len(row)} fields, expected {len(columns)}. Mind quotes and commas."
        )
    if (longest := max(map(len, row))) > MAX_FIELD:
        raise CatalogError(f"{place}: found a field of {longest} characters, expected at most {MAX_FIELD}.")
    fields = {column: field.strip() for column, field in zip(columns, row, strict=True)}
    for needed in ("path", "label"):
        if not fields[needed]:
            raise CatalogError(f"{place}: {needed} is empty, expected a value. Fill it in or delete the row.")
    return fields


def _lines(source: Path, file: BinaryIO) -> Iterator[str]:
    number, bound = 0, 16 * MAX_FIELD
    while line := file.readline(bound + 1):
        number += 1
        if len(line) > bound:
            raise CatalogError(f"{source}:{number}: longer than {bound} bytes, expected a row of a CSV file.")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise CatalogError(f"{source}:{number}: not UTF-8. Save the file as CSV UTF-8.") from None


def _why(problems: list[Problem], unmapped: Mapping[str, int]) -> str:
    if unmapped:
        named = ", ".join(f"{label!r} ({count})" for label, count in list(unmapped.items())[:10])
        return f"No class for the labels {named}: map them in the label file."
    if problems:
        return f"{len(problems)} with problems, the first: {problems[0].reason}"
    return "Expected a folder for each category with photos in it."
