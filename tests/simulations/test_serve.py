"""The benchmark of serving, in a tiny size: its figures are there, and its oracle is not the index itself."""

import os

import numpy as np
import pytest

from hanse_client.gallery.index import VectorIndex
from hanse_simulations.benchmarks import serve


@pytest.mark.slow
def test_the_benchmark_says_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    figures = serve.run(quick=False, tiny=True)
    if before is not None:
        assert os.sched_getaffinity(0) == before
    serve.show(figures)
    assert "backbone's own forward pass" in capsys.readouterr().out
    assert set(figures["index"]) == {str(count) for count in serve.SIZES["tiny"]}
    for key in (
        "overhead",
        "overhead_over_fused",
        "overhead_with_decoding",
        "fused_over_backbone",
        "photos_per_second",
    ):
        assert figures[key] > 0
    for key in ("classify_ms", "search_ms"):
        assert 0 < figures[key]["p50"] <= figures[key]["p95"]
    assert figures["recall_at_10_vs_exact"] == 1.0
    for one in figures["index"].values():
        assert one["bytes_per_product"] > 4 * serve.DIMENSION and not one["approximate"]

    (gallery,) = figures["gallery"].values()
    assert all(
        0 < gallery[key]["p50"] <= gallery[key]["p95"] for key in ("photo_ms", "category_ms", "words_ms")
    )
    assert gallery["file_bytes_per_product"] > 2 * 4 * serve.DIMENSION  # a vector and a prototype each
    assert gallery["first_words_seconds"] > 0


def test_recall_falls_when_the_index_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    search = VectorIndex.search

    def misses_the_nearest(index: VectorIndex, *arguments: object) -> object:
        found, similarities = search(index, *arguments)  # type: ignore[arg-type]
        return np.where(np.arange(found.shape[1]) == 0, -1, found), similarities

    monkeypatch.setattr(VectorIndex, "search", misses_the_nearest)
    assert serve._index(300, 20)["recall_at_10_vs_exact"] == pytest.approx(0.9)
