"""A malicious server, and an operator who hands out malicious files: each attack against the real code.

| attack | shown in |
|---|---|
| plans beyond policy, field by field | here; each reason in `test_policy` |
| a forged plan, directory, roster, model, trip; answers to one question twice | `test_participant`, `test_stream` |
| a directory that goes back, is changed, expired, another league's, the operator's own; after a restart | here |
| paths in a recognizer's card; files that are links, pipes, devices, folders | here; damage in `test_recognizer` |
| bombs: pictures, safetensors, a card of bytes for a model of gigabytes, MessagePack, compressed HTTP | here |
| nested and oversized records, before and after the hello | here, `test_stream`, `tests/common/test_wire` |
| an address that is none, a redirect into the merchant's own network | here |
| a certificate of another authority or name, a relay | `test_stream`, `tests/server/test_stream` |
| slow-loris: handshake, HTTP/2, frames, Fleet answers; a mute or endless server | here, `test_stream` |
| error probing: what differs when one photo is damaged | here, whole catalogs in `test_participant` |
| timing probing: what is waited for when one photo is another | here, slots in `test_participant` |
| a bundle with hostile code | `test_hostile_bundle` |
| any bytes at any parser | `tests/fuzz` |
"""

import http.server
import itertools
import json
import os
import queue
import signal
import socket
import ssl
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from tests.fuzz import rounds, seeds

from hanse_client import flower_node, node_keeper
from hanse_client.config import ClientConfig
from hanse_client.daemon import Daemon
from hanse_client.examples import Examples
from hanse_client.ledger import Ledger
from hanse_client.node_keeper import NodeKeeper
from hanse_client.policy import Policy
from hanse_client.shop import Shop as ClientShop
from hanse_client.training import ShopTrainer
from hanse_common import signing, wire
from hanse_common.credentials import load_node_key
from hanse_common.errors import HanseError, PhotoError, PhotoTooLarge, RecognizerError
from hanse_common.files import read_bounded
from hanse_common.messages import DeclineCode, Declined
from hanse_common.modes import DistributedTraining, LocalTraining, TrendsTraining
from hanse_common.plan import Cohort, Plan, SignedPlan, dimension_of
from hanse_common.randomness import AesCtrStream
from hanse_common.secagg.messages import Joined
from hanse_common.session import Answer, Ask, Assignment, BlockReport, ReportCode, frames, record_bytes
from hanse_common.vision import photo
from hanse_common.vision.centring import Centre
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Scattering
from hanse_common.vision.recipe_model import Mlp
from hanse_common.vision.recognizer import CARD_FILE, MODEL_FILE, Card, Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.vision.whitening import Whitening
from hanse_common.wire import Message
from hanse_server.development_keys import DevelopmentKeys

from .test_stream import Merchant, Server, greeting, running

# isort: split
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

WAIT = 60.0
MIB = 1 << 20

Until = Callable[[str, Callable[[], Any]], Any]
MakePlan = Callable[..., Plan]


@contextmanager
def memory(most: int) -> Iterator[None]:
    """Fail when the peak of this process's memory grows by more than `most` bytes inside."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield
    grown = peak() - before
    assert grown <= most, f"{grown / MIB:.0f} MiB"


@contextmanager
def in_time() -> Iterator[None]:
    """Raise inside when it takes longer than `WAIT`: what waits for a pipe would wait for ever."""

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"took more than {WAIT} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def merchant(keys: DevelopmentKeys) -> Merchant:
    return Merchant(keys)


def client_config(
    folder: Path, keys: DevelopmentKeys, policy: Policy, server: str = "localhost:1"
) -> ClientConfig:
    """Return the configuration of alder's shop, which has nine photos."""
    for number in range(9):
        path = folder / "photos" / seeds.TAXONOMY.classes[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), 20 * number, dtype=np.uint8)).save(path)
    (folder / "state").mkdir(exist_ok=True)
    return ClientConfig.model_validate(
        {
            "photos": folder / "photos",
            "state": folder / "state",
            "device": "cpu",
            "league": {
                "operator_key": signing.public_bytes(seeds.OPERATOR).hex(),
                "charter": seeds.PINNED.hex(),
                "taxonomy": {"classes": seeds.TAXONOMY.classes},
            },
            "policy": policy.model_dump(),
            "connection": {
                "server": server,
                "authority": keys.authority,
                "identity": keys.merchants["alder"] / "identity.key",
                "node_key": keys.merchants["alder"] / "node.key",
            },
        }
    )


# -- plans beyond policy ------------------------------------------------------------------------------------------

STRICT = Policy(
    league="test", epsilon=3.0, delta=1e-5, modes=("local",), max_rounds=8, max_steps=16, upload_slot=0.5
)
TRAINING = {
    "rounds": 4, "local_steps": 2, "sampling_rate": 0.2, "expected_batch": 20.0, "clipping_norm": 1.0,
    "learning_rate": 0.5, "noise_multiplier": 4.0,
}  # fmt: skip
COHORT = {"min_merchants": 4, "max_merchants": 6, "max_corrupt": 2, "upload_slot": 0.5}


