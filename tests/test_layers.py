"""Who may import what, read from the source: the architecture's walls."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "hanse_common": ROOT / "common" / "hanse_common",
    "hanse_client": ROOT / "client" / "hanse_client",
    "hanse_server": ROOT / "server" / "hanse_server",
    "hanse_simulations": ROOT / "simulations" / "hanse_simulations",
}
MAY_IMPORT = {
    "hanse_common": set(),
    "hanse_client": {"hanse_common"},
    "hanse_server": {"hanse_common"},
    "hanse_simulations": {"hanse_common", "hanse_client", "hanse_server"},
}
TORCH_IS_FOR = (
    "hanse_client/compare.py",
    "hanse_client/cuda_sums.py",
    "hanse_client/exact_sums.py",
    "hanse_client/examples.py",
    "hanse_client/head_gradients.py",
    "hanse_client/holdout_sums.py",
    "hanse_common/vision/",
    "hanse_client/embeddings.py",
    "hanse_client/gradients.py",
    "hanse_client/layer_gradients.py",
    "hanse_client/recognition/engine.py",
    "hanse_client/resources.py",
    "hanse_client/suspects.py",
    "hanse_client/training.py",
    "hanse_server/evaluation.py",
    "hanse_simulations/",
)
# The server, and the plan it signs, must work where torch is not installed.
TORCHLESS_VISION = (
    "recipe.py",
    "recipe_features.py",
    "recipe_model.py",
    "taxonomy.py",
    "photo.py",
    "metrics.py",
)
PURE = ("hanse_common/secagg/", "hanse_common/privacy/")
FORBIDDEN_IN_PURE = {
    "flwr", "grpc", "torch", "torchvision", "os", "io", "pathlib", "tempfile", "time", "datetime", "random",
    "secrets", "socket", "sqlite3",
}  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    return [
        (f"{package}/{path.relative_to(folder).as_posix()}", path)
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    ]


def imports(path: Path, *, only_top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if only_top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.partition(".")[0]


EVERY_MODULE = pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value)[-40:])


@EVERY_MODULE
def test_packages_import_only_what_their_layer_may(name: str, path: Path) -> None:
    package = top(name.replace("/", "."))
    ours = {top(module) for module in imports(path)} & PACKAGES.keys()
    assert ours <= MAY_IMPORT[package] | {package}


@EVERY_MODULE
def test_flwr_and_grpc_stay_in_their_seams(name: str, path: Path) -> None:
    found = {top(module) for module in imports(path)}
    if not Path(name).name.startswith("flower"):
        assert "flwr" not in found
    if Path(name).name not in ("stream.py", "recognition_pb2_grpc.py"):  # the latter is generated
        assert "grpc" not in found


@EVERY_MODULE
def test_torch_is_imported_only_where_numbers_are_learned(name: str, path: Path) -> None:
    allowed = name.startswith(TORCH_IS_FOR) and Path(name).name not in TORCHLESS_VISION
    if not allowed:
        assert {top(module) for module in imports(path)}.isdisjoint({"torch", "torchvision", "opacus"})


@EVERY_MODULE
def test_protocol_and_privacy_know_no_files_clocks_or_transport(name: str, path: Path) -> None:
    if name.startswith(PURE):
        assert {top(module) for module in imports(path)}.isdisjoint(FORBIDDEN_IN_PURE)


@EVERY_MODULE
def test_protective_code_uses_no_default_generator(name: str, path: Path) -> None:
    if name.startswith("hanse_simulations/"):
        return
    source = path.read_text(encoding="utf-8")
    for generator in ("np.random.normal", "np.random.default_rng", "torch.randn(", "import random"):
        assert generator not in source or "vision/" in name


@EVERY_MODULE
def test_no_assert_and_no_pickle_outside_tests(name: str, path: Path) -> None:
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    assert "pickle" not in {top(module) for module in imports(path)}


def test_the_walls_are_not_vacuous() -> None:
    names = [name for name, _ in modules()]
    assert any(name.startswith(PURE) for name in names)
    assert "hanse_server/coordinator.py" in names
    assert "hanse_client/participant.py" in names
