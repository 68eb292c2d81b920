"""The benchmark of exported recognizers, in a tiny size: its figures are there, and differ where the files do."""

import pytest
import torch

from hanse_common.vision import edge as export
from hanse_simulations.benchmarks import edge


@pytest.mark.slow
def test_the_benchmark_says_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    figures = edge.run(size=edge.TINY)
    assert torch.get_num_threads() == threads
    edge.show(figures)
    (name,) = edge.TINY.recipes
    assert name in capsys.readouterr().out
    assert figures["difference"][name] < export.TOLERANCE
    assert figures["agreement"][name]["float32"] == 1.0
    assert 0.6 <= figures["agreement"][name]["int8"] <= 1.0
    assert figures["megabytes"][name]["int8"] < 0.35 * figures["megabytes"][name]["float32"]
    assert set(figures["milliseconds"][name]) == set(edge.WAYS)
    assert figures["float32_over_torch"][name] > 0 and figures["int8_over_torch"][name] > 0
