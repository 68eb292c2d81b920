"""What `hanse-sim search` searches for: photos of a league, of a gallery, and of those who ask.

    for situation, league, trial in grocery_trials(study, cache, Path("GroceryStoreDataset/dataset")):
        trial.gallery, trial.queries, trial.query_products      # (m, F), (n, F), (n,)

*Fashion-MNIST*: each article is a product, photographed by invented shops (`search_styles`). The gallery is one shop's,
queries of the situation "across shops" are in the style of another, a new one in each repetition; the league's shops
are others again. Whoever asks shows articles that nobody learned from. The shop learned from other articles, in its own
style and in the asking one.

*Groceries* (`grocery`): fine classes are products. In each repetition some coarse classes are strangers, others are new
to league and shop, and so is a third of the fine classes of the rest. The league learned from training photos of what
is left. Queries are test photos, from other stores, of the new products, and they look for these among all products but
strangers. The gallery has three phone photos of each product, or, "across shops", its picture from a web shop.

*Corrections*: of some photos in the style of those that ask, of products that are in the gallery and are not
asked for, the shop's owner has said what they show. The shop learns from them, and judges by them.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hanse_client.embeddings import EmbeddingCache, Photo, embed
from hanse_common.errors import DatasetUnavailable
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import EfficientNetLite0, Preprocessing, Scattering
from hanse_simulations.console import bar
from hanse_simulations.datasets import fashion_mnist
from hanse_simulations.grocery import Grocery, GroceryPhoto
from hanse_simulations.search_styles import OtherView, ShopStyle, StyledPhoto
from hanse_simulations.seeded import seed_for

LEAGUE_SHOPS = 10
"""Styles among the league's photos of Fashion-MNIST."""

STRANGERS, NEW = 0.2, 0.25
"""Parts of the coarse classes of groceries that are not in the gallery, and that are new."""

REFERENCES = 3
"""Phone photos of each grocery in the gallery."""

FASHION = Recipe(preprocessing=Preprocessing(size=96), backbone=EfficientNetLite0())
GROCERY = Recipe(preprocessing=Preprocessing(size=160), backbone=EfficientNetLite0())

Situation = Literal["same shop", "across shops"]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

SITUATIONS: tuple[Situation, Situation] = ("same shop", "across shops")


