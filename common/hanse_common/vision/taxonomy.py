"""The league's classes, and how a shop's own labels become them.

    taxonomy = Taxonomy(classes=("Shirt", "Sneaker"))
    labels = LabelMap(taxonomy, {"Herrenhemden": "Shirt", "Sale": None})
    assert labels.encode("herrenhemden") == labels.encode("SHIRT") == 0
    assert labels.encode("Sale") is None and labels.left_out("Sale")

The file of a label map is YAML, a line for each label: `Herrenhemden: Shirt`, or `Sale: null` to leave photos
out on purpose. A label that is a class already needs no line. Labels are compared without regard to case,
spaces around them, and Unicode form (macOS writes folder names decomposed, NFD).
"""

import difflib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, RootModel, ValidationInfo

from hanse_common import config
from hanse_common.errors import ConfigError
from hanse_common.wire import Value


def _printable(name: str) -> str:
    if not name.isprintable() or name != name.strip():
        raise ValueError("expected printable characters without spaces around them")
    return name


def _distinct(classes: tuple[str, ...]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for name in classes:
        if folded(name) in first:
            raise ValueError(f"expected classes that differ, found {first[folded(name)]!r} and {name!r}")
        first[folded(name)] = name
    return classes


ClassName = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]


class Taxonomy(Value):
    """The league's classes in the order of the recognizer's outputs: public, part of the signed plan."""

    classes: Annotated[tuple[ClassName, ...], Field(min_length=2, max_length=1000), AfterValidator(_distinct)]

    def index(self, name: str) -> int:
        """Return the index of the class called exactly `name`; raises ValueError if there is none."""
        if name not in self.classes:
            raise ValueError(f"Found {name!r}, expected one of the {len(self.classes)} classes.")
        return self.classes.index(name)


@dataclass(frozen=True)
class LabelMap:
    """A shop's labels as the league's classes; `mapping` is shop label → league class, None to leave out.

    Raises `ConfigError` for a class that the league does not have, and for two labels that differ in case
    only and mean different classes.
    """

    taxonomy: Taxonomy
    mapping: Mapping[str, str | None] = field(default_factory=dict)
    _codes: dict[str, int | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        codes: dict[str, int | None] = {}
        for label, name in self.mapping.items():
            if name is not None and name not in self.taxonomy.classes:
                raise ConfigError(f"label {label!r}: {_no_such_class(name, self.taxonomy)}")
            code = None if name is None else self.taxonomy.index(name)
            if codes.setdefault(folded(label), code) != code:
                raise ConfigError(
                    f"label {label!r}: found twice, in other case, for another class, expected once"
                )
        identity = {folded(name): code for code, name in enumerate(self.taxonomy.classes)}
        object.__setattr__(self, "_codes", identity | codes)

    @classmethod
    def load(cls, path: Path, taxonomy: Taxonomy) -> "LabelMap":
        """Return the label map in the YAML file at `path`; raises `ConfigError` that lists every fault."""
        mapping = config.load(_LabelFile, path, taxonomy=taxonomy).root
        try:
            return cls(taxonomy, mapping)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def encode(self, label: str) -> int | None:
        """Return the league's class index of a shop's label, None for one without a class."""
        return self._codes.get(folded(label))

    def left_out(self, label: str) -> bool:
        """Return whether the map names `label` and says that it has no class."""
        return self._codes.get(folded(label), -1) is None


def _league_class(name: str, info: ValidationInfo) -> str:
    taxonomy: Taxonomy = info.context["taxonomy"]  # type: ignore[index]
    if name not in taxonomy.classes:
        raise ValueError(_no_such_class(name, taxonomy).partition(", ")[2])
    return name


class _LabelFile(RootModel[dict[str, Annotated[str, AfterValidator(_league_class)] | None]]):
    model_config = ConfigDict(strict=True, frozen=True)


def _no_such_class(name: str, taxonomy: Taxonomy) -> str:
    near = difflib.get_close_matches(name, taxonomy.classes, n=1)
    shown = ", ".join(taxonomy.classes[:20]) + (", …" if len(taxonomy.classes) > 20 else "")
    return f"found {name!r}, expected a class of the league" + (f", {near[0]}?" if near else f": {shown}")


def folded(label: str) -> str:
    """Return what equal labels share: canonical caseless matching, Unicode 15.0, section 3.13, D145."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", label.strip()).casefold())
