"""Setting a shop up and asking to be a member: what `hanse-client init`, `join` and `rotate` do.

enrol(card, answers, folder)          # configuration, authority and keys in a new folder
asked = request(config)               # to be endorsed, then entered into the directory
"""

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jinja2 import Environment, StrictUndefined

from hanse_client.config import ClientConfig
from hanse_client.keys import ask, load_identity, load_node, make_keys
from hanse_common import signing
from hanse_common.config import load
from hanse_common.credentials import node_point
from hanse_common.errors import CatalogError, ConfigError
from hanse_common.files import PUBLIC, write_atomically
from hanse_common.league_card import LeagueCard
from hanse_common.membership import Request, SignedRequest

CONFIG = "hanse-client.yaml"
AUTHORITY = "ca.crt"
LABELS = "labels.yaml"
TEMPLATE = "hanse-client.yaml"
NEXT, REPLACED = ".next", ".replaced"
"""What is added to the name of an identity's file: of one that is not listed yet, and of one that no longer is."""

MAX_LABELS = 200


@dataclass(frozen=True)
class Answers:
    """What only the owner knows: photos, name in the league, business, privacy budget, the page's language."""

    photos: Path
    name: str
    entity: str
    epsilon: float
    passphrase: bytes = b""
    language: Literal["en", "zh"] = "en"


def annotated_config(**values: object) -> str:
    """Return the text of an annotated configuration with these `values`, of YAML's own types.

    Every variable of the template must have one.
    """
    text = resources.files("hanse_client").joinpath("templates", TEMPLATE).read_text("utf-8")
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)  # noqa: S701
    # JSON is YAML, too: whatever is in a string, it stays one.
    return environment.from_string(text).render({name: _yaml(value) for name, value in values.items()})


def enrol(card: LeagueCard, answers: Answers, folder: Path) -> ClientConfig:
    """Write configuration, authority, a list of labels to be mapped, and keys; return the configuration.

    Raises `ConfigError` when a configuration or key is there already, or an answer is not valid; nothing is
    overwritten.
    """
    config = folder / CONFIG
    if config.exists():
        raise ConfigError(
            f"{config}: there is a configuration already; move it away, or name another folder."
        )
    if not answers.photos.exists():
        raise ConfigError(f"{answers.photos}: no such folder or file, expected your photos.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        authority = folder / AUTHORITY
        if authority.exists() and authority.read_bytes() != card.authority.encode():
            raise ConfigError(f"{authority}: there is another authority's already; move it away.")
        write_atomically(authority, card.authority.encode(), PUBLIC)
        if not (folder / LABELS).exists():
            write_atomically(folder / LABELS, _labels(answers.photos, card).encode(), PUBLIC)
        text = annotated_config(
            photos=os.path.relpath(answers.photos.resolve(), folder.resolve()),
            labels=LABELS,
            whitening=None,
            recognizer=None,
            name=answers.name,
            entity=answers.entity,
            operator_key=card.operator_key,
            charter=card.charter,
            classes=list(card.taxonomy.classes),
            league=card.league,
            epsilon=answers.epsilon,
            server=card.server,
            authority=AUTHORITY,
            language=answers.language,
        )
        write_atomically(config, text.encode(), PUBLIC)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another folder.") from None
    try:
        settings = load(ClientConfig, config)
        make_keys(settings, answers.passphrase)
    except ConfigError:
        config.unlink()
        raise
    return settings


def request(config: ClientConfig) -> SignedRequest:
    """Return this shop's request to become a member. Raises `ConfigError`."""
    return _request(config, load_identity(config), None)


def rotation(config: ClientConfig) -> SignedRequest:
    """Make the next identity, kept beside the present one, and return the request to replace that by it.

    A next one that is there already is used again. Raises `ConfigError`.
    """
    old = load_identity(config)
    path = _beside(config, NEXT)
    new = signing.load_key(path, ask) if path.exists() else signing.create_key(path, _passphrase(config))
    return _request(config, new, old)


def finish_rotation(config: ClientConfig) -> Path:
    """Use the next identity from now on; return where the old one is. Raises `ConfigError` without a next one."""
    new, old = _beside(config, NEXT), _beside(config, REPLACED)
    if not new.exists():
        raise ConfigError(f"{new}: no such key; begin with hanse-client rotate.")
    if old.exists() and not old.samefile(config.identity_path):
        raise ConfigError(f"{old}: there is an old identity already; move it away first.")
    for add in (".pub", ""):  # the secret key last: with its step all is done
        current, kept, coming = (Path(f"{path}{add}") for path in (config.identity_path, old, new))
        if not coming.exists():  # an earlier call got so far
            continue
        kept.unlink(missing_ok=True)
        kept.hardlink_to(current)  # whatever happens between, each key has a name
        coming.replace(current)
    return old


def _request(config: ClientConfig, key: Ed25519PrivateKey, old: Ed25519PrivateKey | None) -> SignedRequest:
    if config.member is None:
        raise ConfigError("member: missing; expected a section with your shop's name and entity.")
    asked = Request(
        charter=bytes.fromhex(config.league.charter),
        name=config.member.name,
        entity=config.member.entity,
        identity=signing.public_bytes(key),
        node_key=node_point(load_node(config).public_key()),
        replaces=b"" if old is None else signing.public_bytes(old),
    )
    return SignedRequest.make(asked, key, old)


def _beside(config: ClientConfig, add: str) -> Path:
    return config.identity_path.with_name(config.identity_path.name + add)


def _passphrase(config: ClientConfig) -> bytes:
    """Return the passphrase of the present identity, empty where it has none."""
    encrypted = config.identity_path.read_bytes().startswith(b"-----BEGIN ENCRYPTED")
    return ask(config.identity_path) if encrypted else b""


def _labels(photos: Path, card: LeagueCard) -> str:
    """Return a label map that has a line, to be filled in, for each folder that is called like no class."""
    lines = [
        "# Which of your labels means which class of the league. Take away the # and name the class, or null for what",
        "# is to be left out. The league's classes: " + ", ".join(card.taxonomy.classes),
    ]
    if photos.is_dir():
        try:
            found = sorted(child.name for child in photos.iterdir() if child.is_dir())
        except OSError as error:
            raise CatalogError(f"{photos}: cannot be listed ({error.strerror}).") from None
        unknown = [name for name in found if name not in card.taxonomy.classes and not name.startswith(".")]
        lines += [f"# {_yaml(name)}: " for name in unknown[:MAX_LABELS]]
    return "\n".join([*lines, ""])


def _yaml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
