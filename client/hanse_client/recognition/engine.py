"""One recognizer, loaded, warm, and never changed: what it sees on photos, many at once.

    engine = Engine.load(folder)
    (seen,) = engine.see([photo.decode(path)])
    dict(zip(engine.classes, seen.probabilities, strict=True)), seen.embedding

The network runs on as many rows as there are photos, not on the fixed number that training pads to
(`extraction.extract`): an answer may depend on its neighbours in a batch in its last bits, within `TOLERANCE`, and one
photo costs one photo's work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import Embedding, load_backbone
from hanse_common.vision.centring import Centre, centred, load_centre
from hanse_common.vision.extraction import batch_rows, extract, network_rows
from hanse_common.vision.recognizer import Recognizer

LARGEST_BATCH = 32
"""The most photos that go through the network at once: more are hardly faster each, and all wait for the last."""

TOLERANCE = 1e-4
"""Bound of the distance between a served embedding and the trained one of the same photo; both have norm 1."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What one photo shows.

    `probabilities`, (K,) float64, are of the engine's `classes`; `embedding`, (d,) float32, has norm 1; `personal`,
    (L,) float64, are of the engine's `personal_labels`, None where no personal head serves.
    """

    probabilities: NDArray[np.float64]
    embedding: NDArray[np.float32]
    personal: NDArray[np.float64] | None


class Engine:
    """A recognizer in memory. Immutable, and safe to use from several threads.

    `digest` names the recognizer, `embedding` what its vectors are comparable by, each 32 bytes. One whose net was
    trained whole has no embedding: `embedding` is empty and `dimension` 0.
    """

    def __init__(self, recognizer: Recognizer, network: Embedding | None, at_most: int) -> None:
        """Take what `load` has loaded."""
        card = recognizer.card
        self.digest = recognizer.digest()
        self.classes = card.taxonomy.classes
        self.personal_labels: tuple[str, ...] = ()
        self._recognizer = recognizer
        self._network = network
        self._at_most = at_most
        self._centre: Centre | None = load_centre(card.recipe, recognizer.centre)
        self.embedding = b"" if network is None else recognizer.embedding_digest()
        (warm,) = self.see([_made_up()])
        self.dimension = len(warm.embedding)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        digest: bytes | None = None,
        backbone_weights: Path | None = None,
        device: str = "cpu",
        memory: int | None = None,
        personal: Path | None = None,
    ) -> Self:
        """Return the engine of the recognizer in `folder`, which is the one of that `digest` if there is one.

        `memory` bounds what a batch may take, in bytes. `personal` is the folder of the shop's personal head.

        Raises `RecognizerError` when something is missing, damaged or does not belong together, or when not even one
        photo fits in `memory`.
        """
        recognizer = Recognizer.load(folder, digest=digest, device=device, backbone_weights=backbone_weights)
        recipe = recognizer.card.recipe
        network = None
        if recipe.backbone is not None:
            network = load_backbone(
                recipe, device=device, weights=backbone_weights, whitening=recognizer.whitening
            )
        limited = memory is not None or not device.startswith("cpu")
        rows = network_rows(network, recipe.views, device, memory) if limited else batch_rows(recipe.views)
        return cls(recognizer, network, min(LARGEST_BATCH, rows))

    def see(self, images: Sequence[Image.Image]) -> list[Seen]:
        """Return what each of the decoded `images` shows."""
        recognizer = self._recognizer
        recipe = recognizer.card.recipe
        raw = extract(self._network, images, recipe.views, recognizer.device, at_most=self._at_most)
        features = centred(raw, recipe, self._centre)
        probabilities = recognizer.probabilities(features)
        if self._network is None:
            embeddings = np.empty((len(features), 0), np.float32)
        else:
            embeddings = recognizer.embeddings(features)
            # What shows nothing at all, such as one colour, has no direction of its own, and gets one.
            embeddings[~embeddings.any(axis=1), 0] = 1.0
        return [Seen(*row, None) for row in zip(probabilities, embeddings, strict=True)]

    def require_embedding(self) -> bytes:
        """Return `embedding`. Raises `RecognizerError` where there is none."""
        if not self.embedding:
            raise RecognizerError(
                "This recognizer has no embedding: its recipe has no backbone. Photos are compared by recognizers "
                "with one."
            )
        return self.embedding


def _made_up() -> Image.Image:
    """Return a photo of nothing, to run a network for the first time, which takes longest."""
    return Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3))
