"""A trained recognizer: what it is, where it came from, and what it says about photos.

    recognizer = Recognizer.create(recipe, taxonomy, vector, created=now, epsilon=2.7, delta=1e-5)
    recognizer.save(folder)
    probabilities = Recognizer.load(folder).predict([photo.decode(path, limits)])    # (1, classes)

On disk it is a folder of two files, and the whitening's and the centre's where the recipe has them.
`model.safetensors` holds the trained parameters by name. `card.json` holds the recipe, the taxonomy, figures and
lineage, and names the other files and the recipe by their SHA-256. The SHA-256 of the card itself is the recognizer's
digest, which a successor's card names as its parent: who knows it from a source that can be trusted knows every bit
of all files.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import AwareDatetime, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import nn

from hanse_common.errors import RecognizerError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.protocol import unsaid
from hanse_common.vision.backbones import Embedding, load_backbone, load_whitening
from hanse_common.vision.centring import Centre, centred, load_centre
from hanse_common.vision.extraction import extract
from hanse_common.vision.lineage import MAX_ANCESTORS, Ancestor, Inheritance, inherited
from hanse_common.vision.model import build, load_vector, to_vector
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import HexDigest, Value

MODEL_FILE = "model.safetensors"
CARD_FILE = "card.json"
WHITENING_FILE = "whitening.safetensors"
CENTRE_FILE = "centre.safetensors"

MAX_CARD_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 16
"""Bound of what a model's file holds beside its numbers."""

_BATCH = 64

MetricName = Annotated[str, Field(min_length=1, max_length=64)]


class Card(Value):
    """What is known about a recognizer.

    `epsilon` and `delta` are the guarantee of the merchant who spent most, in this training and in those of all
    ancestors; None where nothing was trained under privacy. `plan_digest` is the training plan's; `parent_digest` the
    digest of the recognizer that training began from, and `lineage` its ancestors, that one first. A card with a
    lineage has format 2; one of format 1 is read, written and named by the same bytes as ever.
    """

    format_version: Literal[1, 2] = 1
    recipe: Recipe
    recipe_digest: HexDigest
    taxonomy: Taxonomy
    model_digest: HexDigest
    metrics: Annotated[dict[MetricName, float | None], Field(max_length=64)] = Field(default_factory=dict)
    epsilon: Annotated[float, Field(ge=0.0)] | None = None
    delta: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    plan_digest: HexDigest | None = None
    parent_digest: HexDigest | None = None
    lineage: Annotated[tuple[Ancestor, ...], Field(max_length=MAX_ANCESTORS)] = ()
    created: AwareDatetime

    @model_validator(mode="after")
    def _check_lineage(self) -> Self:
        if (self.format_version == 2) != bool(self.lineage):
            raise ValueError(
                f"format_version is {self.format_version} with {len(self.lineage)} ancestors; expected 2 with a "
                "lineage, 1 without"
            )
        digests = [ancestor.digest for ancestor in self.lineage]
        if digests and digests[0] != self.parent_digest:
            raise ValueError(f"lineage begins with {digests[0]}, parent_digest is {self.parent_digest}")
        if len(set(digests)) != len(digests):
            raise ValueError("lineage: expected ancestors that differ")
        return self

    def to_bytes(self) -> bytes:
        """Return the card as the JSON that its file holds."""
        without = unsaid(self) | ({} if self.lineage else {"lineage": True})
        return self.model_dump_json(indent=2, exclude=without).encode() + b"\n"

    def digest(self) -> bytes:
        """Return the SHA-256 of the card's bytes, 32 bytes."""
        return hashlib.sha256(self.to_bytes()).digest()

    def descend(self, *, epsilon: float | None, delta: float | None) -> Inheritance:
        """Return the figures and lineage of a successor whose own training, from here on, costs `epsilon` and `delta`.

        The cost of a centre belongs to `epsilon` and `delta` unless this card's recipe names the same centre: then it
        is paid already. None is a training without a guarantee, and so is what this card does not state.

        Raises `ValueError` for a cost below zero or not a number.
        """
        ancestors = self.lineage
        if not ancestors and self.parent_digest is not None:  # as format 1 may name it
            ancestors = (Ancestor(digest=self.parent_digest),)
        return inherited(
            self.digest().hex(),
            self.plan_digest,
            ancestors,
            parent_cost=None if self.epsilon is None or self.delta is None else (self.epsilon, self.delta),
            own_cost=None if epsilon is None or delta is None else (epsilon, delta),
        )


