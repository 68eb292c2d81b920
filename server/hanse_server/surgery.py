"""Going on from a released recognizer when classes or the recipe change: the vector that training starts from.

    graft = transplant(recognizer, recipe, taxonomy, renamed={"Blouse": "Shirt"}, photos=public_images)
    graft.vector                     # (recipe.dimension(classes),) float32, for a plan of this recipe and taxonomy
    graft.origins["Shirt"]           # "Blouse": the class it continues; None for a new one
    graft.fidelity                   # how alike old and new head judge public photos; None where rows were copied

While the features stay what they are, the rows of classes that stay are copied bit for bit. Where the backbone, its
projection or whitening, the centre or the model's form changes, the new head first learns to say of public photos what
the old recognizer says of them (`hanse_server.distillation`).

A new class begins with the mean of the other rows, its bias `MARGIN` lower. Softmax does not tell a head from one that
has the same row added to all of its rows, so zeros mean nothing by themselves; the mean row is what they mean in a head
whose rows sum to zero. A new class's logit is then below the mean of the others: it wins no photo, and beside K others
it has at most 1/K times the probability that they have together (exp is convex: exp of a mean is at most the mean of
exp), and much less where the recognizer is sure. Yet a photo of the new class pulls with all its force at once: the
gradient on its own logit is p − 1, about −1.

No merchant's photo is here. What comes out is computed from a recognizer that was released and from public photos: it
costs no ε of its own (post-processing: Dwork, Roth 2014, proposition 2.1). The parent's ε stays in the successor's
account, see `hanse_common.vision.recognizer.Card.descend`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hanse_common.errors import RecognizerError
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy, folded
from hanse_server.distillation import MIN_PHOTOS, Fidelity, distil

MARGIN = 0.1
"""How far a new class's logit starts below the mean of the others: enough for rounding and ties, little to catch up."""

_OF_TRAINING = {"dropout", "l1", "l2", "initialisation"}
"""What a model says of how it is trained; the rest is its form."""


@dataclass(frozen=True, eq=False)
class Graft:
    """What a training starts from: `vector`, shape (d',), float32, and the digest of the recognizer it came from.

    `origins` tells for each class of the new taxonomy, in its order, which of the old classes it continues; None is a
    new one. `removed` are the old classes that nothing continues. `fidelity` is about all old classes.
    """

    vector: NDArray[np.float32]
    origins: Mapping[str, str | None]
    removed: tuple[str, ...]
    fidelity: Fidelity | None
    parent_digest: bytes


def transplant(
    recognizer: Recognizer,
    recipe: Recipe,
    taxonomy: Taxonomy,
    *,
    renamed: Mapping[str, str] | None = None,
    photos: Iterable[Image.Image] | None = None,
    whitening: Path | None = None,
    centre: Path | None = None,
    backbone_weights: Path | None = None,
) -> Graft:
    """Return where a training of `recipe` and `taxonomy` starts that goes on from `recognizer`.

    `renamed` maps old classes to what they are called now; the others go on under their own names, compared without
    regard to case as labels are. `photos` are public, decoded, and taken one by one, where the features change;
    otherwise they are not looked at. `whitening`, `centre` and `backbone_weights` are the new recipe's files, where it
    has them. The same input gives the same bits on the same machine.

    Raises `RecognizerError` for names that do not fit together, when no class stays, when the features change and there
    are no photos, or too few, or there is no backbone, and for numbers that are not finite.
    """
    old = recognizer.card
    sources = _sources(old.taxonomy, taxonomy, renamed or {})
    changes = _changes(old.recipe, recipe)
    if not changes:
        vector, fidelity = recognizer.vector, None
    elif photos is None:
        raise RecognizerError(
            f"The recognizer's rows do not fit the new recipe's features ({', '.join(changes)} changed), and found no "
            f"public photos to carry them over by. Name a folder of at least {MIN_PHOTOS}, or keep the recipe."
        )
    else:
        vector, fidelity = distil(
            recognizer,
            recipe,
            photos,
            whitening=whitening,
            centre=centre,
            backbone_weights=backbone_weights,
        )
    names = old.taxonomy.classes
    return Graft(
        vector=_with_rows(vector, recipe, len(names), sources),
        origins={
            name: None if source is None else names[source]
            for name, source in zip(taxonomy.classes, sources, strict=True)
        },
        removed=tuple(name for index, name in enumerate(names) if index not in sources),
        fidelity=fidelity,
        parent_digest=recognizer.digest(),
    )


def _sources(old: Taxonomy, new: Taxonomy, renamed: Mapping[str, str]) -> list[int | None]:
    """Return for each new class the index of the old one that it continues, None for a new one."""
    becomes = {folded(name): name for name in old.classes}
    for before, after in renamed.items():
        if before not in old.classes:
            raise RecognizerError(
                f"renamed: found {before!r}, expected a class of the recognizer: {', '.join(old.classes)}."
            )
        if after not in new.classes:
            raise RecognizerError(
                f"renamed: {before!r} becomes {after!r}, expected a class of the new taxonomy: "
                f"{', '.join(new.classes)}."
            )
        becomes[folded(before)] = after
    found: dict[str, int] = {}
    for index, name in enumerate(old.classes):
        target = folded(becomes[folded(name)])
        if target in found:
            raise RecognizerError(
                f"renamed: {old.classes[found[target]]!r} and {name!r} would both be "
                f"{becomes[folded(name)]!r}, expected one class to continue; leave one out or rename it, too."
            )
        found[target] = index
    sources = [found.get(folded(name)) for name in new.classes]
    if all(source is None for source in sources):
        raise RecognizerError(
            f"None of the recognizer's classes stays ({', '.join(old.classes)}): nothing would be left of it. "
            "Name those that were renamed, or start without a parent."
        )
    return sources


def _changes(old: Recipe, new: Recipe) -> list[str]:
    """Return which fields of the recipe make the last layer see other inputs, or have another form."""
    changed = [
        name for name in ("preprocessing", "backbone", "centre") if getattr(old, name) != getattr(new, name)
    ]
    forms = [recipe.model.model_dump(exclude=_OF_TRAINING) for recipe in (old, new)]
    return changed if forms[0] == forms[1] else [*changed, "model"]


def _with_rows(
    vector: NDArray[np.float32], recipe: Recipe, classes: int, sources: Sequence[int | None]
) -> NDArray[np.float32]:
    """Return `vector`, parameters for `classes` classes, with the rows of `sources`, and new ones for None."""
    if vector.shape != (recipe.dimension(classes),) or not np.isfinite(vector).all():
        raise RecognizerError(
            f"The vector to go on from: found shape {vector.shape}, expected {recipe.dimension(classes)} numbers, all "
            "finite; the recognizer is damaged, get it again."
        )
    # The last layer comes last: all weights, row by row, then the biases.
    before = recipe.dimension(0)
    weights = vector[before : len(vector) - classes].reshape(classes, -1)
    rows = np.column_stack([weights, vector[len(vector) - classes :]])
    kept = [source for source in sources if source is not None]
    new = rows[kept].mean(axis=0, dtype=np.float64)
    new[-1] -= MARGIN
    table = np.stack([new.astype(np.float32) if source is None else rows[source] for source in sources])
    return np.concatenate([vector[:before], table[:, :-1].ravel(), table[:, -1]])
