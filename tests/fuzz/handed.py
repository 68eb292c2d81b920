"""Parsers of files: what an operator hands out, and the photos that a merchant's suppliers send."""

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from hanse_common import credentials
from hanse_common.errors import ConfigError, PhotoError, RecognizerError

from . import mutate, seeds
from .target import Parse, Target, plain, require

# -- files --------------------------------------------------------------------------------------------------------


def _recognizer(folder: Path) -> Any:
    from hanse_common.vision.recognizer import Recognizer

    vector = np.linspace(-1, 1, seeds.SMALL.dimension(3), dtype=np.float32)
    made = Recognizer.create(
        seeds.SMALL,
        seeds.TAXONOMY,
        vector,
        created=seeds.CREATED,
        metrics={"accuracy": 0.5},
        epsilon=1.0,
        delta=1e-6,
    )
    made.save(folder)
    return made


@contextmanager
def _card(folder: Path) -> Iterator[Parse]:
    from hanse_common.vision.recognizer import Card, Recognizer

    _recognizer(folder)

    def parse(data: bytes) -> None:
        (folder / "card.json").write_bytes(_with_its_digest(data))
        card = Recognizer.load(folder).card
        require(Card.model_validate_json(card.to_bytes()) == card, "a card that is read otherwise when saved")

    yield parse


def _with_its_digest(card: bytes) -> bytes:
    """Return the card with its recipe's own digest, as whoever made a hostile one would see to."""
    try:
        fields = json.loads(card)
        recipe = seeds.Recipe.model_validate_json(json.dumps(fields["recipe"]))
        named = fields["recipe_digest"]
        return card.replace(named.encode(), recipe.digest().hex().encode())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ValidationError):
        return card


def _card_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [_recognizer(Path(folder)).card.to_bytes()]


@contextmanager
def _parameters(folder: Path) -> Iterator[Parse]:
    from hanse_common.vision.recognizer import Recognizer

    made = _recognizer(folder)
    named, card = made.card.model_digest.encode(), made.card.to_bytes()

    def parse(data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        (folder / "card.json").write_bytes(card.replace(named, hashlib.sha256(data).hexdigest().encode()))
        vector = Recognizer.load(folder).vector
        require(
            vector.shape == made.vector.shape and np.isfinite(vector).all(), "parameters that make no sense"
        )

    yield parse


def _parameters_seeds() -> list[bytes]:
    weight, bias = np.ones((3, 6), np.float32), np.zeros(3, np.float32)
    return [seeds.tensors(**{"linear.weight": weight, "linear.bias": bias})]


def _whitening(data: bytes) -> None:
    from hanse_common.vision.whitening import Whitening

    found = Whitening.from_bytes(data, hashlib.sha256(data).hexdigest(), 5, 3)
    require(found.mean.shape == (5,) and np.isfinite(found.matrix).all(), "a whitening that makes no sense")


def _centre(data: bytes) -> None:
    from hanse_common.vision.centring import Centre

    found = Centre.from_bytes(data, 4)
    require(
        np.isfinite(found.mean).all() and 0 <= found.epsilon < float("inf"), "a centre that makes no sense"
    )


def _photo(data: bytes) -> None:
    from hanse_common.vision import photo

    image = photo.decode(data, photo.PhotoLimits(max_bytes=mutate.MAX_BYTES, max_pixels=1 << 18))
    require(image.mode == "RGB" and 0 < image.width * image.height <= 1 << 18, "no picture within its limits")


@contextmanager
def _config(folder: Path) -> Iterator[Parse]:
    from hanse_client.config import ClientConfig
    from hanse_common.config import load

    path = folder / "hanse-client.yaml"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        load(ClientConfig, path)

    yield parse


@contextmanager
def _league_card(folder: Path) -> Iterator[Parse]:
    from hanse_common.config import load
    from hanse_common.league_card import LeagueCard

    path = folder / "league.yaml"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        card = load(LeagueCard, path)
        path.write_text(card.to_yaml(), "utf-8")
        require(load(LeagueCard, path) == card, "a card that is read otherwise when saved")
        require(len(card.words().split()) == 12, "words that are not twelve")

    yield parse


@contextmanager
def _labels(folder: Path) -> Iterator[Parse]:
    from hanse_common.vision.taxonomy import LabelMap

    path = folder / "labels.yaml"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        codes = {LabelMap.load(path, seeds.TAXONOMY).encode(name) for name in ("shirt", "Sale", "x")}
        require(codes <= {None, 0, 1, 2}, "a class that there is not")

    yield parse


def _certificates() -> list[bytes]:
    from hanse_server.development_keys import make_keys

    with tempfile.TemporaryDirectory() as folder:
        keys = make_keys(Path(folder) / "keys", ("localhost", "127.0.0.1"), ())
        return [keys.certificate.read_bytes(), keys.certificate.read_bytes() + keys.authority.read_bytes()]


def _der_of(pem: bytes) -> bytes:
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def _certificate_in_der(data: bytes) -> None:
    credentials.fingerprint(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(data) + b"-----END CERTIFICATE-----\n"
    )


def _whitening_seeds() -> list[bytes]:
    return [seeds.tensors(mean=np.ones(5, np.float32), matrix=np.ones((5, 3), np.float32))]


def _centre_seeds() -> list[bytes]:
    return [seeds.tensors(mean=np.ones(4, np.float32), cost=np.array([0.1, 1e-6]))]


def _certificate_seeds_in_der() -> list[bytes]:
    return [_der_of(pem) for pem in _certificates()]


def targets() -> list[Target]:
    """Return the targets of this module."""
    yaml, torn, flat = mutate.text, mutate.safetensors, mutate.BYTES
    damaged, wrong = (RecognizerError,), (ConfigError,)
    return [
        Target("card", 15_000, mutate.json_text, _card_seeds, _card, damaged),
        Target("parameters", 15_000, torn, _parameters_seeds, _parameters, damaged),
        Target("whitening", 30_000, torn, _whitening_seeds, plain(_whitening), damaged),
        Target("centre", 30_000, torn, _centre_seeds, plain(_centre), damaged),
        Target("photo", 50_000, mutate.picture, seeds.pictures, plain(_photo), (PhotoError,)),
        Target("config", 5_000, yaml, lambda: [seeds.CONFIG], _config, wrong),
        Target("league-card", 5_000, yaml, lambda: [seeds.LEAGUE_CARD], _league_card, wrong),
        Target("labels", 8_000, yaml, lambda: [seeds.LABELS], _labels, wrong),
        Target("certificate", 30_000, yaml, _certificates, plain(credentials.fingerprint), wrong),
        Target("certificate-der", 30_000, flat, _certificate_seeds_in_der, plain(_certificate_in_der), wrong),
    ]
