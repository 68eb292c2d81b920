"""How many rows are computed at once: as many as memory has room for, found on synthetic rows, whatever the photos."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hanse_common.errors import RecognizerError
from hanse_common.vision import extraction
from hanse_common.vision.extraction import (
    SCRATCH,
    batch_rows,
    extract,
    fitting_rows,
    full_precision,
    network_rows,
)
from hanse_common.vision.recipe_features import Preprocessing

MIB = 2**20
VIEW = Preprocessing(size=16, channels=1)

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def holding(tried: list[int], mebibytes: float = 1.0, fixed: float = 0.0, device: str = "cpu") -> object:
    """Return a trial that holds so many MiB a row, beside what it holds for any number."""

    def trial(rows: int) -> None:
        tried.append(rows)
        held = torch.empty(int(fixed * MIB), dtype=torch.uint8, device=device)
        block = torch.empty((rows, int(mebibytes * MIB)), dtype=torch.uint8, device=device)
        del held, block

    return trial


def room(mebibytes: float) -> int:
    """Return a limit that so much fits in, in bytes."""
    return int(mebibytes * SCRATCH * MIB)


@pytest.mark.parametrize(
    ("memory", "most", "fixed", "expected"),
    [
        (5, 64, 0, 4),
        (8, 64, 0, 8),
        (7.99, 64, 0, 4),
        (100, 48, 0, 48),
        (40, 48, 0, 32),
        (1, 64, 0, 1),
        (13, 64, 5, 8),
    ],
)
def test_as_many_rows_as_fit(memory: float, most: int, fixed: float, expected: int) -> None:
    tried: list[int] = []
    assert fitting_rows(holding(tried, fixed=fixed), most, "cpu", room(memory)) == expected
    assert max(tried) <= memory, "what may not fit is not tried"


def test_what_is_held_at_one_time_counts_and_not_what_is_made_in_turn() -> None:
    def in_turn(rows: int) -> None:
        for _ in range(10):
            torch.ones((rows, MIB), dtype=torch.uint8)

    def together(rows: int) -> None:
        _ = [torch.ones((rows, MIB), dtype=torch.uint8) for _ in range(10)]

    def views_and_in_place(rows: int) -> None:
        block = torch.ones((rows, MIB), dtype=torch.uint8)
        _ = [block[:, :n].add_(1) for n in range(1, 10)]

    assert fitting_rows(in_turn, 64, "cpu", room(16)) == 16
    assert fitting_rows(together, 64, "cpu", room(160)) == 16
    assert fitting_rows(views_and_in_place, 64, "cpu", room(16)) == 16


def test_what_grows_faster_than_its_rows_is_noticed() -> None:
    def square(rows: int) -> None:
        torch.empty((rows * rows, MIB), dtype=torch.uint8)

    assert fitting_rows(square, 64, "cpu", room(16)) == 4
    assert fitting_rows(square, 64, "cpu", room(15)) == 2, "four were expected to fit, and did not"


def test_what_was_held_before_does_not_count() -> None:
    catalog = torch.zeros((64, MIB), dtype=torch.uint8)

    def trial(rows: int) -> None:
        catalog[:rows].add_(1)
        catalog.add_(1)
        torch.empty((rows, MIB), dtype=torch.uint8)

    assert fitting_rows(trial, 64, "cpu", room(16)) == 16


def test_a_backward_passs_tensors_count() -> None:
    """Against torch's own profiler of allocations."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))

    def trial(rows: int) -> None:
        loss = net(torch.ones(rows, 3, 32, 32)).sum()
        torch.autograd.grad(loss, list(net.parameters()))

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        trial(8)
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak < extraction._peak_bytes(trial, 8, "cpu") < 1.6 * peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_takes_no_more_than_was_reckoned() -> None:
    script = """
import torch
from pathlib import Path
from hanse_common.vision import extraction

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

net = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(4)))
def trial(rows):
    out = net(torch.ones(1500 * rows, 1000)).sum()
    torch.autograd.grad(out, list(net.parameters()))
trial(1)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
trial(8)
print(resident("VmHWM") - before, extraction._peak_bytes(trial, 8, "cpu"))
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True)
    taken, reckoned = map(int, done.stdout.split())
    assert 0.5 * reckoned < taken < reckoned + 16 * MIB


def test_running_out_of_memory_gives_fewer_rows(caplog: pytest.LogCaptureFixture) -> None:
    def trial(rows: int) -> None:
        torch.empty(2**58 if rows >= 8 else 1)  # more than any machine has

    assert fitting_rows(trial, 64, "cpu", 2**62) == 4
    assert "Memory ran out at 8 photos at once; going on with 4." in caplog.text

    def on_a_gpu(rows: int) -> None:
        if rows >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fitting_rows(on_a_gpu, 64, "cpu") == 2


def test_a_trial_that_fails_otherwise_fails() -> None:
    def broken(rows: int) -> None:
        if rows == 2:
            raise RuntimeError("shapes do not fit")

    def none_at_all(rows: int) -> None:
        torch.empty(2**58)

    with pytest.raises(RuntimeError, match="shapes"):
        fitting_rows(broken, 64, "cpu")
    with pytest.raises(RuntimeError, match="allocate"):
        fitting_rows(none_at_all, 64, "cpu")


def test_a_row_that_does_not_fit_is_refused_where_there_is_a_limit_of_the_owners() -> None:
    with pytest.raises(RecognizerError, match=r"takes 1875 MB here, found 1000 MB allowed"):
        fitting_rows(holding([], mebibytes=1500), 64, "cpu", 1000 * MIB)
    assert fitting_rows(holding([], mebibytes=2000), 64, "cpu") == 1


# Networks


class Wide(nn.Module):
    """Holds a MiB for each row, and tells how many rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.heights: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.heights.append(len(x))
        return x.flatten(1)[:, :5] + torch.zeros((len(x), MIB // 4))[:, :5]


def photographs(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 32, 40])
def test_a_network_sees_what_fits_and_always_as_many(count: int) -> None:
    network = Wide()
    rows = network_rows(network, (VIEW,), memory=room(24))
    assert rows == 16
    tried = len(network.heights)
    found = extract(network, photographs(count), (VIEW,), memory=room(24))
    assert found.shape == (count, 5)
    assert network.heights[tried:] == [16] * max(1, -(-count // 16)), (
        "never another height, no more trials or batches"
    )
    assert np.array_equal(found, extract(Wide(), photographs(count), (VIEW,)))


def test_without_a_limit_the_recipe_alone_tells_on_a_cpu() -> None:
    network = Wide()
    assert network_rows(network, (VIEW,)) == batch_rows((VIEW,)) == 64
    assert network.heights == [64]
    assert network_rows(None, (VIEW,), memory=1) == 64


def test_gpus_compute_in_full_precision() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = False
    network_rows(Wide(), (VIEW,))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


class TestGpu:
    """What only a GPU can show."""

    pytestmark = gpu

    def test_the_allocators_peak_counts(self) -> None:
        tried: list[int] = []
        assert fitting_rows(holding(tried, 4, device="cuda"), 64, "cuda", 33 * MIB) == 8
        assert max(tried) == 8
        filled = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")  # as by a catalog
        assert fitting_rows(holding([], 4, device="cuda"), 64, "cuda", 33 * MIB) == 8
        del filled

    def test_the_bound_is_a_share_of_what_the_process_may_take(self) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(0.5, 0)
        try:
            assert extraction._default_bytes("cuda") == int(0.5 * extraction.GPU_SHARE * total)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)

    def test_running_out_gives_fewer_rows(self, caplog: pytest.LogCaptureFixture) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(512 * MIB / total, 0)
        try:
            assert 1 <= fitting_rows(holding([], 64, device="cuda"), 64, "cuda", 2**62) < 8
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)
        assert "Memory ran out" in caplog.text

    def test_a_photos_bits_do_not_depend_on_its_neighbours(self) -> None:
        full_precision()
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)).cuda()
        photos = photographs(300)
        whole = extract(network, photos, (VIEW,), "cuda")
        for which in ([0], [299, 3], list(range(100, 290))):
            found = extract(network, [photos[i] for i in which], (VIEW,), "cuda")
            assert found.tobytes() == whole[which].tobytes()