def local(**changes: Any) -> LocalTraining:
    return LocalTraining(**(TRAINING | changes))


BEYOND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "league": ({}, {"league": "other"}),
    "epsilon": ({"training": local(noise_multiplier=1.0)}, {"epsilon": 100.0}),
    "monthly_epsilon": ({}, {"monthly_epsilon": None}),
    "monthly_delta": ({}, {"monthly_delta": None}),
    "delta": ({"delta": 1e-4}, {"delta": 1e-3}),
    "unit": ({"training": local(unit="product")}, {"unit": "product"}),
    "minimum_cohort": ({"cohort": Cohort(**(COHORT | {"min_merchants": 3, "max_corrupt": 1}))}, {"minimum_cohort": 3}),
    "corrupt_merchants": ({"cohort": Cohort(**(COHORT | {"max_corrupt": 1}))}, {"corrupt_merchants": 1}),
    "recipes": ({}, {"recipes": None}),
    "modes": (
        {
            "training": DistributedTraining(
                rounds=4, sampling_rate=0.1, expected_batch=20.0, clipping_norm=1.0, noise_multiplier=6.0
            )
        },
        {"modes": ("local", "distributed")},
    ),
    "max_rounds": ({"training": local(rounds=9, local_steps=1)}, {"max_rounds": 9}),
    "max_steps": ({"training": local(local_steps=5)}, {"max_steps": 20}),
    "upload_slot": ({"cohort": Cohort(**(COHORT | {"upload_slot": 0.25}))}, {"upload_slot": 0.0}),
    "trends_days": (
        {"training": TrendsTraining(first_day="2026-01-05", days=14, expected_batch=20.0, noise_multiplier=40.0)},
        {"trends_days": 14},
    ),
}  # fmt: skip
"""For each field of the policy, what a plan has that this field alone refuses, and how the field would allow it."""

NOT_OF_A_PLAN = {"accounting", "verified", "minimum_verified", "approval", "report", "updates"}
"""How plans add up; who must be in a roster (below); what is asked of and told to whom; when a recognizer is taken."""

STRICTER: dict[str, dict[str, Any]] = {
    "monthly_epsilon": {"monthly_epsilon": 0.01},
    "monthly_delta": {"monthly_delta": 1e-9},
    "minimum_cohort": {"minimum_cohort": 4},
    "corrupt_merchants": {"corrupt_merchants": 2},
    "recipes": {"recipes": ("0" * 16,)},
    "trends_days": {"trends_days": 7, "modes": ("trends",)},
}


def strict(field: str) -> Policy:
    return STRICT.model_copy(update=STRICTER.get(field, {}))


def beyond(field: str) -> Plan:
    fields: dict[str, Any] = {"training": local(), "cohort": Cohort(**COHORT)} | BEYOND[field][0]
    fields["league"] = "other" if field == "league" else "test"
    return Plan(
        league=fields["league"],
        serial=bytes(16),
        recipe=seeds.SMALL,
        taxonomy=seeds.TAXONOMY,
        dimension=dimension_of(fields["training"], seeds.SMALL, len(seeds.TAXONOMY.classes)),
        training=fields["training"],
        cohort=fields["cohort"],
        delta=fields.get("delta", 1e-6),
    )


def test_each_field_of_the_policy_has_an_attack() -> None:
    """A field that was added needs a plan that it alone refuses."""
    assert set(BEYOND) == set(Policy.model_fields) - NOT_OF_A_PLAN


@pytest.mark.parametrize("field", BEYOND)
def test_a_plan_beyond_one_field_is_refused_by_that_field_alone(tmp_path: Path, field: str) -> None:
    plan, policy = beyond(field), strict(field)
    (reason,) = policy.reasons(plan, seeds.TAXONOMY)
    loose = policy.model_copy(update=BEYOND[field][1])
    assert loose.reasons(plan, seeds.TAXONOMY) == []
    shop = rounds.Shop(tmp_path / "strict", policy)
    invitation = rounds.invite(plan)
    assert shop.ask(invitation) == Declined(**invitation.work, code=DeclineCode.POLICY)
    assert shop.untouched()
    assert reason in shop.told[0]
    if field not in ("league", "trends_days"):  # whose directory would be another, too; who keeps no queries
        assert isinstance(rounds.Shop(tmp_path / "loose", loose).ask(invitation), Joined)


