"""What tests say in a fresh clone, before anything was fetched."""

from pathlib import Path

from .conftest import missing_data


def test_without_the_photos_it_is_said_how_to_fetch_them(tmp_path: Path) -> None:
    assert "run `make install`" in missing_data(tmp_path / "fashion-mnist")
    names = [f"{part}-ubyte.gz" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3")]
    for name in (*names, "t10k-labels-idx1-ubyte.gz"):
        assert name in missing_data(tmp_path)
        (tmp_path / name).touch()
    assert missing_data(tmp_path) == ""
