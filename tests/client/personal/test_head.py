"""A head of the shop's own: what it says, when it serves, and what becomes of it when the league moves on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.personal import head as heads
from hanse_client.personal.corrections import Corrections
from hanse_client.personal.head import PersonalHead, in_own_words, mixed
from hanse_client.personal.learning import Examples, Learned, fit, judge, learn, without_copies
from hanse_client.personal.photos import LabelledPhotos
from hanse_client.shop import Shop
from hanse_common.config import load
from hanse_common.errors import RecognizerError
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.taxonomy import Taxonomy

from .shelf import CLASSES, KINDS, OWN, RECIPE, league, picture

LABELS = ("polo", "blouse", "boot", "gift card")
CLASS_OF = (0, 0, 1, None)
DIMENSION = RECIPE.feature_dimension


def labelled(photos: int, held_out: int) -> tuple[LabelledPhotos, Examples]:
    """Return photos whose label is plain in the features, though its class alone is in the first two."""
    source = np.random.default_rng(photos)
    index = np.arange(photos) % len(LABELS)
    centres = np.zeros((len(LABELS), DIMENSION))
    centres[[0, 1, 2], [0, 0, 1]] = 1.0
    centres[np.arange(4), 2 + np.arange(4)] = 1.0
    features = (centres[index] + source.normal(scale=0.3, size=(photos, DIMENSION))).astype(np.float32)
    sides = np.arange(photos) >= photos - held_out
    found = LabelledPhotos((), photos, LABELS, CLASS_OF, index, sides, (None,) * photos)
    shared = league().probabilities(features)
    no_corrections = np.zeros(photos, dtype=np.bool_)
    return found, Examples(features, shared, index, sides, (None,) * photos, no_corrections)


def taught(photos: int = 160, held_out: int = 60) -> Learned:
    found, examples = labelled(photos, held_out)
    return fit(examples, found, league())


def test_it_tells_apart_what_the_shared_one_cannot_and_serves(tmp_path: Path) -> None:
    head = taught().head
    assert head is not None
    judged = head.record.judgement
    assert (judged.photos, judged.better) == (60, True)
    assert judged.own_right > 55
    # Of four labels the shared one in the shop's words knows the boots, and one kind of shirt.
    assert judged.shared_right <= 40
    head.save(tmp_path)
    again = PersonalHead.load(tmp_path, RECIPE, league().card.taxonomy)
    assert again is not None
    assert again.labels == LABELS
    features = labelled(160, 60)[1].features
    shared = league().probabilities(features)
    said = again.probabilities(features, shared)
    np.testing.assert_array_equal(said, head.probabilities(features, shared))
    np.testing.assert_allclose(said.sum(axis=1), 1.0)


def test_its_linear_part_is_scikit_learns() -> None:
    head = taught().head
    assert head is not None
    examples = labelled(160, 60)[1].take(np.arange(100))
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=head.record.strength, max_iter=1000))
    expected = oracle.fit(examples.features, examples.index).predict_proba(examples.features)
    # Without words of the shared one, only the linear part speaks.
    nothing = np.zeros((100, len(CLASSES)))
    np.testing.assert_allclose(head.probabilities(examples.features, nothing), expected, atol=1e-4)


def test_of_two_labels_the_linear_part_is_scikit_learns_too() -> None:
    found, examples = labelled(160, 60)
    two = examples.take(examples.index < 2)
    head = fit(two, found, league()).head
    assert head is not None
    assert head.labels == LABELS[:2]
    training = two.take(~two.held_out)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=head.record.strength, max_iter=1000))
    expected = oracle.fit(training.features, training.index).predict_proba(two.features)
    np.testing.assert_allclose(
        head.probabilities(two.features, np.zeros((len(two.index), 2))), expected, atol=1e-4
    )


def test_the_shared_one_speaks_the_shops_words() -> None:
    words = in_own_words(np.array([[0.8, 0.2], [0.0, 1.0]]), CLASS_OF, (0.75, 0.25, 1.0, 0.0))
    np.testing.assert_allclose(words, [[0.6, 0.2, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0]])
    own = np.array([[0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(mixed(own, words[:1], 0.5), [[0.3, 0.1, 0.1, 0.5]])
    unknown = in_own_words(np.array([[0.5, 0.5]]), (None, None), (0.0, 0.0))
    np.testing.assert_array_equal(unknown, [[0.0, 0.0]])
    np.testing.assert_array_equal(mixed(np.array([[0.1, 0.9]]), unknown, 0.25), [[0.1, 0.9]])


@pytest.mark.parametrize(
    ("gained", "lost", "better"), [(5, 0, False), (6, 0, True), (9, 2, False), (10, 1, True), (1, 9, False)]
)
def test_better_is_what_a_sign_test_says(gained: int, lost: int, better: bool) -> None:
    index = np.zeros(30, dtype=np.int64)
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    shared = np.array([wrong] * gained + [right] * lost + [right] * (30 - gained - lost))
    own = np.array([right] * gained + [wrong] * lost + [right] * (30 - gained - lost))
    judged = judge(index, shared, own, [None] * 30)
    assert judged.p_value == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert judged.better is better
    assert judged.own_right - judged.shared_right == gained - lost
    # All photos of one product are one piece of evidence.
    assert not judge(index, shared, own, ["S-1"] * 30).better


def test_a_head_that_is_not_better_does_not_serve(tmp_path: Path) -> None:
    found, examples = labelled(200, 60)
    two = replace(examples, index=np.array([0, 0, 1, 1])[examples.index]).take(examples.index < 3)
    classes = replace(found, labels=CLASSES, class_of=(0, 1))
    head = fit(two, classes, league()).head
    assert head is not None
    assert head.record.judgement.photos == 45
    assert not head.record.judgement.better
    head.save(tmp_path)
    assert PersonalHead.load(tmp_path, RECIPE, league().card.taxonomy) is None
    assert PersonalHead.read(tmp_path).labels == CLASSES


def test_with_few_photos_the_shared_one_serves() -> None:
    few = taught(photos=24, held_out=4)
    assert few.head is not None
    assert not few.head.record.judgement.better
    none_held_out = taught(photos=100, held_out=0)
    assert none_held_out.head is not None
    assert not none_held_out.head.record.judgement.better
    fewer = taught(photos=11, held_out=1)
    assert fewer.rare == {"blouse": 2} or fewer.head is not None
    assert taught(photos=6, held_out=0).head is None
    assert taught(photos=6, held_out=0).rare == {"polo": 2, "blouse": 2, "boot": 1, "gift card": 1}


def test_a_label_with_too_few_photos_is_left_out_of_training_and_judgement() -> None:
    found, examples = labelled(160, 60)
    cards = np.flatnonzero((examples.index == 3) & ~examples.held_out)
    learned = fit(examples.take(np.delete(np.arange(160), cards[2:])), found, league())
    assert learned.head is not None
    assert learned.head.labels == LABELS[:3]
    assert learned.rare == {"gift card": 2}
    assert (learned.unjudged, learned.head.record.judgement.photos) == (15, 45)


def test_a_correction_takes_the_place_and_the_side_of_the_same_picture() -> None:
    _, examples = labelled(8, 4)
    near = examples.features[5] * 1.01
    other = -examples.features[0]
    both = Examples(
        np.vstack([examples.features, near, other]).astype(np.float32),
        np.zeros((10, 2)),
        np.append(examples.index, [3, 2]),
        np.append(examples.held_out, [False, False]),
        (*["S"] * 8, None, None),
        np.array([False] * 8 + [True] * 2),
    )
    found = without_copies(both)
    assert found.index.tolist() == [*examples.index[:5], *examples.index[6:], 3, 2]
    assert found.held_out.tolist() == [False] * 4 + [True] * 3 + [True, False]
    assert found.products[-2:] == ("S", None)


def test_a_league_update_that_changes_features_or_classes_drops_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = taught().head
    assert head is not None
    head.save(tmp_path)
    taxonomy = league().card.taxonomy
    assert PersonalHead.load(tmp_path, RECIPE, taxonomy) is not None
    new_head = RECIPE.model_copy(update={"model": Linear(l2=0.1)})
    assert PersonalHead.load(tmp_path, new_head, taxonomy) is not None
    assert not caplog.records
    other = RECIPE.model_copy(update={"preprocessing": Preprocessing(size=16, channels=1)})
    centred = RECIPE.model_copy(update={"centre": "ab" * 32})
    for recipe in (other, centred):
        assert PersonalHead.load(tmp_path, recipe, taxonomy) is None
    assert PersonalHead.load(tmp_path, RECIPE, Taxonomy(classes=("shoe", "shirt"))) is None
    assert [record.message for record in caplog.records if "earlier recognizer" in record.message]


def test_damaged_files_are_refused_and_the_shared_one_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = taught().head
    assert head is not None
    taxonomy = league().card.taxonomy
    damage: list[Callable[[], object]] = [
        lambda: flip(tmp_path / "head.safetensors"),
        lambda: (tmp_path / "head.safetensors").unlink(),
        lambda: (tmp_path / "head.json").write_text("{}"),
        lambda: set_field(tmp_path / "head.json", "blend", 2.0),
        lambda: set_field(tmp_path / "head.json", "class_of", [0, 0, 7, None]),
        lambda: set_field(tmp_path / "head.json", "labels", ["a", "b"]),
    ]
    for harm in damage:
        head.save(tmp_path)
        assert PersonalHead.load(tmp_path, RECIPE, taxonomy) is not None
        harm()
        with pytest.raises(RecognizerError):
            PersonalHead.read(tmp_path)
        caplog.clear()
        assert PersonalHead.load(tmp_path, RECIPE, taxonomy) is None
        assert "not used" in caplog.text
    assert heads.forget(tmp_path)
    assert not heads.forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from hanse_client.personal import saved

    head = taught().head
    assert head is not None
    weight = head.weight.copy()
    weight[0, 0] = np.nan
    record = head.record.model_copy(update={"arrays": saved.digest_of({"weight": weight, "bias": head.bias})})
    PersonalHead(record, weight, head.bias).save(tmp_path)
    with pytest.raises(RecognizerError, match="finite"):
        PersonalHead.read(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def set_field(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def test_personalize_learns_the_shops_own_labels_and_says_how_good(
    shop: Path, personalize: Callable[..., str]
) -> None:
    config = load(ClientConfig, shop / "hanse-client.yaml")
    with Corrections(config.corrections_path) as corrections:
        for seed in range(5):
            corrections.add(Gallery.prepare(picture(seed % 4, 1000 + seed)), label=KINDS[seed % 4].upper())
    found: dict[str, Any] = json.loads(personalize("--json"))
    assert sorted(found["head"]["labels"]) == sorted(KINDS)
    assert found["head"]["corrections"] == 5
    assert found["head"]["used"]
    assert found["metric"] == {"products": 0, "judgement": None, "asked": None, "used": False}
    served = PersonalHead.load(config.personal_path, RECIPE, config.league.taxonomy)
    assert served is not None
    features = league().features([picture(kind, 2000) for kind in range(4)])
    said = served.probabilities(features, league().probabilities(features)).argmax(axis=1)
    assert [served.labels[index] for index in said] == list(KINDS)

    text = personalize()
    assert "4 of your own" in text
    assert "is used from now on" in text
    assert "5 of them corrections" in text
    assert "Forgotten" in personalize("--forget")
    assert PersonalHead.load(config.personal_path, RECIPE, config.league.taxonomy) is None
    assert json.loads(personalize("--forget", "--json")) == {"forgotten": {"head": False, "metric": False}}
    with Corrections(config.corrections_path) as corrections:
        assert corrections.count() == 5


def test_what_a_label_map_leaves_out_is_not_learned(shop: Path) -> None:
    (shop / "labels.yaml").write_text(yaml.safe_dump({**OWN, "fine board": None}))
    config = load(ClientConfig, shop / "hanse-client.yaml")
    with Corrections(config.corrections_path) as corrections:
        corrections.add(Gallery.prepare(picture(2, 1000)), label="Fine Board")
        learned = learn(Shop(config), league(), corrections)
    assert learned.head is not None
    assert sorted(learned.head.labels) == sorted(set(KINDS) - {"fine board"})
    assert learned.corrections == 0


def test_labels_outside_of_the_leagues_classes_are_learned_too(shop: Path) -> None:
    (shop / "labels.yaml").write_text(yaml.safe_dump({name: OWN[name] for name in KINDS[:3]}))
    config = load(ClientConfig, shop / "hanse-client.yaml")
    with Corrections(config.corrections_path) as corrections:
        learned = learn(Shop(config), league(), corrections)
    assert learned.head is not None
    assert dict(zip(learned.head.labels, learned.head.record.class_of, strict=True)) == {
        "fine stripes": 0, "coarse stripes": 0, "fine board": 1, "coarse board": None,
    }  # fmt: skip


def test_a_correction_whose_photo_is_damaged_is_named_and_left_out(shop: Path) -> None:
    config = load(ClientConfig, shop / "hanse-client.yaml")
    with Corrections(config.corrections_path) as corrections:
        good = Gallery.prepare(picture(2, 1000))
        corrections.add(good[: len(good) // 2], label="Fine Board")
        learned = learn(Shop(config), league(), corrections)
    assert learned.corrections == 0
    assert len(learned.problems) == 1