@pytest.mark.parametrize("field", BEYOND)
def test_the_daemon_reads_no_photo_and_charges_nothing_for_it(
    tmp_path: Path, keys: DevelopmentKeys, field: str
) -> None:
    config, told = client_config(tmp_path, keys, strict(field)), list[str]()
    assignment = Assignment(
        block=b"b" * 16,
        signed_plan=SignedPlan.sign(beyond(field), seeds.OPERATOR),
        rounds=1,
        aggregator="localhost:1",
    )
    opened = opened_by(lambda: Daemon(config, told.append)._serve(wire.encode(assignment)), tmp_path)
    assert told[0].startswith("Not taking part now (policy): ")
    assert not [path for path in opened if path.suffix == ".png"]
    assert not {"embeddings.sqlite", "holdout.key"} & {path.name for path in config.state.iterdir()}
    assert Ledger(config.ledger_path, config.policy.budget).counter == 0


def test_a_roster_of_strangers_is_refused_before_anything_is_dealt(tmp_path: Path) -> None:
    known = {
        name: signing.public_bytes(key).hex()
        for name, key in (("m1", seeds.MERCHANTS[1]), ("m3", seeds.MERCHANTS[3]))
    }
    for minimum, refused in ((1, False), (2, True)):
        policy = rounds.POLICY.model_copy(update={"verified": known, "minimum_verified": minimum})
        shop = rounds.Shop(tmp_path / str(minimum), policy)
        roster = rounds.request_of("roster", shop)
        assert isinstance(shop.ask(roster), Declined) is refused
        assert shop.untouched()


_WATCHED: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHED is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _WATCHED.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)


def opened_by(act: Callable[[], object], folder: Path) -> list[Path]:
    """Return the files that `act` opens but for Python's own and the system's; relative to `folder` where below."""
    global _WATCHED
    _WATCHED = []
    try:
        act()
    finally:
        found, _WATCHED = _WATCHED, None
    return [
        Path(name)
        for name in found
        if not name.startswith((sys.prefix, sys.base_prefix, "/usr", "/proc", "/sys"))
    ]


# -- directories --------------------------------------------------------------------------------------------------


def test_no_other_directory_is_believed_after_one_was_seen_and_nothing_is_undone(tmp_path: Path) -> None:
    plan = seeds.plans()[0]
    attempts = itertools.count()

    def ask(shop: rounds.Shop, signed: Any) -> Any:
        return shop.ask(rounds.invite(plan, next(attempts), signed_directory=signed))

    seen = seeds.signed_directory(seeds.directory(version=5))
    assert isinstance(ask(rounds.Shop(tmp_path), seen), Joined)
    fewer = seeds.directory().entries[:3]
    attacks = {
        "an earlier one": seeds.signed_directory(seeds.directory(version=4)),
        "another of that version": seeds.signed_directory(seeds.directory(version=5, entries=fewer)),
        "out of date": seeds.signed_directory(seeds.directory(version=6, expires=seeds.NOW)),
        "another league's": seeds.signed_directory(seeds.directory(version=6, league="other")),
        "of another charter": seeds.signed_directory(seeds.directory(version=6, charter=bytes(32))),
        "signed by the operator": seeds.signed_directory(seeds.directory(version=6), seeds.OPERATOR),
        "signed by a member": seeds.signed_directory(seeds.directory(version=6), seeds.MERCHANTS[1]),
        "without a signature": seeds.signed_directory(seeds.directory(version=6)).model_copy(
            update={"signatures": ()}
        ),
        "with a forged one": _forged(seeds.directory(version=6)),
        "without this shop": seeds.signed_directory(
            seeds.directory(version=6, entries=seeds.directory().entries[1:])
        ),
    }
    for restarted in (False, True):
        shop = rounds.Shop(tmp_path)
        for name, signed in attacks.items():
            reply = ask(rounds.Shop(tmp_path) if restarted else shop, signed)
            assert (type(reply), reply.code) == (Declined, DeclineCode.DIRECTORY), name
        assert isinstance(ask(shop, seen), Joined), "the last one still is"
        assert shop.untouched()
    assert isinstance(ask(shop, seeds.signed_directory(seeds.directory(version=6))), Joined)


def _forged(directory: Any) -> Any:
    signed = seeds.signed_directory(directory)
    (one,) = signed.signatures
    return signed.model_copy(update={"signatures": (one.model_copy(update={"signature": b"x" * 64}),)})


# -- paths and special files in what an operator hands out --------------------------------------------------------


def recognizer(folder: Path) -> Recognizer:
    vector = np.linspace(-1, 1, seeds.SMALL.dimension(3), dtype=np.float32)
    made = Recognizer.create(seeds.SMALL, seeds.TAXONOMY, vector, created=seeds.CREATED)
    made.save(folder)
    return made


HOSTILE_NAMES = (
    "/etc/passwd",
    "../../state/identity.key",
    "..",
    "C:\\secret",
    "~root/x",
    "file:///etc/passwd",
    "$HOME",
)


