"""`hanse-sim shops`: what it writes is what merchants' daemons need, and no photo is in two shops."""

import json
from pathlib import Path

import pytest

from hanse_client.config import ClientConfig
from hanse_client.shop import Shop
from hanse_common import signing
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_server.config import ServerConfig
from hanse_server.development_keys import DevelopmentKeys, make_keys
from hanse_simulations.datasets import CLASSES
from hanse_simulations.invented import PHOTOS_TO_TRY, write_shops

MERCHANTS = ("alder", "birch", "cedar")


@pytest.fixture
def keys(tmp_path: Path) -> DevelopmentKeys:
    return make_keys(tmp_path / "keys", ("localhost",), MERCHANTS, "shoes")


@pytest.fixture
def config(tmp_path: Path, keys: DevelopmentKeys) -> ServerConfig:
    signing.create_key(tmp_path / "operator.key")
    tree = {
        "signing_key": "operator.key",
        "plan": {
            "league": "shoes",
            "taxonomy": {"classes": CLASSES},
            "recipe": {"preprocessing": {"size": 8, "channels": 1}},
            "training": {
                "mode": "distributed",
                "rounds": 2,
                "sampling_rate": 0.5,
                "expected_batch": 30,
                "clipping_norm": 1,
            },
            "privacy": {"epsilon": 2.5, "delta": 8e-6},
            "cohort": {"min_merchants": 3, "max_merchants": 3},
        },
        "evaluation": {"privacy": {"epsilon": 1, "delta": 1e-6}, "holdout": 10},
    }
    return ServerConfig.model_validate_json(json.dumps(tree), context={"folder": tmp_path})


def test_shops_have_photos_and_pin_what_the_operator_has(
    config: ServerConfig, keys: DevelopmentKeys, tmp_path: Path
) -> None:
    written = write_shops(config, tmp_path / "keys", tmp_path / "shops", 30, "localhost:9")
    assert tuple(written) == MERCHANTS
    seen: set[bytes] = set()
    for name, path in written.items():
        shop = load(ClientConfig, path)
        assert shop.league.charter == keys.pinned
        assert bytes.fromhex(shop.league.operator_key) == signing.load_public(tmp_path / "operator.key.pub")
        assert (shop.policy.epsilon, shop.policy.delta) == (4.0, pytest.approx(9e-6))
        assert shop.connection is not None
        assert (shop.connection.server, shop.connection.authority) == ("localhost:9", keys.authority)
        assert shop.connection.identity == keys.merchants[name] / "identity.key"
        assert shop.connection.node_key == keys.merchants[name] / "node.key"
        records = Shop(shop).catalog().records
        assert len(records) == 30
        digests = {record.digest for record in records}
        assert not digests & seen
        seen |= digests
    assert {path.stem for path in (tmp_path / "shops" / PHOTOS_TO_TRY).iterdir()} == set(CLASSES)


def test_what_cannot_be_written_is_named(config: ServerConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is something already"):
        write_shops(config, tmp_path / "keys", tmp_path, 30, "localhost:9")
    with pytest.raises(ConfigError, match="found no merchants' keys; make some: hanse-server keys"):
        write_shops(config, tmp_path / "none", tmp_path / "shops", 30, "localhost:9")
    with pytest.raises(ConfigError, match="--server: missing"):
        write_shops(config, tmp_path / "keys", tmp_path / "shops", 30)
    assert not (tmp_path / "shops").exists()
