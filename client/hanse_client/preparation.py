"""The photos, ready to train on: looked through, embedded and kept up to date in a thread of its own.

    with Preparation(shop, journal.note) as preparation:
        ready = preparation.ready(plan.recipe)        # None: not yet, ask again
        trainer = ShopTrainer(plan.recipe, taxonomy, ready.examples, OsRandomness())

When a league asks, the answer is here already or it is "later". A change of the photos that was noticed makes it
"later" until they have been looked through again, so a photo that was deleted or changed is left out from the next
block on; a new one is in as soon as it is embedded, which waits while others want the machine.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from hanse_client.catalog import Catalog
from hanse_client.examples import Examples
from hanse_client.resources import OtherWork
from hanse_client.shop import Shop
from hanse_client.watching import Watcher, compare, in_words
from hanse_common.errors import CatalogError, HanseError, PlanRefused
from hanse_common.vision.recipe import Recipe

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
RETRY_SECONDS = 30.0
"""How long to wait after a look that failed: a drive that was unplugged comes back."""

MAX_NEW_RECIPES, NEW_RECIPE_SECONDS = 6, 24 * 3600.0
"""How many recipes that are not cached may be begun in such a time: an operator can't keep a machine busy at will."""

Note = Callable[..., None]
"""Hears of events: kind, text, facts; see `hanse_client.journal`."""


@dataclass(frozen=True, eq=False)
class Ready:
    """The training photos by one recipe, how many photos can't be used, and after how many changes that was so."""

    recipe: Recipe
    examples: Examples
    problems: int
    changes: int


class Preparation:
    """Prepares the last recipe that was asked for, while entered. All that it says goes to `note`."""

    def __init__(self, shop: Shop, note: Note, clock: Callable[[], float] = time.monotonic) -> None:
        self._shop = shop
        self._note = note
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: Recipe | None = None
        self._ready: Ready | None = None
        self._changes = 0
        self._failure: Exception | None = None
        self._catalog: Catalog | None = None
        self._begun: dict[bytes, float] = {}
        config = shop.config
        self._watcher = Watcher(config.photos, ignored=(config.state,))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="preparation", daemon=True)
        self.progress: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def counts(self) -> tuple[int, int] | None:
        """How many photos are ready to train on, and how many can't be used; None before the first are ready."""
        ready = self._ready
        return None if ready is None else (len(ready.examples), ready.problems)

    def ready(self, recipe: Recipe) -> Ready | None:
        """Return what is ready to train on by `recipe`; None while it is being prepared, from now on if need be.

        Raises `PlanRefused` when too many new recipes were asked for of late, and what stood in the way of the last try
        as long as that lasts.
        """
        with self._lock:
            self._changes += self._watcher.changed()
            if self._failure is not None and self._wanted == recipe:
                raise self._failure
            if self._wanted != recipe:
                self._require_not_too_new(recipe)
                self._wanted, self._failure = recipe, None
            ready = self._ready
            return ready if ready and (ready.recipe, ready.changes) == (recipe, self._changes) else None

    def _require_not_too_new(self, recipe: Recipe) -> None:
        """Raise `PlanRefused` when the recipe is new within a day in which there were enough of them."""
        now, name = self._clock(), recipe.digest()
        self._begun = {one: then for one, then in self._begun.items() if now - then < NEW_RECIPE_SECONDS}
        if name not in self._begun and len(self._begun) >= MAX_NEW_RECIPES:
            raise PlanRefused(
                f"recipe: {MAX_NEW_RECIPES} new ones were asked for within a day; the next one has to wait."
            )
        self._begun.setdefault(name, now)

    def _keep(self) -> None:
        with self._watcher:
            while not self._stop.wait(POLL_SECONDS):
                with self._lock:
                    self._changes += self._watcher.changed()
                    recipe, ready, changes = self._wanted, self._ready, self._changes
                    done = ready is not None and (ready.recipe, ready.changes) == (recipe, changes)
                    done = done and self._failure is None  # what failed may have been mended since
                if recipe is None or done:
                    continue
                try:
                    self._prepare(recipe, changes)
                except Exception as error:  # a thread that died would never be noticed
                    self._tell_failure(error)
                    self._stop.wait(RETRY_SECONDS)
                finally:
                    self.progress = None

    def _prepare(self, recipe: Recipe, changes: int) -> None:
        """Look through the photos as they are after `changes`, and make them ready, those embedded before first."""
        known = self._ready is not None and self._ready.recipe == recipe
        try:
            catalog = self._shop.catalog()
        except CatalogError:
            with self._lock:
                self._ready = None  # what was deleted must not be trained on
            raise
        if self._catalog is not None and (found := compare(self._catalog, catalog)):
            self._note("photos", in_words(found))
        self._catalog = catalog
        if known:
            self._publish(recipe, self._shop.embedded(catalog, recipe), changes)
        else:
            self._note("preparing", "Looking through your photos; nothing leaves this machine meanwhile.")

        def interrupted() -> bool:
            """Return whether to leave off: told to stop, another recipe is wanted, or the photos changed again."""
            with self._lock:
                self._changes += self._watcher.changed()
                return self._stop.is_set() or self._wanted != recipe or self._changes != changes

        # A league that waits for a new recipe waits for this machine; new photos can wait for others' work.
        give_way = OtherWork().give_way if known else lambda stop: None
        if not self._shop.embed_ahead(catalog, recipe, interrupted, give_way, self._on_progress):
            return
        self._publish(recipe, self._shop.examples(catalog, recipe, self._on_progress), changes)
        if not known:
            counts = self.counts or (0, 0)
            self._note("photos", f"{counts[0]} photos are ready to train on, {counts[1]} can't be used.")

    def _publish(self, recipe: Recipe, found: tuple[Examples, tuple[str, ...]], changes: int) -> None:
        examples, problems = found
        with self._lock:
            self._ready, self._failure = Ready(recipe, examples, len(problems), changes), None

    def _on_progress(self, done: int, total: int) -> None:
        self.progress = (done, total)

    def _tell_failure(self, error: Exception) -> None:
        """Tell the owner once, not at every attempt."""
        log.debug("The photos could not be prepared.", exc_info=True)
        text: Any = error if isinstance(error, HanseError) else f"{type(error).__name__}: {error}"
        if str(error) != str(self._failure):
            self._note("problem", f"The photos can't be made ready: {text}")
        with self._lock:
            self._failure = error
