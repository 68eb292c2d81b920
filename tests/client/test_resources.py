"""What Hanse takes of the machine is what its owner allows, and work that can wait gives way."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from hanse_client.examples import resolve_device
from hanse_client.resources import OtherWork, Resources, apply
from hanse_common.config import Section, load
from hanse_common.errors import ConfigError

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class File(Section):
    """A file with the section."""

    resources: Resources = Resources()


def written(tmp_path: Path, text: str) -> Resources:
    (tmp_path / "shop.yaml").write_text(text)
    return load(File, tmp_path / "shop.yaml").resources


# The section


def test_the_section_and_its_defaults(tmp_path: Path) -> None:
    text = "resources: {threads: 2, niceness: 0, memory_megabytes: 1024, gpu_memory: 0.5}"
    found = written(tmp_path, text)
    assert found == Resources(threads=2, niceness=0, memory_megabytes=1024, gpu_memory=0.5)
    assert found.batch_bytes("cpu") == 512 * 2**20
    assert found.batch_bytes("cuda:0") is None
    assert Resources().batch_bytes("cpu") is None
    assert (Resources().threads, Resources().niceness, Resources().gpu_memory) == (None, 10, 1.0)


@pytest.mark.parametrize(
    "line",
    [
        "threads: 0",
        "niceness: -1",
        "niceness: 20",
        "memory_megabytes: 511",
        "gpu_memory: 0",
        "gpu_memory: 1.1",
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"shop.yaml:1: resources.{line.partition(':')[0]}: found .*, expected"
    ):
        written(tmp_path, f"resources: {{{line}}}")


# Devices


def test_a_gpu_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
    assert [resolve_device(name) for name in ("auto", "cuda", "cuda:0", "cuda:1", "cpu")] == [
        *("cuda", "cuda", "cuda:0", "cuda:1", "cpu")
    ]
    expected = r"found cuda:2, but torch sees cuda:0 \(GPU number 0\), cuda:1 \(GPU number 1\) here; choose"
    with pytest.raises(ConfigError, match=expected):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match="found cuda:0, but torch sees no CUDA device here; choose auto or cpu"
    ):
        resolve_device("cuda:0")
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "cuda:0\n", "mps"])
def test_other_names_are_no_devices(name: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:INDEX"):
        resolve_device(name)


# Applied


REPORT = """
import os, threading
import numpy, psutil, torch
from hanse_client.resources import Resources, apply

def report():
    tasks = os.listdir("/proc/self/task")
    nice = sorted({os.getpriority(os.PRIO_PROCESS, int(task)) for task in tasks})
    print(len(tasks) > 1, torch.get_num_threads(), *nice, int(psutil.Process().ionice().ioclass))

torch.ones(300, 300) @ torch.ones(300, 300)
for niceness in (0, 7, 3):
    apply(Resources(threads=1, niceness=niceness), "cpu")
    report()
thread = threading.Thread(target=report)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_threads_step_back_and_none_pushes_forward() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        preexec_fn=lambda: os.setpriority(os.PRIO_PROCESS, 0, 2),
    )
    nicer = "True 1 7 3"  # several threads, one computes, niceness 7, the disk when idle
    assert done.stdout.splitlines() == ["True 1 2 0", nicer, nicer, nicer]


# Others' work


def burn(seconds: float) -> None:
    """Keep all cores busy with this process's own work."""
    until = time.monotonic() + seconds

    def hash_on() -> None:
        while time.monotonic() < until:
            hashlib.sha256(bytes(2**24))

    threads = [threading.Thread(target=hash_on) for _ in range(2 * (os.cpu_count() or 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ones_own_work_is_not_others() -> None:
    """Own and others' time together are no more than there is: own time must not be in others'."""
    others, process, cores = OtherWork(), psutil.Process(), os.cpu_count() or 1
    (began, before), own = others._look(), process.cpu_times()
    burn(0.6)
    (ended, after), now = others._look(), process.cpu_times()
    spent = now.user + now.system - own.user - own.system
    assert spent > 0
    assert after - before + spent <= 1.1 * cores * (ended - began) + 0.05


def test_others_work_makes_the_machine_busy() -> None:
    others = OtherWork(bound=0.4, look_seconds=0.5)
    words = [sys.executable, "-c", "while True: pass"]
    burning = [subprocess.Popen(words) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.6)
        assert others.busy()
        assert others.busy(), "until the next look is over"
    finally:
        for process in burning:
            process.kill()
            process.wait()


def test_below_the_bound_the_machine_is_free() -> None:
    others = OtherWork(bound=1.5, look_seconds=0.01)  # more than all cores
    assert others.busy(), "before the first look is over"
    others.give_way(lambda: False)
    assert not others.busy()


def test_waiting_ends_when_told_and_in_any_case() -> None:
    others = OtherWork(bound=-1.0, look_seconds=0.01)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    others.give_way(stop)
    assert len(asked) == 4
    others.give_way(lambda: False, longest=0.05)
    assert others.busy()


class TestGpu:
    """What only a GPU can show."""

    pytestmark = gpu

    def test_by_index(self) -> None:
        assert resolve_device("auto") == resolve_device("cuda") == "cuda"
        assert torch.ones(3, device=resolve_device("cuda:0")).sum().item() == 3
        with pytest.raises(ConfigError, match=r"found cuda:99, but torch sees cuda:0 \(.+\)"):
            resolve_device("cuda:99")

    @pytest.mark.parametrize("device", ["cuda", "cuda:0"])
    def test_no_more_than_its_part_of_the_memory(self, device: str) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        try:
            apply(Resources(niceness=0, gpu_memory=0.1), device)
            assert torch.cuda.get_per_process_memory_fraction(0) == pytest.approx(0.1)
            held = torch.empty(int(0.05 * total), dtype=torch.uint8, device=device)
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(int(0.06 * total), dtype=torch.uint8, device=device)
            del held
        finally:
            apply(Resources(niceness=0), device)
        assert not torch.backends.cudnn.allow_tf32
