"""One valid value, or a few, of everything that is parsed: what the mutator starts from."""

import importlib
import io
import pkgutil
from datetime import UTC, datetime
from typing import Any

import numpy as np
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

import hanse_client
import hanse_common
from hanse_common import signing, wire
from hanse_common.charter import CharterFile, SignedCharter, founded
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.membership import Request, SignedRequest
from hanse_common.messages import DeclineCode, Declined, Invitation, Start
from hanse_common.modes import (
    DistributedTraining,
    EvaluationTraining,
    LocalTraining,
    MeanTraining,
    MerchantLevelTraining,
    TrendsTraining,
)
from hanse_common.plan import Cohort, Plan, SignedPlan, dimension_of
from hanse_common.release import Release, ReleasedFile, SignedRelease
from hanse_common.secagg.messages import (
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Member,
    Packet,
    Ready,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
)
from hanse_common.secagg.suite import (
    CounterStatement,
    JoinStatement,
    PacketStatement,
    Setup,
    SurvivorStatement,
    _RoundContext,
)
from hanse_common.secagg.transcript import _RosterContext
from hanse_common.session import (
    Answer,
    Ask,
    Assignment,
    BlockReport,
    Challenge,
    Fetch,
    Hello,
    Latest,
    ReportCode,
    _Statement,
    frames,
)
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import (
    Concatenation,
    EfficientNetLite0,
    Part,
    Preprocessing,
    Projection,
    PublicWhitening,
    Scattering,
    TorchvisionBackbone,
)
from hanse_common.vision.recipe_model import Augmentation, Linear, Mlp, SmallCnn
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Message

NOW = 1_800_000_000
OPERATOR, LEAGUE, *MERCHANTS = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 7))
"""The operator's key, the league's, and four merchants' identities."""

PINNED = founded("test", LEAGUE, endorsements=2).read().digest
"""The digest of the founding charter, which merchants pin."""

TAXONOMY = Taxonomy(classes=("shirt", "shoe", "bag"))
SMALL = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
)
RECIPES = (
    SMALL,
    Recipe(preprocessing=Preprocessing(size=8, channels=1), backbone=SMALL.backbone, model=Mlp(hidden=3)),
    Recipe(
        preprocessing=Preprocessing(size=16, mean=(0.4, 0.5, 0.6), std=(0.2,)),
        augmentation=Augmentation(crop_padding=2, flip=0.5, rotation=10.0, hue=0.1),
        backbone=None,
        model=SmallCnn(width=4),
    ),
    Recipe(
        preprocessing=Preprocessing(size=32),
        backbone=EfficientNetLite0(whitening=PublicWhitening(dimensions=5, weights="0" * 64)),
        centre="1" * 64,
        model=Linear(l2=0.1),
    ),
    Recipe(
        backbone=Concatenation(
            parts=(
                Part(
                    preprocessing=Preprocessing(size=32),
                    backbone=TorchvisionBackbone(architecture="resnet18", dimension=512, weights="2" * 64),
                ),
                Part(preprocessing=SMALL.preprocessing, backbone=SMALL.backbone, weight=2.0),
            )
        )
    ),
)

_STEPS: dict[str, Any] = {"noise_multiplier": 20.0, "clipping_norm": 1.0}
_LOCAL = {"rounds": 4, "local_steps": 2, "learning_rate": 0.5, "sampling_rate": 0.2, "expected_batch": 20.0}
TRAININGS = (
    LocalTraining(**_STEPS, **_LOCAL, update_bound=8.0, repeats=400),
    DistributedTraining(**_STEPS, rounds=9, sampling_rate=0.1, expected_batch=50.0),
    MerchantLevelTraining(**_STEPS, **(_LOCAL | {"expected_batch": 2.0}), local_rate=0.1),
    MeanTraining(**_STEPS, expected_batch=400.0),
    EvaluationTraining(**_STEPS, rounds=3, expected_batch=400.0),
    TrendsTraining(**_STEPS, first_day="2026-11-16", days=7, expected_batch=400.0),
)


