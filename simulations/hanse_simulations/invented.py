"""Invented shops: folders as merchants have them, with real product photos, to try a league out.

    write_shops(load(ServerConfig, path), keys=Path("keys"), folder=Path("shops"), photos=2000, server=None)

The merchants are those for whom `hanse-server keys` made keys. Their photos are Fashion-MNIST's, dealt out with skewed
classes, no photo to two of them. The demo writes its shops from the same pieces.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from hanse_common import signing, wire
from hanse_common.charter import CharterFile
from hanse_common.errors import ConfigError
from hanse_common.files import read_bounded
from hanse_server.config import PlanSettings, ServerConfig
from hanse_simulations import datasets, partition
from hanse_simulations.console import bar
from hanse_simulations.seeded import seed_for
from hanse_simulations.shops import require_classes

HOLDOUT_FRACTION = 0.1
SKEW = 1.0
"""Alpha of the Dirichlet distribution of each shop's classes."""

PHOTOS_TO_TRY = "photos-to-try"
"""The folder, beside the shops, with a photo of each class that no shop has."""


def write_shops(
    config: ServerConfig, keys: Path, folder: Path, photos: int, server: str | None = None
) -> dict[str, Path]:
    """Write a shop with so many `photos` for each merchant in `keys`; return their configurations by name.

    `server` is HOST:PORT of the nodes' entrance; by default that of `config`. Raises `ConfigError` when `folder` is
    there already, `keys` has no merchants, or the league's classes are not the dataset's; `DatasetUnavailable`.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: there is something already; move it away or name another.")
    names = sorted(path.parent.name for path in keys.glob("*/identity.key"))
    if not names:
        raise ConfigError(
            f"{keys}: found no merchants' keys; make some: hanse-server keys {keys} --merchant alder …"
        )
    if server is None:
        if config.service is None:
            raise ConfigError("--server: missing, as the configuration has no section service.")
        server = f"{config.service.aggregator.address.rpartition(':')[0]}:{config.service.fleet.port}"
    settings = settings_of(config, keys)
    require_classes(config.plan.taxonomy)
    source = datasets.fashion_mnist(datasets.default_folder())
    rng = np.random.default_rng(seed_for(0, "partition"))
    dealt = partition.dirichlet(source.train_labels, len(names), photos, SKEW, rng)
    configs = {}
    with bar("writing photos", len(names)) as shown:
        for number, (name, indices) in enumerate(zip(names, dealt, strict=True), start=1):
            shop, own = folder / name, (keys / name).resolve()
            write_photos(shop, source, indices)
            connection = {
                "server": server,
                "authority": str((keys / "ca.crt").resolve()),
                "identity": str(own / "identity.key"),
                "node_key": str(own / "node.key"),
            }
            configs[name] = write_config(shop, settings | {"connection": connection})
            shown.update(number, text=f"{len(indices)} photos for {name}")
    for code, name in enumerate(datasets.CLASSES):
        write_photo(source, code, folder / PHOTOS_TO_TRY / f"{name}.png")
    return configs


def settings_of(config: ServerConfig, keys: Path) -> dict[str, Any]:
    """Return what a shop's owner has in `hanse-client.yaml` who allows all that `config` plans, and no more."""
    evaluation = [] if config.evaluation is None else [config.evaluation.privacy]
    privacy = [config.plan.privacy, *evaluation]
    operator = signing.load_public(config.signing_key.with_name(f"{config.signing_key.name}.pub"))
    charter = read_bounded(
        keys / "charter.hanse", wire.MAX_DOCUMENT_BYTES, "the league's charter", ConfigError
    )
    return client_settings(
        config.plan,
        epsilon=math.ceil(sum(one.epsilon for one in privacy)),
        delta=sum(one.delta for one in privacy),
        operator_key=operator,
        charter=wire.decode(CharterFile, charter).charters[0].read().digest,
    )


def client_settings(
    plan: PlanSettings, *, epsilon: float, delta: float, operator_key: bytes, charter: bytes
) -> dict[str, Any]:
    """Return a shop's settings but for its connection: whom it believes, and what it allows."""
    return {
        "photos": "photos",
        "state": "state",
        "holdout_fraction": HOLDOUT_FRACTION,
        "league": {
            "operator_key": operator_key.hex(),
            "charter": charter.hex(),
            "taxonomy": {"classes": list(plan.taxonomy.classes)},
        },
        "policy": {
            "league": plan.league,
            "epsilon": float(epsilon),
            "delta": delta,
            "unit": plan.training.unit,
            "minimum_cohort": plan.cohort.min_merchants,
        },
    }


def write_photos(
    shop: Path, source: datasets.FashionMnist, indices: partition.Share, stamp: str = ""
) -> None:
    """Write a shop's photos to `shop`/photos, in a folder for each class, unless those of `stamp` are there."""
    marker = shop / "photos-are-complete"
    if marker.exists() and marker.read_text() == stamp:
        return
    shutil.rmtree(shop / "photos", ignore_errors=True)  # of another experiment
    partition.write_shop(shop / "photos", source.train_images, source.train_labels, indices, datasets.CLASSES)
    marker.write_text(stamp)


def write_config(shop: Path, settings: Mapping[str, Any]) -> Path:
    """Write a shop's `hanse-client.yaml` and return it."""
    path = shop / "hanse-client.yaml"
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
    return path


def write_photo(source: datasets.FashionMnist, code: int, path: Path) -> None:
    """Write the first public test photo of a class, which no shop has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(source.test_images[int(np.flatnonzero(source.test_labels == code)[0])]).save(path)
