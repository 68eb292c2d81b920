"""One merchant's shop, from its configuration: catalog, embeddings, ledger, and the participant over them.

    shop = Shop(config)
    catalog = shop.catalog()
    examples, problems = shop.examples(catalog, recipe)
    participant = shop.participant(recipe, examples, print)

Nothing here talks to a network.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.catalog import Catalog, Labels, Record, in_holdout
from hanse_client.config import ClientConfig
from hanse_client.embeddings import EmbeddingCache, Progress, embed, embed_ahead
from hanse_client.examples import Examples, resolve_device
from hanse_client.keys import load_identity
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant, PinnedLeague
from hanse_client.photo_index import PhotoIndex
from hanse_client.queries import QueryLog
from hanse_client.training import ShopTrainer
from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_common.plan import Plan
from hanse_common.randomness import OsRandomness, Randomness
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import LabelMap

HOLDOUT_KEY_BYTES = 32


class Shop:
    """What the configuration describes. Folders are made when missing; nothing is read before it is asked for."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config

    def labels(self) -> LabelMap:
        """Return the map from the shop's labels to the league's classes. Raises `ConfigError`."""
        taxonomy = self.config.league.taxonomy
        if self.config.labels is None:
            return LabelMap(taxonomy)
        return LabelMap.load(self.config.labels, taxonomy)

    def catalog(self, progress: Progress | None = None, labels: Labels | None = None) -> Catalog:
        """Return the catalog; files that have not changed are not read again. Raises `CatalogError`, `ConfigError`.

        Photos have the numbers that `labels` gives theirs, by default the league's classes.
        """
        key = self._holdout_key()
        with PhotoIndex(self.config.state / "photos.sqlite") as index:
            return Catalog.load(
                self.config.photos,
                self.labels() if labels is None else labels,
                holdout_key=key,
                holdout_fraction=self.config.holdout_fraction,
                progress=progress,
                index=index,
            )

    def holds_out(self, digest: bytes) -> bool:
        """Return whether the photo of content `digest` is held out, wherever it comes from. Raises `ConfigError`."""
        return in_holdout(self._holdout_key(), digest, self.config.holdout_fraction)

    def examples(
        self, catalog: Catalog, recipe: Recipe, progress: Progress = lambda done, total: None
    ) -> tuple[Examples, tuple[str, ...]]:
        """Return the training examples by `recipe`, and a line for each photo that could not be decoded.

        All photos are embedded, the holdout's too, which are the examples' `holdout`; embeddings of photos that are
        gone are forgotten.
        """
        with self._cache() as cache:
            found = self._examples(catalog.records, recipe, cache, progress)
            if recipe.backbone is not None:
                cache.evict(recipe.embedding_digest(), (record.digest for record in catalog.records))
        return found

    def embedded(self, catalog: Catalog, recipe: Recipe) -> tuple[Examples, tuple[str, ...]]:
        """Return as `examples` does, of those photos alone that were embedded before."""
        with self._cache() as cache:
            records = catalog.records
            if recipe.backbone is not None:
                known = cache.get(
                    recipe.embedding_digest(),
                    (record.digest for record in records),
                    recipe.feature_dimension,
                )
                records = tuple(record for record in records if record.digest in known)
            return self._examples(records, recipe, cache, lambda done, total: None)

    def embed_ahead(
        self,
        catalog: Catalog,
        recipe: Recipe,
        stop: Callable[[], bool],
        give_way: Callable[[Callable[[], bool]], None],
        progress: Progress,
    ) -> bool:
        """Embed what is new, in idle time; return whether all of it was. See `embeddings.embed_ahead`."""
        with self._cache() as cache:
            return embed_ahead(
                catalog.records,
                recipe,
                cache,
                stop,
                device=self._device,
                weights=self.config.backbone_weights,
                whitening=self.config.whitening,
                memory=self._memory,
                give_way=give_way,
                progress=progress,
            )

    def _cache(self) -> EmbeddingCache:
        return EmbeddingCache(self.config.state / "embeddings.sqlite")

    def _examples(
        self, records: Sequence[Record], recipe: Recipe, cache: EmbeddingCache, progress: Progress
    ) -> tuple[Examples, tuple[str, ...]]:
        embedded = embed(
            records,
            recipe,
            cache,
            device=self._device,
            weights=self.config.backbone_weights,
            whitening=self.config.whitening,
            centre=self.config.centre,
            memory=self._memory,
            progress=progress,
        )
        kept = [records[index] for index in embedded.kept]
        labels = np.array([record.label for record in kept], dtype=np.int64)
        held_out = np.array([record.holdout for record in kept], dtype=np.bool_)
        training, holdout = (
            Examples.of(
                embedded.features[side], labels[side], self._device, [kept[index].sku for index in side]
            )
            for side in (np.flatnonzero(~held_out), np.flatnonzero(held_out))
        )
        return replace(training, holdout=holdout), embedded.problems

    @property
    def _device(self) -> str:
        return resolve_device(self.config.device)

    @property
    def _memory(self) -> int | None:
        return self.config.resources.batch_bytes(self._device)

    def ledger(self) -> Ledger:
        """Return the ledger, made when missing. Raises `LedgerError`."""
        return Ledger(self.config.ledger_path, self.config.policy.budget)

    def participant(
        self,
        recipe: Recipe,
        examples: Examples,
        tell: Callable[[str], None],
        randomness: Randomness | None = None,
        on_upload: Callable[[Plan, int], None] = lambda plan, round_: None,
        identity: Ed25519PrivateKey | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> Participant:
        """Return the participant of rounds over `examples`; randomness is the operating system's by default.

        Without `identity` it is read from its file. `wait` waits some seconds for an upload's slot.
        """
        league = self.config.league
        taxonomy = league.taxonomy
        return Participant(
            league=PinnedLeague(bytes.fromhex(league.operator_key), bytes.fromhex(league.charter), taxonomy),
            policy=self.config.policy,
            identity=identity or load_identity(self.config),
            ledger=self.ledger(),
            markers=Markers(self.config.markers_path),
            trainer=ShopTrainer(
                recipe,
                taxonomy,
                examples,
                randomness or OsRandomness(),
                self._memory,
                QueryLog.of(self.config),
            ),
            tell=tell,
            on_upload=on_upload,
            wait=wait,
        )

    def _holdout_key(self) -> bytes:
        """Return the secret that divides train from holdout, drawn once: a new one would move photos."""
        path = self.config.state / "holdout.key"
        try:
            self.config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                write_atomically(path, os.urandom(HOLDOUT_KEY_BYTES))
            with path.open("rb") as file:
                key = file.read(HOLDOUT_KEY_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be made or read ({error.strerror}); the folder named under state must be "
                "writable."
            ) from None
        if len(key) != HOLDOUT_KEY_BYTES:
            raise ConfigError(
                f"{path}: found {len(key)} bytes, expected {HOLDOUT_KEY_BYTES}; restore it from a backup. "
                "Without it photos change sides between training and holdout."
            )
        return key
