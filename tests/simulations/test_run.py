"""What running an experiment does around the league itself."""

import pytest
import torch

from hanse_simulations import run


def test_what_an_owner_is_told_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    run.tell("alder", "found [red]x[/red] :shoe:")
    assert "alder: found [red]x[/red] :shoe:" in capsys.readouterr().out


def test_torchs_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with run.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
