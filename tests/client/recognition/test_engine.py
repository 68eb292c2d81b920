"""One recognizer at work: it says what the trained one says, within the tolerance, and one photo costs one photo."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hanse_client.personal.head import HeadRecord, Judgement, PersonalHead, features_digest
from hanse_client.personal.metric import Directions, MetricRecord, PersonalMetric
from hanse_client.personal.saved import digest_of
from hanse_client.recognition import engine as engines
from hanse_client.recognition.engine import CPU_BATCH, TOLERANCE, Engine, Seen
from hanse_common.errors import RecognizerError
from hanse_common.vision.fused import fuse
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import EfficientNetLite0, Preprocessing
from hanse_common.vision.recipe_model import Linear, SmallCnn
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

from .shop import picture, recipe

CLASSES = ("shirt", "shoe", "bag")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
JUDGED = Judgement(photos=40, shared_right=20, own_right=30, differing=10, p_value=0.01, better=True)
EFFICIENTNET = Recipe(
    preprocessing=Preprocessing(size=48, channels=3, mean=(0.5,), std=(0.25,)),
    backbone=EfficientNetLite0(),
    model=Linear(),
)


def saved(folder: Path, wanted: Recipe) -> Recognizer:
    vector = np.random.default_rng(5).normal(size=wanted.dimension(3), scale=0.1).astype(np.float32)
    Recognizer.create(wanted, Taxonomy(classes=CLASSES), vector, created=NOW).save(folder)
    return Recognizer.load(folder)


def seen_by(engine: Engine, images: list[Image.Image]) -> list[Seen]:
    return engine.see([engine.prepare(image) for image in images])


PHOTOS = [picture(seed, 90 + seed, 70) for seed in range(CPU_BATCH + 3)]


@pytest.mark.parametrize("count", [1, 2, CPU_BATCH, CPU_BATCH + 3])
@pytest.mark.parametrize("wanted", [recipe(0), EFFICIENTNET], ids=["scattering", "efficientnet"])
def test_it_sees_what_the_trained_network_sees(tmp_path: Path, wanted: Recipe, count: int) -> None:
    recognizer = saved(tmp_path, wanted)
    engine = Engine.load(tmp_path)
    images = PHOTOS[:count]
    features = recognizer.features(images)
    found = seen_by(engine, images)
    assert len(found) == count and engine.dimension == features.shape[1]
    for seen, embedding, shares in zip(
        found, recognizer.embeddings(features), recognizer.probabilities(features), strict=True
    ):
        assert np.linalg.norm(seen.embedding - embedding) < TOLERANCE
        assert np.abs(seen.probabilities - shares).max() < 10 * TOLERANCE
        assert seen.personal is None
    assert (engine.digest, engine.embedding) == (recognizer.digest(), recognizer.embedding_digest())
    assert engine.classes == CLASSES


def test_one_photo_costs_one_row_and_many_go_in_batches(tmp_path: Path) -> None:
    saved(tmp_path, recipe(0))
    engine = Engine.load(tmp_path)
    network = engine._network
    assert network is not None
    rows: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    seen_by(engine, PHOTOS[:1])
    seen_by(engine, PHOTOS)
    assert rows == [1, CPU_BATCH, 3]
    assert seen_by(engine, []) == []


def test_convolutions_are_fused_and_a_network_that_changes_by_it_serves_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recognizer = saved(tmp_path, EFFICIENTNET)
    fused: list[int] = []

    def counted(network: nn.Module) -> int:
        fused.append(fuse(network))
        return fused[-1]

    monkeypatch.setattr(engines, "fuse", counted)
    Engine.load(tmp_path)
    assert fused == [1] and not caplog.records

    def broken(network: nn.Module) -> int:
        count = fuse(network)
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor):
                weight *= 1.01
        return count

    def impossible(network: nn.Module) -> int:
        network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
        return 1

    wanted = recognizer.embeddings(recognizer.features(PHOTOS[:2]))
    for change, said in ((broken, " off here"), (impossible, "no kernel")):
        caplog.clear()
        monkeypatch.setattr(engines, "fuse", change)
        found = seen_by(Engine.load(tmp_path), PHOTOS[:2])
        assert np.linalg.norm(np.stack([seen.embedding for seen in found]) - wanted, axis=1).max() < TOLERANCE
        assert len(caplog.records) == 1 and said in caplog.text


def test_a_photo_of_one_colour_has_a_direction_too(tmp_path: Path) -> None:
    saved(tmp_path, recipe(0))
    engine = Engine.load(tmp_path)
    for colour in ("black", "white", "gray"):
        (seen,) = seen_by(engine, [Image.new("RGB", (40, 30), colour)])
        assert abs(np.linalg.norm(seen.embedding) - 1) < 1e-5


def test_a_net_trained_whole_classifies_and_has_no_embedding(tmp_path: Path) -> None:
    whole = Recipe(preprocessing=Preprocessing(size=8, channels=1), backbone=None, model=SmallCnn(width=4))
    recognizer = saved(tmp_path, whole)
    engine = Engine.load(tmp_path)
    (seen,) = seen_by(engine, PHOTOS[:1])
    assert np.allclose(seen.probabilities, recognizer.predict(PHOTOS[:1])[0], atol=1e-5)
    assert (engine.embedding, engine.dimension, seen.embedding.shape) == (b"", 0, (0,))
    with pytest.raises(RecognizerError, match="has no embedding"):
        engine.require_embedding()


def test_memory_bounds_a_batch(tmp_path: Path) -> None:
    saved(tmp_path, recipe(0))
    assert Engine.load(tmp_path).largest == CPU_BATCH
    assert 1 <= Engine.load(tmp_path, memory=300_000).largest < CPU_BATCH


def test_another_recognizer_than_the_one_wanted_is_refused(tmp_path: Path) -> None:
    recognizer = saved(tmp_path, recipe(0))
    Engine.load(tmp_path, digest=recognizer.digest())
    with pytest.raises(RecognizerError):
        Engine.load(tmp_path, digest=bytes(32))


def test_the_shops_own_head_and_metric_serve_where_they_belong(tmp_path: Path) -> None:
    recognizer = saved(tmp_path / "league", recipe(0))
    plain = Engine.load(tmp_path / "league")
    wanted, source = recognizer.card.recipe, np.random.default_rng(1)
    weight = source.normal(size=(2, wanted.feature_dimension)).astype(np.float32)
    bias = np.zeros(2, np.float32)
    record = HeadRecord(
        features=features_digest(wanted),
        taxonomy=recognizer.card.taxonomy,
        labels=("polo", "boot"),
        class_of=(0, 1),
        shares=(1.0, 1.0),
        photos=(9, 9),
        blend=0.5,
        strength=1.0,
        judgement=JUDGED,
        recognizer=recognizer.digest().hex(),
        created=NOW,
        arrays=digest_of({"weight": weight, "bias": bias}),
    )
    head = PersonalHead(record, weight, bias)
    personal = tmp_path / "personal"
    head.save(personal)
    directions = np.linalg.qr(source.normal(size=(plain.dimension, 3)))[0].T.astype(np.float32)
    learned = Directions(np.zeros(plain.dimension, np.float32), directions, np.full(3, 0.1, np.float32))
    about = MetricRecord(
        embedding=plain.embedding.hex(),
        products=20,
        judgement=JUDGED,
        asked=JUDGED,
        created=NOW,
        arrays=digest_of(vars(learned)),
    )
    PersonalMetric(about, learned).save(personal)

    engine = Engine.load(tmp_path / "league", personal=personal)
    assert engine.personal_labels == ("polo", "boot") and plain.personal_labels == ()
    assert engine.embedding not in (plain.embedding, b"") and engine.digest == plain.digest
    features = recognizer.features(PHOTOS[:4])
    shares = head.probabilities(features, recognizer.probabilities(features))
    rows = PersonalMetric.read(personal).apply(recognizer.embeddings(features))
    for seen, own, row in zip(seen_by(engine, PHOTOS[:4]), shares, rows, strict=True):
        assert seen.personal is not None and np.allclose(seen.personal, own, atol=1e-4)
        assert np.linalg.norm(seen.embedding - row) < TOLERANCE

    other = Engine.load(tmp_path / "league", personal=tmp_path / "nothing")
    assert (other.personal_labels, other.embedding) == ((), plain.embedding)