@dataclass(frozen=True)
class Study:
    """How much is measured. The centre costs `centre_epsilon`, the projection `projection_epsilon` beside it.

    Of Fashion-MNIST, `league` photos teach the league, `products` are in the gallery, and each of `repetitions` asks
    for `queries` of these and for as many others, after a shop learned from `own` products of two photos. Groceries are
    divided anew in each of `grocery_repetitions`; all photos are used. The shop has `corrections` of either.
    """

    fashion: Recipe = FASHION
    grocery: Recipe = GROCERY
    league: int = 8000
    products: int = 10_000
    queries: int = 300
    own: int = 300
    corrections: int = 30
    repetitions: int = 5
    grocery_repetitions: int = 6
    dimensions: int = 256
    centre_epsilon: float = 0.5
    projection_epsilon: float = 2.5
    seed: int = 1

    @classmethod
    def quick(cls) -> "Study":
        """Return a study of seconds: another backbone and few photos, so other figures."""
        small = Recipe(preprocessing=Preprocessing(size=8, channels=1), backbone=Scattering(groups=None))
        return cls(
            fashion=small, grocery=small, league=100, products=60, queries=15, own=10, corrections=8,
            repetitions=2, grocery_repetitions=2, dimensions=16,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class League:
    """Features of a league's photos and of `OtherView`s of them, both (n, F)."""

    photos: Floats
    views: Floats


@dataclass(frozen=True, eq=False)
class Trial:
    """One search: features (…, F) of gallery, queries, strangers, the shop's own other products and its corrections.

    `gallery_products`, `query_products`, `own_products` and `corrected_products` number the products that they show;
    `strangers` show none of the gallery's. Queries show none of the own products, nor of those of corrections.
    """

    gallery: Floats
    gallery_products: Numbers
    queries: Floats
    query_products: Numbers
    strangers: Floats
    own: Floats
    own_products: Numbers
    corrections: Floats
    corrected_products: Numbers


def fashion_trials(study: Study, cache: Path, folder: Path) -> Iterator[tuple[Situation, League, Trial]]:
    """Yield searches among Fashion-MNIST's articles, which are in `folder` or fetched to it.

    Raises `DatasetUnavailable` when they cannot be had.
    """
    data = fashion_mnist(folder)
    rng = np.random.default_rng(seed_for(study.seed, "search"))
    order = rng.permutation(len(data.train_images))
    needed = (study.league, study.own, *(study.queries,) * study.repetitions)
    members, own, *strangers = np.split(order[: sum(needed)], np.cumsum(needed)[:-1])

    def styled(images: NDArray[np.uint8], shop: int, shot: int) -> list[StyledPhoto]:
        style = ShopStyle.drawn(seed_for(study.seed, f"shop {shop}"))
        return [StyledPhoto(image, style, shot) for image in images]

    # Shops 0 to 9 are the league's; the shop that has the gallery and those that ask it are none of them.
    photos = [
        styled(data.train_images[index : index + 1], place % LEAGUE_SHOPS, 0)[0]
        for place, index in enumerate(members)
    ]
    home = LEAGUE_SHOPS
    orders = [rng.permutation(study.products) for _ in range(study.repetitions)]
    asked = [order[: study.queries] for order in orders]
    corrected = [order[study.queries :][: study.corrections] for order in orders]
    parts: dict[str, Sequence[Photo]] = {
        "league": photos,
        "views": [OtherView(photo) for photo in photos],
        "gallery": styled(data.test_images[: study.products], home, 0),
        "own": styled(data.train_images[own], home, 0),
    }
    for repetition, (queried, said, strange) in enumerate(zip(asked, corrected, strangers, strict=True)):
        for situation, shop in (("same shop", home), ("across shops", home + 1 + repetition)):
            name, shot = f"{situation} {repetition}", 1 + repetition
            parts[f"own, {name}"] = styled(data.train_images[own], shop, shot)
            parts[f"queries, {name}"] = styled(data.test_images[queried], shop, shot)
            parts[f"corrections, {name}"] = styled(data.test_images[said], shop, shot)
            parts[f"strangers, {name}"] = styled(data.train_images[strange], shop, shot)
    features = _features(parts, study.fashion, cache)
    league = League(features["league"], features["views"])
    # Numbered after the gallery's, which they are not in.
    others = study.products + np.arange(len(own))
    for repetition, (queried, said) in enumerate(zip(asked, corrected, strict=True)):
        for situation in SITUATIONS:
            name = f"{situation} {repetition}"
            yield (
                situation,
                league,
                Trial(
                    gallery=features["gallery"],
                    gallery_products=np.arange(study.products),
                    queries=features[f"queries, {name}"],
                    query_products=queried,
                    strangers=features[f"strangers, {name}"],
                    own=np.concatenate(
                        [features["own"], features[f"own, {name}"], features["gallery"][said]]
                    ),
                    own_products=np.concatenate([others, others, said]),
                    corrections=features[f"corrections, {name}"],
                    corrected_products=said,
                ),
            )


def grocery_trials(study: Study, cache: Path, folder: Path) -> Iterator[tuple[Situation, League, Trial]]:
    """Yield searches among the groceries in `folder`. Raises `DatasetUnavailable` when it is not the dataset."""
    data = Grocery.load(folder)
    pictures = _web_shop_pictures(folder)

    views = [OtherView(photo) for photo in data.train]
    parts: dict[str, Sequence[Photo]] = {
        "train": data.train,
        "views": views,
        "test": data.test,
        "web": pictures,
    }
    features = _features(parts, study.grocery, cache)
    train, test, web = features["train"], features["test"], features["web"]
    of_train, of_test, of_web = (
        np.array([photo.fine for photo in photos]) for photos in (data.train, data.test, pictures)
    )
    coarse_of = {photo.fine: photo.coarse for photo in pictures}
    for repetition in range(study.grocery_repetitions):
        rng = np.random.default_rng(seed_for(study.seed, f"groceries {repetition}"))
        strangers, new = _divided(coarse_of, rng)
        known = ~np.isin(of_train, [*strangers, *new])
        asked, strange = np.isin(of_test, new), np.isin(of_test, strangers)
        league = League(train[known], features["views"][known])
        shelf = np.concatenate(
            [
                rng.permutation(np.flatnonzero(of_train == product))[:REFERENCES]
                for product in np.unique(of_train[~np.isin(of_train, strangers)])
            ]
        )
        said = rng.permutation(np.flatnonzero(~asked & ~strange))[: study.corrections]
        shown, taught = ~np.isin(of_web, strangers), ~np.isin(of_web, [*strangers, *new])
        galleries: tuple[tuple[Situation, Floats, Numbers, Floats, Numbers], ...] = (
            ("same shop", train[shelf], of_train[shelf], train[known], of_train[known]),
            (
                "across shops",
                web[shown],
                of_web[shown],
                np.concatenate([train[known], web[taught]]),
                np.concatenate([of_train[known], of_web[taught]]),
            ),
        )
        for situation, gallery, gallery_products, own, own_products in galleries:
            yield (
                situation,
                league,
                Trial(
                    gallery=gallery,
                    gallery_products=gallery_products,
                    queries=test[asked],
                    query_products=of_test[asked],
                    strangers=test[strange],
                    own=own,
                    own_products=own_products,
                    corrections=test[said],
                    corrected_products=of_test[said],
                ),
            )


def _divided(coarse_of: dict[int, int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return the products that are strangers and those that are new, of products and their coarse classes."""
    classes = rng.permutation(np.unique(list(coarse_of.values())))
    first, second = int(STRANGERS * len(classes)), int((STRANGERS + NEW) * len(classes))
    strangers = [product for product, coarse in coarse_of.items() if coarse in classes[:first]]
    new = [product for product, coarse in coarse_of.items() if coarse in classes[first:second]]
    for one in classes[second:]:
        own = [product for product, coarse in coarse_of.items() if coarse == one]
        new += [int(product) for product in rng.permutation(own)[: len(own) // 3]]
    return strangers, new


def _web_shop_pictures(folder: Path) -> list[GroceryPhoto]:
    """Return the picture of each grocery as a web shop shows it."""
    try:
        with (folder / "classes.csv").open(newline="", encoding="utf-8") as file:
            return [
                GroceryPhoto(
                    folder / row["Iconic Image Path (str)"].lstrip("/"),
                    int(row["Class ID (int)"]),
                    int(row["Coarse Class ID (int)"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError) as error:
        raise DatasetUnavailable(f"{folder}: not the Grocery Store Dataset ({error}).") from None


def _features(parts: Mapping[str, Sequence[Photo]], recipe: Recipe, cache: Path) -> dict[str, Floats]:
    """Return the features of each part's photos, (n, F)."""
    photos = [photo for part in parts.values() for photo in part]
    with EmbeddingCache(cache) as kept, bar("photos", len(photos), tenths=True) as shown:
        features = embed(photos, recipe, kept, progress=shown.update).features
    bounds = np.cumsum([len(part) for part in parts.values()])[:-1]
    return dict(zip(parts, np.split(features, bounds), strict=True))