def test_no_words_of_a_card_are_a_path(tmp_path: Path) -> None:
    """A card has no field for a path, and what it has words for is not opened."""
    assert '"format": "path"' not in json.dumps(Card.model_json_schema())
    made = recognizer(tmp_path / "folder")
    card = made.card.model_copy(
        update={
            "taxonomy": Taxonomy(classes=HOSTILE_NAMES[:3]),
            "metrics": dict.fromkeys(HOSTILE_NAMES, 0.5),
        }
    )
    (tmp_path / "folder" / CARD_FILE).write_bytes(card.to_bytes())
    loaded: list[Recognizer] = []
    opened = opened_by(lambda: loaded.append(Recognizer.load(tmp_path / "folder")), tmp_path)
    assert {path.parent for path in opened} == {tmp_path / "folder"}
    opened = opened_by(lambda: loaded[0].predict([Image.new("RGB", (9, 9))]), tmp_path)
    assert opened == []


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "resnet18\0", "__class__.x", ""])
def test_a_backbones_name_in_a_card_is_a_word(tmp_path: Path, name: str) -> None:
    made = recognizer(tmp_path)
    card = json.loads(made.card.to_bytes())
    card["recipe"]["backbone"] = {
        "name": "torchvision", "architecture": name, "dimension": 6, "weights": "0" * 64,
    }  # fmt: skip
    (tmp_path / CARD_FILE).write_text(json.dumps(card))
    with pytest.raises(RecognizerError, match=r"card\.json: recipe"):
        Recognizer.load(tmp_path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's own path may have 107 characters
        try:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def secret(path: Path) -> None:
    (path.parent.parent / "secret").write_text("the owner's secret")
    path.symlink_to("../secret")


@pytest.mark.parametrize("file", [CARD_FILE, MODEL_FILE])
@pytest.mark.parametrize(
    "make", [pipe, endless, loop, Path.mkdir, listening, secret], ids=lambda make: make.__name__
)
def test_a_file_of_a_recognizers_folder_that_is_none(
    tmp_path: Path, file: str, make: Callable[[Path], None]
) -> None:
    """Nothing is waited for, no more than the bound is read, and nothing of another file is in the text."""
    folder = tmp_path / "folder"
    recognizer(folder)
    (folder / file).unlink()
    make(folder / file)
    with in_time(), memory(64 * MIB), pytest.raises(RecognizerError) as caught:
        Recognizer.load(folder)
    assert str(folder / file) in str(caught.value)
    assert "owner" not in str(caught.value)


@pytest.mark.parametrize("make", [pipe, endless, loop, Path.mkdir, listening], ids=lambda make: make.__name__)
def test_any_file_that_is_handed_out_may_be_none(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Plans, whitenings, centres, weights and certificates are read by this one function."""
    make(tmp_path / "file")
    files = len(list(Path("/proc/self/fd").iterdir()))
    with in_time(), pytest.raises(HanseError, match="file: "):
        read_bounded(tmp_path / "file", 1000, "a plan", HanseError)
    assert len(list(Path("/proc/self/fd").iterdir())) == files


# -- bombs --------------------------------------------------------------------------------------------------------


def picture(kind: str) -> bytearray:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return bytearray(buffer.getvalue())


def png(width: int, height: int) -> bytes:
    """A PNG whose header and pixels are as large as it says, 1 bit each, in a thousandth of their size."""
    row = bytes(1 + width // 8)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", body),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def claims(kind: str, at: int, form: str, width: int, height: int) -> bytes:
    data = picture(kind)
    struct.pack_into(form, data, at, width, height)
    return bytes(data)


def webp() -> bytes:
    data = picture("WEBP")
    at = data.index(b"VP8L") + 9
    struct.pack_into("<I", data, at, 16383 | 16383 << 14)
    return bytes(data)


def gif_frame() -> bytes:
    """One pixel in all, it says, and a first frame of four thousand million."""
    data = picture("GIF")
    struct.pack_into("<HH", data, 6, 1, 1)
    at = data.index(b"\x2c\0\0\0\0\x09\0\x09\0") + 5
    struct.pack_into("<HH", data, at, 65535, 65535)
    return bytes(data)


def jpeg() -> bytes:
    data = picture("JPEG")
    at = data.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", data, at, 65535, 65535)
    return bytes(data)


def tiff() -> bytes:
    data = picture("TIFF")
    start, count = (
        struct.unpack_from("<I", data, 4)[0],
        struct.unpack_from("<H", data, struct.unpack_from("<I", data, 4)[0])[0],
    )
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] in (256, 257):
            struct.pack_into("<HII", data, entry + 2, 4, 1, 1 << 20)
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG header": lambda: png(1 << 15, 1)[:33],
    "PNG of 144 megapixels": lambda: png(12_000, 12_000),
    "GIF screen": lambda: claims("GIF", 6, "<HH", 65535, 65535),
    "GIF frame": gif_frame,
    "WebP": webp,
    "JPEG": jpeg,
    "BMP": lambda: claims("BMP", 18, "<ii", 1 << 20, 1 << 20),
    "TIFF": tiff,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_larger_than_it_is_costs_nothing(name: str) -> None:
    data = BOMBS[name]()
    with memory(32 * MIB), pytest.raises(PhotoError) as caught:
        photo.decode(data)
    assert name == "PNG header" or isinstance(caught.value, PhotoTooLarge), caught.value


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def claimed(shape: list[int], size: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}


TENSORS: dict[str, bytes] = {
    "a header of exabytes": struct.pack("<Q", 1 << 60) + b"{}",
    "a header of gigabytes": struct.pack("<Q", 4 << 30) + b"{}",
    "a tensor of gigabytes": header(mean=claimed([1 << 30], 4 << 30)),
    "a shape that wraps around": header(mean=claimed([1 << 32, 1 << 32], 0)),
    "a shape of more than its bytes": header(mean=claimed([1 << 30], 16)) + bytes(16),
    "a thousand tensors over the same bytes": header(**{str(n): claimed([4], 16) for n in range(1000)})
    + bytes(16),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_larger_than_their_file_cost_nothing(tmp_path: Path, name: str) -> None:
    import hashlib

    data = TENSORS[name]
    digest = hashlib.sha256(data).hexdigest()
    card = recognizer(tmp_path).card.model_copy(update={"model_digest": digest})
    (tmp_path / CARD_FILE).write_bytes(card.to_bytes())
    (tmp_path / MODEL_FILE).write_bytes(data)
    with memory(32 * MIB):
        for load in (
            lambda: Whitening.from_bytes(data, digest, 4, 2),
            lambda: Centre.from_bytes(data, 4),
            lambda: Recognizer.load(tmp_path),
        ):
            with pytest.raises(RecognizerError):
                load()


def test_a_card_of_some_bytes_for_a_model_of_gigabytes_builds_nothing(tmp_path: Path) -> None:
    made = recognizer(tmp_path)
    large = Recipe(
        preprocessing=Preprocessing(size=64, channels=3),
        backbone=Scattering(scales=2, angles=8, groups=None),
        model=Mlp(hidden=4096),
    )
    assert large.dimension(3) > 200_000_000
    card = made.card.model_copy(update={"recipe": large, "recipe_digest": large.digest().hex()})
    (tmp_path / CARD_FILE).write_bytes(card.to_bytes())
    with memory(32 * MIB), pytest.raises(RecognizerError, match="do not fit the recipe"):
        Recognizer.load(tmp_path)


def nested(inner: bytes, depth: int) -> bytes:
    """MessagePack: arrays of 1024, `depth` deep, full of `inner`."""
    for _ in range(depth):
        inner = b"\xdc\x04\x00" + inner * 1024
    return inner


PLAN = seeds.plans()[0]
NESTED: dict[str, bytes] = {
    "maps in arrays in arrays": b"\x96" + nested(b"\x80", 2) * 6,
    "arrays in arrays in arrays": b"\x96" + nested(b"\x91\xc0", 2)[:1_000_000] * 6,
    "as deep as it is long": b"\x91" * 6_000_000,
    "an invitation full of maps": wire.encode(rounds.invite(PLAN)).replace(
        b"\xa6rounds\x01", b"\xa6rounds" + nested(b"\x80", 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_messages_of_many_nested_parts_cost_little_more_than_their_bytes(tmp_path: Path, name: str) -> None:
    """Counting entries alone, six megabytes of empty maps in arrays in arrays would be half a gigabyte of objects."""
    data = NESTED[name]
    assert len(data) <= record_bytes(PLAN.dimension) + 100_000
    shop = rounds.Shop(tmp_path)
    with memory(32 * MIB):
        assert shop.ask(data).code == DeclineCode.MALFORMED
    assert shop.untouched()


def test_bombs_on_a_stream_are_declined_one_by_one_and_the_merchant_goes_on(
    keys: DevelopmentKeys, merchant: Merchant, tmp_path: Path
) -> None:
    shop = rounds.Shop(tmp_path)
    merchant.handle = shop.participant.handle  # type: ignore[method-assign]
    small = [data[:200_000] for data in NESTED.values()]
    inside = wire.encode(Ask(trip=1, payload=wire.encode(Ask(trip=2, payload=small[0]))))
    questions = [*small, inside, wire.encode(rounds.invite(PLAN))]

    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        for trip, payload in enumerate(questions, 1):
            yield from frames(wire.encode(Ask(trip=trip, payload=payload)))
            server.hear(frames_in)

    with running(script, keys) as server:
        assert merchant.serve(server.port) is ReportCode.DONE
        answers = server.answers()
    kinds = [wire.decode(Answer, answer).payload[2] for answer in answers]
    assert kinds == [Declined.kind] * (len(questions) - 1) + [Joined.kind]


# -- where it sends the merchant ----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["a" * 64, ".a", "a..b", "..", "-", "0", "localhost."])
def test_an_address_that_nobody_has_is_a_loss_and_no_error(merchant: Merchant, host: str) -> None:
    assert merchant.serve(1, patience=0.1, host=host) is ReportCode.LOST
    assert merchant.told == [f"No stream to {host}:1 could be kept open."]


Answering = Callable[["Fleet", http.server.BaseHTTPRequestHandler], None]
NOTHING = PullMessagesResponse().SerializeToString()


class Fleet:
    """A Fleet server of its own making: it lets nodes in, and answers their questions for messages by `script`."""

    def __init__(self, keys: DevelopmentKeys, script: Answering) -> None:
        self.asked: list[str] = []
        self.over = threading.Event()
        fleet = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                fleet.asked.append(self.path)
                with suppress(OSError):
                    if self.path.endswith("/activate-node"):
                        answer(self, ActivateNodeResponse(node_id=7).SerializeToString())
                    elif self.path.endswith("/send-node-heartbeat"):
                        answer(self, SendNodeHeartbeatResponse(success=True).SerializeToString())
                    elif self.path.endswith("/deactivate-node"):
                        answer(self, DeactivateNodeResponse().SerializeToString())
                    else:
                        script(fleet, self)

            def log_message(self, *arguments: object) -> None: ...

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys.certificate, keys.key)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        return f"localhost:{self.server.server_address[1]}"

    def __enter__(self) -> "Fleet":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def answer(handler: http.server.BaseHTTPRequestHandler, body: bytes, **headers: str) -> None:
    handler.send_response(200)
    for name, value in ({"content_length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def keep(
    keys: DevelopmentKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Fleet], tuple[NodeKeeper, list[str]]]]:
    """Return a function that keeps a node at a Fleet server, and what its owner hears."""
    monkeypatch.setattr(node_keeper, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(node_keeper, "LONGEST_PAUSE", 0.1)
    kept: list[NodeKeeper] = []
    key = load_node_key(keys.merchants["alder"] / "node.key")

    def start(fleet: Fleet) -> tuple[NodeKeeper, list[str]]:
        told: list[str] = []
        config = client_config(tmp_path, keys, rounds.POLICY, fleet.address)
        kept.append(NodeKeeper(config, key, told.append).__enter__())
        return kept[-1], told

    yield start
    for keeper in kept:
        keeper.__exit__(None, None, None)


def test_a_redirect_does_not_lead_the_node_into_the_merchants_own_network(
    keys: DevelopmentKeys, keep: Callable[[Fleet], tuple[NodeKeeper, list[str]]], wait_until: Until
) -> None:
    """Else the server could reach, from inside, what only the merchant's machine can."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as router:
        where = router.getsockname()[1]

        def listen() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = router.accept()
                    with connection:
                        heard.append(connection.recv(65536))

        threading.Thread(target=listen, daemon=True).start()

        def script(fleet: Fleet, handler: http.server.BaseHTTPRequestHandler) -> None:
            handler.send_response(307)
            handler.send_header("location", f"http://127.0.0.1:{where}/admin")
            handler.send_header("content-length", "0")
            handler.end_headers()

        with Fleet(keys, script) as fleet:
            _, told = keep(fleet)
            wait_until("the node to leave", lambda: any("the connection was lost" in line for line in told))
        router.shutdown(socket.SHUT_RDWR)
    assert heard == []


# -- answers that do not end --------------------------------------------------------------------------------------


def zipped() -> Iterator[tuple[str, bytes]]:
    """A gzip stream of sixteen gibibytes of zeros: how it is encoded, and its pieces."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    yield "gzip", packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(64 * MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(256):
        yield "gzip", piece


def plain() -> Iterator[tuple[str, bytes]]:
    for _ in range(16 << 10):
        yield "", bytes(MIB)


SMALLER_NODE = """#!{python}
import os, sys
from hanse_client import flower_node
flower_node.MAX_MEMORY_BYTES = {most}
os._exit(flower_node.main(*sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [zipped, plain], ids=lambda pieces: pieces.__name__)
def test_an_answer_larger_than_the_node_may_hold_ends_the_node_and_not_the_daemon(
    keys: DevelopmentKeys,
    keep: Callable[[Fleet], tuple[NodeKeeper, list[str]]],
    wait_until: Until,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pieces: Callable[[], Iterator[tuple[str, bytes]]],
) -> None:
    """The node's own bound is four times what it is here, which takes a quarter of the time to send."""
    program = tmp_path / "node"
    program.write_text(SMALLER_NODE.format(python=sys.executable, most=MIB << 10))
    program.chmod(0o700)
    monkeypatch.setattr(node_keeper.sys, "executable", str(program))
    sent: list[int] = []

    def script(fleet: Fleet, handler: http.server.BaseHTTPRequestHandler) -> None:
        if sent:
            answer(handler, NOTHING)
            return
        sent.append(0)
        handler.send_response(200)
        for number, (encoding, piece) in enumerate(pieces()):
            if number == 0:
                if encoding:
                    handler.send_header("content-encoding", encoding)
                handler.send_header("content-length", str(16 << 30))
                handler.end_headers()
            handler.wfile.write(piece)
            sent[0] += len(piece)

    peaks: list[int] = []
    with Fleet(keys, script) as fleet, memory(512 * MIB):
        keeper, told = keep(fleet)

        def well_again() -> bool:
            with suppress(psutil.Error, AttributeError):
                peaks.append(psutil.Process(keeper._process.pid).memory_info().rss)  # type: ignore[union-attr]
            return told.count("Connected. Waiting for the league.") == 2

        wait_until("the second node", well_again)
        wait_until("its questions", lambda: fleet.asked[-1].endswith("/pull-messages"))
    assert [line for line in told if "the connection was lost" in line], told
    assert flower_node.MAX_MEMORY_BYTES == 4 * (MIB << 10)
    assert max(peaks) < MIB << 10
    assert pieces is plain or max(peaks) < 300 * MIB, "it was not unpacked"


# -- slow-loris ---------------------------------------------------------------------------------------------------


class Dribble:
    """A relay to `port` whose answers come byte by byte, from the first connection after `swift` or from `slow` on."""

    def __init__(self, port: int, swift: int, slow: threading.Event) -> None:
        self.port, self.swift, self.slow = port, swift, slow
        self.connections = 0
        self.over = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self.listener.getsockname()[1])

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.port))
                self.connections += 1
                if self.connections > self.swift:
                    self.slow.set()
                threading.Thread(target=self._copy, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._copy, args=(far, near, True), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket, may_be_slow: bool) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                slow = may_be_slow and self.slow.is_set()
                for piece in [data[at : at + 1] for at in range(len(data))] if slow else [data]:
                    other.sendall(piece)
                    if slow and self.over.wait(0.05):
                        break
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


