"""One recognizer, loaded, warm, and never changed: what it sees on photos, many at once.

    engine = Engine.load(folder)
    (seen,) = engine.see([engine.prepare(photo.decode(path))])
    dict(zip(engine.classes, seen.probabilities, strict=True)), seen.embedding

The network runs on as many rows as there are photos, not on the fixed number that training pads to
(`extraction.extract`), and on a CPU with its convolutions fused (`hanse_common.vision.fused`). So one photo costs one
photo's work, and an answer may differ from the trained network's, and by its neighbours in a batch, in its last bits:
embeddings by less than `TOLERANCE`, which is tried out when an engine is loaded. A network whose fused form is further
off serves as it is.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hanse_client.personal.head import PersonalHead
from hanse_client.personal.metric import PersonalMetric
from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import Embedding, load_backbone
from hanse_common.vision.centring import centred, load_centre
from hanse_common.vision.extraction import batch_rows, full_precision, network_rows
from hanse_common.vision.fused import fuse, fusible
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recognizer import Recognizer

log = logging.getLogger(__name__)

CPU_BATCH = 16
"""The most photos that go through the network at once on a CPU: more take no less time each, and wait for the last."""

GPU_BATCH = 64

TOLERANCE = 1e-4
"""Bound of the distance between a served embedding and the trained network's of the same photo, both of norm 1."""

Prepared = tuple[Tensor, ...]
"""A photo as the network reads it, (1, c, s, s) float32 for each of the recipe's views."""


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
    """A recognizer in memory, with the shop's personal head and metric where they serve. Immutable, and thread-safe.

    `digest` names the recognizer, `embedding` what its vectors are comparable by, each 32 bytes. One whose net was
    trained whole has no embedding: `embedding` is empty and `dimension` 0. `largest` is the most photos at once.
    """

    def __init__(
        self, recognizer: Recognizer, network: Embedding | None, largest: int, personal: Path | None
    ) -> None:
        """Take what `load` has loaded."""
        card = recognizer.card
        self._recognizer = recognizer
        self._recipe = card.recipe
        self._network = network
        self._centre = load_centre(card.recipe, recognizer.centre)
        self._head = PersonalHead.load(personal, card.recipe, card.taxonomy) if personal else None
        self._metric: PersonalMetric | None = None
        self.largest = largest
        self.digest = recognizer.digest()
        self.classes = card.taxonomy.classes
        self.personal_labels = self._head.labels if self._head else ()
        self.embedding = b"" if network is None else recognizer.embedding_digest()
        self.dimension = len(self.see([self.prepare(_made_up())])[0].embedding)  # which warms up, too
        if personal and network is not None:
            self._metric = PersonalMetric.load(personal, self.embedding, self.dimension)
        if self._metric is not None:
            self.embedding = self._metric.embedding

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

        `memory` bounds what a batch may take, in bytes. `personal` is the folder of what the shop learned itself.

        Raises `RecognizerError` when something is missing, damaged or does not belong together, or when not even one
        photo fits in `memory`.
        """
        recognizer = Recognizer.load(folder, digest=digest, device=device, backbone_weights=backbone_weights)
        views = recognizer.card.recipe.views
        network = _network(recognizer)
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            full_precision()
        limited = on_gpu or memory is not None
        rows = network_rows(network, views, device, memory) if limited else batch_rows(views)
        if network is not None and not on_gpu and fusible():
            network = _fused(network, recognizer)
        return cls(recognizer, network, min(GPU_BATCH if on_gpu else CPU_BATCH, rows), personal)

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the decoded `image` as `see` wants it: small, whatever its size was. On the caller's own thread."""
        return tuple(preprocess([image], view) for view in self._recipe.views)

    def see(self, photos: Sequence[Prepared]) -> list[Seen]:
        """Return what each of the photos that `prepare` returned shows."""
        found: list[Seen] = []
        for start in range(0, len(photos), self.largest):
            found += self._see(photos[start : start + self.largest])
        return found

    def _see(self, photos: Sequence[Prepared]) -> list[Seen]:
        recognizer = self._recognizer
        features = self._features(photos)
        probabilities = recognizer.probabilities(features)
        embeddings = np.empty((len(photos), 0), np.float32)
        if self._network is not None:
            embeddings = recognizer.embeddings(features)
            if self._metric is not None:
                embeddings = self._metric.apply(embeddings)
            # What shows nothing at all, such as one colour, has no direction of its own, and gets one.
            embeddings[~embeddings.any(axis=1), 0] = 1.0
        personal = (
            [None] * len(photos) if self._head is None else self._head.probabilities(features, probabilities)
        )
        return [Seen(*row) for row in zip(probabilities, embeddings, personal, strict=True)]

    def _features(self, photos: Sequence[Prepared]) -> NDArray[np.float32]:
        """Return what the head reads, (n, F) float32, or (n, c, s, s) where the net was trained whole."""
        inputs = [torch.cat(rows).to(self._recognizer.device) for rows in zip(*photos, strict=True)]
        with torch.inference_mode():
            raw = inputs[0] if self._network is None else self._network(*inputs)
        return centred(raw.float().cpu().numpy(), self._recipe, self._centre)

    def require_embedding(self) -> bytes:
        """Return `embedding`. Raises `RecognizerError` where there is none."""
        if not self.embedding:
            raise RecognizerError(
                "This recognizer has no embedding: its recipe has no backbone. Photos are compared by recognizers "
                "with one."
            )
        return self.embedding


def _network(recognizer: Recognizer) -> Embedding | None:
    recipe = recognizer.card.recipe
    if recipe.backbone is None:
        return None
    return load_backbone(
        recipe,
        device=recognizer.device,
        weights=recognizer.backbone_weights,
        whitening=recognizer.whitening,
    )


def _fused(network: Embedding, recognizer: Recognizer) -> Embedding:
    """Return `network` with its convolutions fused, unless it has none, or that changes what it sees."""
    inputs = [preprocess([_made_up()], view) for view in recognizer.card.recipe.views]
    with torch.inference_mode():
        wanted = network(*inputs)
        if not fuse(network):
            return network
        try:
            distance = float((network(*inputs) - wanted).norm() / wanted.norm().clamp(min=1e-12))
        except RuntimeError as error:
            log.warning("Convolutions can't be fused here (%s); photos take longer.", error)
        else:
            if distance < TOLERANCE:
                return network
            log.warning("Fused convolutions are %.1e off here; photos take longer without them.", distance)
    plain = _network(recognizer)
    return network if plain is None else plain


def _made_up() -> Image.Image:
    """Return a photo of nothing: a network's first run takes longest."""
    noise = np.random.PCG64(0).random_raw(64 * 64 * 3).astype(np.uint8)
    return Image.fromarray(noise.reshape(64, 64, 3))