@dataclass(frozen=True, eq=False)
class Recognizer:
    """A card and the trained parameters, `vector` (d,) float32.

    The backbone is loaded on `device` at the first prediction; `backbone_weights`, `whitening` and
    `centre` are local files, if any.
    """

    card: Card
    vector: NDArray[np.float32]
    device: torch.device | str = "cpu"
    backbone_weights: Path | None = None
    whitening: Path | None = None
    centre: Path | None = None

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        taxonomy: Taxonomy,
        vector: NDArray[np.float32],
        *,
        created: AwareDatetime,
        metrics: Mapping[str, float | None] | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        plan_digest: bytes | None = None,
        parent_digest: bytes | None = None,
        lineage: Sequence[Ancestor] = (),
        device: torch.device | str = "cpu",
        backbone_weights: Path | None = None,
        whitening: Path | None = None,
        centre: Path | None = None,
    ) -> Self:
        """Return a recognizer with the card that belongs to it.

        For one whose training began from another, `epsilon`, `delta`, `parent_digest` and `lineage` are those that the
        other's `Card.descend` gives.

        Raises `RecognizerError` when `vector` is not finite or not of the recipe's dimension, and pydantic's
        `ValidationError` for figures that no card may hold.
        """
        vector = vector.copy()
        vector.flags.writeable = False
        card = Card(
            format_version=2 if lineage else 1,
            recipe=recipe,
            recipe_digest=recipe.digest().hex(),
            taxonomy=taxonomy,
            model_digest=hashlib.sha256(_serialise(_module(recipe, taxonomy, vector))).hexdigest(),
            metrics=dict(metrics or {}),
            epsilon=epsilon,
            delta=delta,
            plan_digest=plan_digest.hex() if plan_digest else None,
            parent_digest=parent_digest.hex() if parent_digest else None,
            lineage=tuple(lineage),
            created=created,
        )
        return cls(card, vector, device, backbone_weights, whitening, centre)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        digest: bytes | None = None,
        device: torch.device | str = "cpu",
        backbone_weights: Path | None = None,
    ) -> Self:
        """Return the recognizer in `folder`, whose content is not trusted.

        Without `digest` a card's own claims (its figures, names and dates) are taken as they are; with it,
        the recognizer is the one of that digest. Raises `RecognizerError` when a file is missing, too large
        or malformed, or does not match its digest.
        """
        card = read_card(folder / CARD_FILE, digest)
        dimension = card.recipe.dimension(len(card.taxonomy.classes))
        path = folder / MODEL_FILE
        data = _read(path, 4 * dimension + MAX_HEADER_BYTES)
        found = hashlib.sha256(data).hexdigest()
        if found != card.model_digest:
            raise RecognizerError(
                f"{path}: found SHA-256 {found}, {CARD_FILE} names {card.model_digest}. "
                "The files do not belong together; get both again from where they came."
            )
        if len(data) < 4 * dimension:  # else a card of some bytes would have a model of gigabytes built
            raise RecognizerError(
                f"{path}: the parameters do not fit the recipe: found {len(data)} bytes, expected {4 * dimension} or "
                "more."
            )
        module = build(card.recipe, len(card.taxonomy.classes))
        try:
            module.load_state_dict(safetensors.torch.load(data), strict=True)
        except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RecognizerError(f"{path}: the parameters do not fit the recipe: {reason}") from None
        vector = to_vector(module)
        # Refuses numbers that are not finite.
        load_vector(module, vector)
        load_whitening(card.recipe, folder / WHITENING_FILE)
        load_centre(card.recipe, folder / CENTRE_FILE)
        return cls(card, vector, device, backbone_weights, folder / WHITENING_FILE, folder / CENTRE_FILE)

    def save(self, folder: Path) -> None:
        """Write the files into `folder`, which is made when missing.

        Each replaces its predecessor whole, the card last; after a crash in between, `load` refuses the
        folder. Raises `RecognizerError` when the vector is not the one the card was made for, or the disk
        fails.
        """
        data = _serialise(self._model)
        if hashlib.sha256(data).hexdigest() != self.card.model_digest:
            raise RecognizerError("The card belongs to another vector; make it with Recognizer.create.")
        whitened = load_whitening(self.card.recipe, self.whitening) is not None
        middle = load_centre(self.card.recipe, self.centre)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if whitened and self.whitening is not None:
                write_atomically(folder / WHITENING_FILE, self.whitening.read_bytes(), PUBLIC)
            if middle is not None:
                write_atomically(folder / CENTRE_FILE, middle.to_bytes(), PUBLIC)
            write_atomically(folder / MODEL_FILE, data, PUBLIC)
            write_atomically(folder / CARD_FILE, self.card.to_bytes(), PUBLIC)
        except OSError as error:
            raise RecognizerError(f"{folder}: cannot save the recognizer ({error.strerror}).") from None

    def digest(self) -> bytes:
        """Return the SHA-256 of the card, 32 bytes, which names everything else."""
        return self.card.digest()

    def predict(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return each class's probability, (n, classes) float64, rows summing to 1, for decoded `images`.

        Raises `RecognizerError` when the backbone cannot be loaded.
        """
        batches = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
        parts = [self.probabilities(self.features(batch)) for batch in batches]
        return np.concatenate([np.empty((0, len(self.card.taxonomy.classes))), *parts])

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return what the trained model sees of decoded `images`, (n, F) float32; without a backbone (n, c, s, s).

        Raises `RecognizerError` when the backbone cannot be loaded.
        """
        recipe = self.card.recipe
        return centred(extract(self._backbone, images, recipe.views, self.device), recipe, self._centre)

    def probabilities(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return each class's probability, (n, classes) float64, for the `features` of n photos."""
        with torch.inference_mode():
            logits = self._model(torch.from_numpy(features).to(self.device))
            probabilities: NDArray[np.float64] = torch.softmax(logits.double(), dim=1).cpu().numpy()
        return probabilities

    def embeddings(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what photos are compared by, (n, d) float32 with rows of norm 1, from their `features`, (n, F).

        A row of zeros stays zero. Raises `RecognizerError` where the recipe has no backbone.
        """
        self._require_embedding()
        norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
        return (features / np.where(norms > 0, norms, 1.0)).astype(np.float32)

    def embedding_digest(self) -> bytes:
        """Return a digest of all that `embeddings` depends on, 32 bytes: vectors are comparable where it is the same.

        Raises `RecognizerError` where the recipe has no backbone.
        """
        recipe = self._require_embedding()
        centre = bytes.fromhex(recipe.centre) if recipe.centre else b""
        return hashlib.sha256(recipe.embedding_digest() + centre).digest()

    def _require_embedding(self) -> Recipe:
        recipe = self.card.recipe
        if recipe.backbone is None:
            raise RecognizerError(
                "This recognizer has no embedding: its recipe has no backbone. Photos are compared by recognizers "
                "with one."
            )
        return recipe

    @cached_property
    def _backbone(self) -> Embedding | None:
        if self.card.recipe.backbone is None:
            return None
        return load_backbone(
            self.card.recipe, device=self.device, weights=self.backbone_weights, whitening=self.whitening
        )

    @cached_property
    def _centre(self) -> Centre | None:
        return load_centre(self.card.recipe, self.centre)

    @cached_property
    def _model(self) -> nn.Module:
        return _module(self.card.recipe, self.card.taxonomy, self.vector).to(self.device).eval()


def read_card(path: Path, digest: bytes | None) -> Card:
    """Return the card in the file `path`, untrusted, which is the one of that `digest` if there is one.

    Raises `RecognizerError` as `Recognizer.load` does.
    """
    data = _read(path, MAX_CARD_BYTES)
    if digest is not None and hashlib.sha256(data).digest() != digest:
        raise RecognizerError(f"{path}: found another card than the one with SHA-256 {digest.hex()}.")
    try:
        card = Card.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"]) or "the card"
        raise RecognizerError(
            f"{path}: {field}: {fault['msg']} ({error.error_count()} faults in all)."
        ) from None
    found = card.recipe.digest().hex()
    if found != card.recipe_digest:
        raise RecognizerError(f"{path}: the recipe's digest is {found}, the card says {card.recipe_digest}.")
    return card


def _module(recipe: Recipe, taxonomy: Taxonomy, vector: NDArray[np.float32]) -> nn.Module:
    module = build(recipe, len(taxonomy.classes))
    load_vector(module, vector)
    return module


def _serialise(module: nn.Module) -> bytes:
    return safetensors.torch.save({name: value.cpu() for name, value in module.state_dict().items()})


def _read(path: Path, max_bytes: int) -> bytes:
    return read_bounded(path, max_bytes, "a file of a recognizer's folder", RecognizerError)