SLOW: dict[str, int] = {"in the handshake": 0, "after the certificate was seen": 1, "in a question": 9}
"""How many connections go swiftly before."""


@pytest.mark.parametrize("stopped", [False, True], ids=["until its limits", "until it is stopped"])
@pytest.mark.parametrize("where", SLOW)
def test_a_server_that_says_a_byte_at_a_time_holds_nobody(
    merchant: Merchant, keys: DevelopmentKeys, monkeypatch: pytest.MonkeyPatch, where: str, stopped: bool
) -> None:
    """Each byte is in time; all of them are not. Nothing but limits, or a stop, ends this."""
    monkeypatch.setattr("hanse_client.stream.CONNECT_SECONDS", 0.5)
    limit = WAIT if stopped else 1.5
    if stopped:
        threading.Timer(1.0, merchant.stop.set).start()
    slow = threading.Event()
    ended: queue.SimpleQueue[ReportCode] = queue.SimpleQueue()

    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        slow.set()
        yield from frames(wire.encode(Ask(trip=1, payload=bytes(100_000))))
        server.hear(frames_in)

    with running(script, keys) as server, Dribble(server.port, SLOW[where], slow) as port:
        serve = threading.Thread(
            target=lambda: ended.put(merchant.serve(port, patience=limit, deadline=limit)), daemon=True
        )
        serve.start()
        assert ended.get(timeout=WAIT / 4) is ReportCode.LOST
    assert merchant.handled == []
    assert bool(merchant.told) is not stopped


