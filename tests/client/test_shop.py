"""A shop from its configuration: real photos on disk to a participant that trains on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from hanse_client.config import ClientConfig, LeagueSettings
from hanse_client.policy import Policy
from hanse_client.shop import HOLDOUT_KEY_BYTES, Shop
from hanse_common import messages, signing, wire
from hanse_common.charter import founded
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.errors import ConfigError, RecognizerError
from hanse_common.messages import Invitation, Start
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring, suite
from hanse_common.secagg.aggregator import Aggregator
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Agreed, Joined, Ready, Shares, Unmasked, Upload
from hanse_common.secagg.suite import Setup
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Projection, PublicWhitening, Scattering
from hanse_common.vision.recipe_model import SmallCnn
from hanse_common.vision.taxonomy import Taxonomy

KEY, LEAGUE_KEY, *PEERS = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 5))
CHARTER = founded("test", LEAGUE_KEY)

MakePlan = Callable[..., Plan]
MakeShop = Callable[..., Shop]


@pytest.fixture(autouse=True)
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(24):
        path = folder / ("shirt", "shoe", "bag")[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(9, 9), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def make_shop(tmp_path: Path) -> MakeShop:
    def make(**changes: Any) -> Shop:
        fields: dict[str, Any] = {
            "photos": tmp_path / "photos",
            "state": tmp_path / "state",
            "holdout_fraction": 0.3,
            "device": "cpu",
            "league": LeagueSettings(
                operator_key=signing.public_bytes(KEY).hex(),
                charter=CHARTER.read().digest.hex(),
                taxonomy=Taxonomy(classes=("shirt", "shoe", "bag")),
            ),
            "policy": Policy(league="test", epsilon=3.0),
        }
        return Shop(ClientConfig(**(fields | changes)))

    return make


@pytest.fixture
def recipe(make_plan: MakePlan) -> Recipe:
    return make_plan().recipe


def test_only_what_is_not_held_out_is_trained_on(make_shop: MakeShop, recipe: Recipe) -> None:
    shop = make_shop()
    catalog = shop.catalog()
    assert len(catalog.train) + len(catalog.holdout) == 24
    assert 1 <= len(catalog.holdout) <= 16
    examples, problems = shop.examples(catalog, recipe)
    assert problems == ()
    assert examples.labels.tolist() == [record.label for record in catalog.train]
    everything, _ = make_shop(holdout_fraction=0.0).examples(
        make_shop(holdout_fraction=0.0).catalog(), recipe
    )
    chosen = [index for index, record in enumerate(catalog.records) if not record.holdout]
    assert torch.equal(examples.inputs, everything.inputs[chosen])


def test_the_division_lasts_and_a_lost_key_is_said(make_shop: MakeShop, tmp_path: Path) -> None:
    held_out = [record.path for record in make_shop().catalog().holdout]
    assert [record.path for record in make_shop().catalog().holdout] == held_out
    key = tmp_path / "state" / "holdout.key"
    assert len(key.read_bytes()) == HOLDOUT_KEY_BYTES
    assert key.stat().st_mode & 0o777 == 0o600 and key.parent.stat().st_mode & 0o777 == 0o700
    for damaged in (b"", bytes(HOLDOUT_KEY_BYTES - 1), bytes(HOLDOUT_KEY_BYTES + 1)):
        key.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"holdout\.key.*expected 32.*backup"):
            make_shop().catalog()


def test_two_shops_divide_differently(make_shop: MakeShop, tmp_path: Path) -> None:
    sides = [[r.holdout for r in make_shop(state=tmp_path / f"{i}").catalog().records] for i in range(2)]
    assert sides[0] != sides[1]


def test_the_cache_follows_the_photos(make_shop: MakeShop, recipe: Recipe, photos: Path) -> None:
    shop = make_shop()
    heard: list[int] = []
    shop.examples(shop.catalog(), recipe, lambda done, total: heard.append(done))
    assert heard == [0, 24]
    for path in sorted(photos.rglob("*.png"))[:4]:
        path.unlink()
    heard.clear()
    shop.examples(shop.catalog(), recipe, lambda done, total: heard.append(done))
    assert heard == [20]
    another = recipe.model_copy(
        update={"backbone": Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=5))}
    )
    shop.examples(shop.catalog(), another)
    heard.clear()
    shop.examples(shop.catalog(), recipe, lambda done, total: heard.append(done))
    assert heard == [20], "a server that goes back and forth between recipes makes no work"


def test_a_photo_that_breaks_after_the_catalog_was_read(
    make_shop: MakeShop, recipe: Recipe, photos: Path
) -> None:
    shop = make_shop(holdout_fraction=0.0)
    catalog = shop.catalog()
    (photos / "shoe" / "01.png").write_bytes(b"not a picture any more")
    examples, problems = shop.examples(catalog, recipe)
    assert len(examples) == 23 and examples.labels.tolist().count(1) == 7
    assert len(problems) == 1 and "01.png" in problems[0]


def test_labels_of_ones_own(make_shop: MakeShop, tmp_path: Path, photos: Path) -> None:
    (photos / "bag").rename(photos / "Taschen")
    (tmp_path / "labels.yaml").write_text("Taschen: bag\n")
    assert dict(make_shop().catalog().unmapped) == {"Taschen": 8}
    catalog = make_shop(labels=tmp_path / "labels.yaml").catalog()
    assert len(catalog.records) == 24 and not catalog.unmapped
    (tmp_path / "labels.yaml").write_text("Taschen: sock\n")
    with pytest.raises(ConfigError, match=r"labels\.yaml:1: Taschen: found 'sock'"):
        make_shop(labels=tmp_path / "labels.yaml").catalog()


def test_a_net_trained_whole_gets_pictures(make_shop: MakeShop, recipe: Recipe) -> None:
    whole = recipe.model_copy(update={"backbone": None, "model": SmallCnn(width=4)})
    shop = make_shop(holdout_fraction=0.0)
    examples, _ = shop.examples(shop.catalog(), whole)
    assert examples.inputs.shape == (24, 1, 8, 8)


def test_a_whitening_that_is_missing_is_named(make_shop: MakeShop, recipe: Recipe) -> None:
    backbone = Scattering(
        scales=1, angles=2, groups=None, whitening=PublicWhitening(dimensions=4, weights="0" * 64)
    )
    shop = make_shop()
    with pytest.raises(RecognizerError, match="name that file"):
        shop.examples(shop.catalog(), recipe.model_copy(update={"backbone": backbone}))


def test_cuda_where_there_is_none(
    make_shop: MakeShop, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shop = make_shop(device="cuda")
    with pytest.raises(ConfigError, match="choose auto or cpu"):
        shop.examples(shop.catalog(), recipe)


def test_its_participant_takes_part_and_pays(
    make_shop: MakeShop, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """… and nothing that is its own leaves in the clear, nor in what is sealed to others."""
    (tmp_path / "photos" / "shirt").rename(tmp_path / "photos" / "CANARY-LABEL")
    for photo in (tmp_path / "photos" / "shoe").iterdir():
        photo.rename(photo.with_name(f"CANARY-{photo.name}"))
    labels = tmp_path / "labels.yaml"
    labels.write_text("CANARY-LABEL: shirt\n")
    plan, shop = make_plan(), make_shop(labels=labels)
    assert any("CANARY" in str(record.path) for record in shop.catalog().records)
    left: list[bytes] = []
    unseal = suite.unseal
    monkeypatch.setattr(suite, "unseal", lambda *arguments: left.append(unseal(*arguments)) or left[-1])
    examples, _ = shop.examples(shop.catalog(), plan.recipe)
    told: list[str] = []
    signing.create_key(shop.config.identity_path)
    participant = shop.participant(plan.recipe, examples, told.append)
    keys = [signing.load_key(shop.config.identity_path), *PEERS]
    entries = tuple(
        Entry(name=f"m{i}", entity=f"e{i}", identity=signing.public_bytes(key), expires=1 << 39)
        for i, key in enumerate(keys)
    )
    listed = Directory(
        league="test", charter=CHARTER.read().digest, version=1, expires=1 << 39, entries=entries
    )
    work: dict[str, Any] = {"plan_digest": plan.digest, "round": 0, "attempt": 0}
    setup = Setup(**work, rounds=1, directory_digest=listed.digest)
    invitation = Invitation(
        **work,
        rounds=1,
        signed_plan=SignedPlan.sign(plan, KEY),
        signed_directory=SignedDirectory.of(listed, (CHARTER,)).signed_by(LEAGUE_KEY),
    )
    parameters, entities = plan.cohort.parameters, listed.entities(0)
    aggregator = Aggregator(setup, parameters, entities)
    peers = {signing.public_bytes(key): Merchant(setup, parameters, key, entities) for key in PEERS}
    own = entries[0].identity

    def ask(expected: Any, request: Any) -> Any:
        reply = participant.handle(wire.encode(request))
        left.append(reply)
        return wire.decode(expected, reply, messages.MAX_MESSAGE_BYTES)

    aggregator.add_member(own, ask(Joined, invitation))
    for identity, peer in peers.items():
        aggregator.add_member(identity, peer.join())
    roster = aggregator.roster()
    aggregator.add_shares(own, ask(Shares, roster))
    for identity, peer in peers.items():
        aggregator.add_shares(identity, peer.share(roster, 0, {}))
    ask(Ready, aggregator.delivery(own))
    assert shop.ledger().counter == 0
    upload = ask(Upload, Start(**work, model=bytes(4 * plan.dimension)))
    assert len(upload.vector) == 4 * plan.dimension and any(upload.vector)
    for identity, peer in peers.items():
        peer.receive(aggregator.delivery(identity))  # opens what was sealed to it
    digest = messages.model_digest(bytes(4 * plan.dimension))
    round_sum = aggregator.open_round(0, digest, plan.dimension)
    round_sum.add_upload(own, upload)
    for identity, peer in peers.items():
        peer.open_round(0, digest)
        zeros = np.zeros(plan.dimension, dtype=np.uint32)
        peer.mask(zeros)
        round_sum.add_upload(identity, Upload(**work, vector=ring.to_bytes(zeros)))
    survivors = round_sum.survivors()
    round_sum.add_agreed(own, ask(Agreed, survivors))
    for identity, peer in peers.items():
        round_sum.add_agreed(identity, peer.agree(survivors))
    round_sum.add_unmasked(own, ask(Unmasked, round_sum.agreement()))
    assert len(left) == 6 + 2 + 2 * 2  # its answers, what it opened, what the two others opened
    secrets = [b"CANARY", b"photos", b"shirt", b"shoe", str(tmp_path).encode(), b".png"]
    assert not [secret for secret in secrets for data in left if secret in data]
    ledger = shop.ledger()
    assert ledger.counter == 1 and ledger.path == shop.config.state / "ledger.sqlite"
    assert (ledger.budget.epsilon, ledger.budget.delta) == (3.0, 1e-5)
    assert told == []