def plans() -> list[Plan]:
    """Return a plan of each mode, the first for the smallest recipe in mode local, and one for each other recipe."""
    made = []
    for training, recipe in [(training, SMALL) for training in TRAININGS] + [
        (TRAININGS[0], r) for r in RECIPES[1:]
    ]:
        dimension = dimension_of(training, recipe, 3)
        made.append(
            Plan(
                league="test",
                serial=bytes(range(16)),
                recipe=recipe,
                taxonomy=TAXONOMY,
                dimension=dimension,
                training=training,
                cohort=Cohort(min_merchants=3, max_merchants=5, upload_slot=0),
                delta=1e-6,
            )
        )
    return made


def charters() -> tuple[SignedCharter, SignedCharter]:
    """Return the founding charter and one that follows it."""
    first = founded("test", LEAGUE, endorsements=2)
    later = SignedCharter.of(
        first.read().succeeded_by(map(signing.public_bytes, (LEAGUE, MERCHANTS[0])), 1, 2)
    )
    return first, later.signed_by(LEAGUE)


def request(key: Ed25519PrivateKey, name: str) -> SignedRequest:
    """Return a member's request, with the word of two others."""
    asked = Request(charter=PINNED, name=name, entity=f"{name} Ltd", identity=signing.public_bytes(key))
    return SignedRequest.make(asked, key).endorsed_by(MERCHANTS[1]).endorsed_by(MERCHANTS[2])


def directory(**changes: Any) -> Directory:
    """Return a directory of four, of whom the last asked for it, changed by keyword."""
    entries = [
        Entry(name=f"m{n}", entity=f"e{n}", identity=signing.public_bytes(key), expires=NOW + 99)
        for n, key in enumerate(MERCHANTS[:3])
    ]
    entries.append(Entry.of(request(MERCHANTS[3], "m3"), NOW + 99))
    fields = {
        "league": "test",
        "charter": PINNED,
        "version": 3,
        "expires": NOW + 99,
        "entries": tuple(entries),
    }
    return Directory(**(fields | changes))


def signed_directory(listed: Directory | None = None, *keys: Ed25519PrivateKey) -> SignedDirectory:
    """Return the directory under the founding charter, signed by the league's key, or by others."""
    signed = SignedDirectory.of(listed or directory(), charters()[:1])
    for key in keys or (LEAGUE,):
        signed = signed.signed_by(key)
    return signed


def messages() -> list[Message]:
    """Return one message or more of each type; `test_fuzz` notices a type that is missing."""
    listed, members = directory(), []
    for key in MERCHANTS:
        fields = {"sealing_key": bytes(32), "mask_keys": bytes(64), "signature": bytes(64)}
        members.append(Member(identity=signing.public_bytes(key), **fields))
    plan, signed_plan = plans()[0], SignedPlan.sign(plans()[0], OPERATOR)
    signed = {"signed_plan": signed_plan, "signed_directory": signed_directory()}
    work: dict[str, Any] = {"plan_digest": plan.digest, "round": 1, "attempt": 2}
    packets = tuple(
        Packet(sealed=bytes(size), commitments=bytes(64), signature=bytes(64)) for size in (0, 250, 250)
    )
    return [
        *plans(),
        *RECIPES,
        listed,
        *(charter.read() for charter in charters()),
        CharterFile(charters=charters()),
        request(MERCHANTS[3], "m3").request,
        request(MERCHANTS[3], "m3"),
        *signed.values(),
        Invitation(**work, rounds=2, **signed),
        Joined(**work, member=members[0]),
        Declined(**work, code=DeclineCode.POLICY, culprit=bytes(32)),
        Start(**work, model=bytes(84)),
        Upload(**work, vector=bytes(84)),
        Roster(**work, members=tuple(members)),
        Shares(**work, seed_digests=bytes(64), packets=packets),
        Delivery(**work, packets=packets[1:]),
        Ready(**work),
        Survivors(**work, places=(0, 1, 3)),
        Agreed(**work, signature=bytes(64)),
        Agreement(**work, places=(0, 1), signatures=bytes(128)),
        Unmasked(**work, openings=bytes(300)),
        Assignment(block=bytes(16), signed_plan=signed_plan, rounds=4, aggregator="localhost:1"),
        Assignment(block=bytes(16), signed_plan=signed_plan, rounds=1, aggregator="[::1]:65535"),
        BlockReport(block=bytes(16), code=ReportCode.LOST, nonce=bytes(16)),
        Challenge(nonce=bytes(32)),
        Hello.sign(MERCHANTS[0], bytes(32), bytes(32), bytes(16)),
        Ask(trip=1, payload=wire.encode(Ready(**work))),
        Answer(trip=2, payload=b"answer"),
        _Statement(nonce=bytes(32), certificate=bytes(32), block=bytes(16), identity=bytes(32)),
        Setup(**work, rounds=2, directory_digest=bytes(32)),
        _RoundContext(context=bytes(32), round=1, model_digest=bytes(32)),
        _RosterContext(context=bytes(32), members=tuple(members)),
        CounterStatement(identity=bytes(32), counter=300),
        JoinStatement(context=bytes(32), identity=bytes(32), sealing_key=bytes(32), mask_keys=bytes(64)),
        PacketStatement(context=bytes(32), dealer=bytes(32), holder=bytes(32), sealed=b"s", commitments=b"c"),
        SurvivorStatement(context=bytes(32), survivors=(0, 1)),
        release(),
        SignedRelease.sign(release(), MERCHANTS[0]),
        Fetch(number=3),
        Fetch(number=0, file=bytes(32)),
        Latest(),
        Latest(signed=SignedRelease.sign(release(), MERCHANTS[0])),
    ]