@pytest.mark.slow
def test_a_fleet_that_says_a_byte_at_a_time_does_not_keep_the_daemon_from_stopping(
    keys: DevelopmentKeys, keep: Callable[[Fleet], tuple[NodeKeeper, list[str]]], wait_until: Until
) -> None:
    dribbled: list[bytes] = []

    def script(fleet: Fleet, handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(1 << 30))
        handler.end_headers()
        while not fleet.over.wait(0.05):
            handler.wfile.write(b"\n")
            dribbled.append(b"\n")

    with Fleet(keys, script) as fleet:
        keeper, told = keep(fleet)
        wait_until("some bytes", lambda: len(dribbled) > 5)
        process = keeper._process
        keeper.__exit__(None, None, None)
    assert process is not None and process.poll() is not None
    assert told == [f"Connecting to {fleet.address}.", "Connected. Waiting for the league."]


# -- error probing, timing probing --------------------------------------------------------------------------------


def shape(message: Message) -> Any:
    """Return all of `message` but what keys, masks and signatures are made of: there, how long they are."""

    def bare(value: Any) -> Any:
        if isinstance(value, bytes):
            return len(value)
        if isinstance(value, dict):
            return {name: bare(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [bare(part) for part in value]
        return value

    return type(message).__name__, bare(message.model_dump()), len(wire.encode(message))


def black(path: Path) -> None:
    Image.new("L", (9, 9)).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def bomb(path: Path) -> None:
    path.write_bytes(png(12_000, 12_000))


def text(path: Path) -> None:
    path.write_bytes(b"no picture")


def moved(path: Path) -> None:
    """Another class; the class that it leaves keeps photos."""
    path.rename(path.parent.parent / "bag" / path.name)


def class_emptied(path: Path) -> None:
    for other in path.parent.glob("*.png"):
        other.unlink()


PHOTOS: dict[str, Callable[[Path], None]] = {
    "as it is": lambda path: None,
    "black": black,
    "cut off": cut,
    "a bomb": bomb,
    "no picture": text,
    "gone": Path.unlink,
    "another class": moved,
    "the last of its class": class_emptied,
}

FEATURES: dict[str, float] = {
    "usual": 1.0,
    "not a number": np.nan,
    "infinite": np.inf,
    "huge": 3e38,
    "zero": 0.0,
}


def trainer_over_photos(folder: Path, keys: DevelopmentKeys, change: Callable[[Path], None]) -> ShopTrainer:
    config = client_config(folder, keys, rounds.POLICY)
    change(folder / "photos" / "shirt" / "0.png")
    shop = ClientShop(config)
    examples, _ = shop.examples(shop.catalog(), seeds.SMALL)
    return ShopTrainer(seeds.SMALL, seeds.TAXONOMY, examples, AesCtrStream(bytes(32)))


def trainer_over_features(value: float) -> ShopTrainer:
    features = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
    features[0] = value * np.sign(features[0])
    examples = Examples.of(features, np.arange(40) % 3, "cpu")
    return ShopTrainer(seeds.SMALL, seeds.TAXONOMY, examples, AesCtrStream(bytes(32)))


def observed(folder: Path, trainer: ShopTrainer) -> list[Any]:
    """Return all that a server can see of a round: replies, waits before them, and how often a clock was read."""
    training = LocalTraining(**(TRAINING | {"sampling_rate": 1.0, "noise_multiplier": 30.0}))
    cohort = Cohort(min_merchants=3, max_merchants=5, upload_slot=2.0)
    plan = seeds.plans()[0].model_copy(update={"training": training, "cohort": cohort})
    shop = rounds.Shop(folder, trainer=trainer)
    ticks = itertools.count()
    shop.participant._monotonic = lambda: 0.25 * next(ticks)  # a clock that counts how often it is read
    seen: list[Any] = []
    asked = rounds.Round(shop, plan).requests()
    trip, request = next(asked)
    with suppress(StopIteration):
        while True:
            shop.waits.clear()
            reply = shop.ask(request)
            seen.append((trip, shape(reply), list(shop.waits), next(ticks)))
            trip, request = asked.send(reply)
    return seen


def test_whatever_one_photo_is_a_server_sees_the_same_replies_and_waits(
    tmp_path: Path, keys: DevelopmentKeys
) -> None:
    """Types, order, lengths and all fields that are not random; how often a clock is read, and what is waited for."""
    found = {}
    for name, change in PHOTOS.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        found[name] = observed(folder / "ledger", trainer_over_photos(folder, keys, change))
    expected = found.pop("as it is")
    assert [trip for trip, *_ in expected] == list(rounds.TRIPS)
    assert [reply[0] for _, reply, *_ in expected] == [
        "Joined",
        "Shares",
        "Ready",
        "Upload",
        "Agreed",
        "Unmasked",
    ]
    assert [waits for *_, waits, _ in expected] == [[], [], [], [1.75], [], []]
    for name, seen in found.items():
        assert seen == expected, name


def test_whatever_one_photos_features_are_a_server_sees_the_same_replies_and_waits(tmp_path: Path) -> None:
    found = {
        name: observed(tmp_path / name, trainer_over_features(value)) for name, value in FEATURES.items()
    }
    expected = found.pop("usual")
    assert [reply[0] for _, reply, *_ in expected][3] == "Upload"
    for name, seen in found.items():
        assert seen == expected, name


@pytest.mark.parametrize("name", PHOTOS)
def test_the_daemons_report_is_the_same_whatever_one_photo_is(
    tmp_path: Path, keys: DevelopmentKeys, wait_until: Until, name: str
) -> None:
    config, told = client_config(tmp_path, keys, rounds.POLICY), list[str]()
    PHOTOS[name](tmp_path / "photos" / "shirt" / "0.png")
    hasty = Cohort(min_merchants=3, max_merchants=5, join_deadline=0.2, upload_deadline=0.2, upload_slot=0)
    plan = seeds.plans()[0].model_copy(update={"cohort": hasty})
    assignment = Assignment(
        block=b"b" * 16, signed_plan=SignedPlan.sign(plan, seeds.OPERATOR), rounds=1, aggregator="localhost:1"
    )
    reports: list[BlockReport] = []

    def answered() -> bool:
        reports.append(daemon._serve(wire.encode(assignment)))
        return reports[-1].code is not ReportCode.LATER

    with Daemon(config, told.append) as daemon:
        wait_until("the photos to be ready", answered)
    assert {report.code for report in reports[:-1]} <= {ReportCode.LATER}
    assert reports[-1].code is ReportCode.LOST, "nobody is at that address"
    for report in reports:
        assert shape(report) == shape(BlockReport(block=b"b" * 16, code=report.code))