def release() -> Release:
    """Return a release of a recognizer of two files."""
    files = (
        ReleasedFile(name="card.json", digest=bytes(32), size=700),
        ReleasedFile(name="model.safetensors", digest=bytes([1]) * 32, size=4000),
    )
    return Release(
        league="fuzz",
        number=2,
        version=1,
        recognizer=bytes(32),
        files=files,
        made=1_750_000_000,
        reason="better",
    )


def message_types() -> list[type[Message]]:
    """Return every message that `hanse_common` or `hanse_client` defines, by kind."""
    for package in (hanse_common, hanse_client):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "flower" not in module.name and ".cli" not in module.name:  # flwr takes seconds to load
                importlib.import_module(module.name)
    found: set[type[Message]] = set()
    border: list[type[Message]] = [Message]
    while border:
        border += (below := border.pop().__subclasses__())
        found |= {
            model
            for model in below
            if "kind" in model.__dict__ and model.__module__.startswith(("hanse_common.", "hanse_client."))
        }
    return sorted(found, key=lambda model: (model.kind, model.__name__))


def stream() -> list[list[bytes]]:
    """Return what a server says on a stream, in frames."""
    said = [
        Challenge(nonce=bytes(32)),
        Ask(trip=1, payload=b"one"),
        Ask(trip=1, payload=b"one"),
        Ask(trip=7, payload=b""),
    ]
    return [
        [frame for message in said[:count] for frame in frames(wire.encode(message))] for count in (1, 3, 4)
    ]


def pictures() -> list[bytes]:
    """Return a small photo in each format, and some of the rarer kinds of PNG, TIFF, GIF and WebP."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    seen: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((colour, kind, {}) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour.convert("LA"), "PNG", {}),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
        (colour.convert("CMYK"), "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (Image.fromarray(rng.integers(0, 65536, (5, 4), dtype=np.uint16)), "PNG", {}),
        (colour, "GIF", {"save_all": True, "append_images": [colour.rotate(90)]}),
        (colour, "WEBP", {"lossless": True}),
        (colour, "JPEG", {"progressive": True, "exif": Image.Exif()}),
    ]
    made = []
    for image, kind, options in seen:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made.append(buffer.getvalue())
    return made


def tensors(**arrays: Any) -> bytes:
    """Return a safetensors file."""
    return bytes(safetensors.numpy.save(arrays))


CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

LABELS = b"""# shop: league
Herrenhemden: shirt
Sale: null
"Schuhe & mehr": shoe
'0123': bag
"""

CONFIG = b"""photos: photos
state: ~/state
holdout_fraction: 0.25
device: cpu
league:
  operator_key: "%s"
  charter: "%s"
  taxonomy: {classes: [shirt, shoe, "bag"]}
policy:
  league: test
  epsilon: 3
  delta: 1e-6
  modes: [local, mean]
connection:
  server: localhost:9000
  authority: ca.crt
""" % (b"0" * 64, b"1" * 64)

LEAGUE_CARD = b"""league: test
charter: "%s"
operator_key: "%s"
server: localhost:9000
authority: |
  -----BEGIN CERTIFICATE-----
  MIIB
  -----END CERTIFICATE-----
taxonomy:
  classes: [shirt, shoe, bag]
""" % (b"0" * 64, b"1" * 64)
