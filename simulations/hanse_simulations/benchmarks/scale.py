"""How the server's work grows with the merchants and with the model: CPU a message, memory, and time of a round.

    figures = run(quick=True)

Each row is a fresh server on loopback with that many light merchants in one other process, over TLS, for a few masked
rounds of that many numbers. A message is a question and its answer, of which a round has three for each merchant; all
of the server's CPU is divided by them, what checks signatures and openings and takes masks out included. A round's
wall time has the merchants' own work in it, which one process does for all.

Ratios and slopes to look at: `kib_a_merchant`, the peak of memory by n for a head update, and for a larger one, where
it must be the same but for what a connection holds; `bytes_a_number`, the peak by d; and the knee, the first n
at which CPU a message, or a round's time for each merchant, is over `KNEE` times its least at fewer merchants.
"""

from typing import Any

import numpy as np
from rich.table import Table

from hanse_simulations.benchmarks.memory import measured_apart
from hanse_simulations.console import bar, console

HEAD_DIMENSION = 13_000
LARGE_DIMENSION = 250_000

KNEE = 1.5

ROUNDS = 3


def run(quick: bool) -> dict[str, Any]:
    """Measure and return the figures."""
    heads = (5, 10, 20) if quick else (10, 25, 50, 100, 200)
    larges = (5, 10) if quick else (10, 20, 40, 80)
    fixed = 10 if quick else 20
    dimensions = (
        (HEAD_DIMENSION, LARGE_DIMENSION, 1_000_000) if quick else (HEAD_DIMENSION, 500_000, 2_000_000)
    )
    cases = [(n, HEAD_DIMENSION) for n in heads] + [(n, LARGE_DIMENSION) for n in larges]
    cases += [(fixed, d) for d in dimensions]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    with bar("servers", len(set(cases))) as progress:
        for merchants, dimension in dict.fromkeys(cases):
            module = "hanse_simulations.benchmarks.scale_server"
            found[merchants, dimension] = measured_apart(module, merchants, dimension, ROUNDS)
            progress.update(len(found), text=f"{merchants} merchants, {dimension:,} numbers")
    head = [found[n, HEAD_DIMENSION] for n in heads]
    large = [found[n, LARGE_DIMENSION] for n in larges]
    return {
        "rows": list(found.values()),
        "merchants": heads[-1],
        "cpu_ms_per_message": head[-1]["cpu_ms_per_message"],
        "setup_cpu_ms_per_message": head[-1]["setup_cpu_ms_per_message"],
        "kib_a_merchant": 1024 * _slope(head, "merchants"),
        "kib_a_merchant_large": 1024 * _slope(large, "merchants"),
        "bytes_a_number": (1 << 20) * _slope([found[fixed, d] for d in dimensions], "dimension"),
        "knees": knees(head),
    }


def _slope(rows: list[dict[str, Any]], against: str) -> float:
    """Return the least-squares slope of the peak of memory, in MiB, against a column."""
    return float(np.polyfit([row[against] for row in rows], [row["peak_mib"] for row in rows], 1)[0])


def knees(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """Return, of each figure that should not grow with n, the first n at which it does; None where it never does.

    `rows` are by growing n. The figures are CPU a message in a round and in a set-up, and a round's seconds over n.
    """
    figures = {
        "cpu_ms_per_message": [row["cpu_ms_per_message"] for row in rows],
        "setup_cpu_ms_per_message": [row["setup_cpu_ms_per_message"] for row in rows],
        "round_seconds_a_merchant": [row["round_seconds"] / row["merchants"] for row in rows],
    }
    found: dict[str, int | None] = dict.fromkeys(figures)
    for name, values in figures.items():
        bent = [place for place in range(1, len(rows)) if values[place] > KNEE * min(values[:place])]
        found[name] = rows[bent[0]]["merchants"] if bent else None
    return found


def show(figures: dict[str, Any]) -> None:
    """Print the figures for a person."""
    columns = (
        "merchants",
        "numbers",
        "CPU a message",
        "in the set-up",
        "a round",
        "the set-up",
        "peak memory",
    )
    table = Table(*columns, box=None, pad_edge=False)
    for row in figures["rows"]:
        table.add_row(
            str(row["merchants"]),
            f"{row['dimension']:,}",
            f"{row['cpu_ms_per_message']:.2f} ms",
            f"{row['setup_cpu_ms_per_message']:.2f} ms",
            f"{row['round_seconds']:.2f} s",
            f"{row['round_cpu_seconds']:.2f} s",
            f"{row['setup_seconds']:.1f} s",
            f"{row['peak_mib']:.0f} MiB",
        )
    console.print(table)
    console.print(
        f"memory: {figures['kib_a_merchant']:.0f} KiB a merchant, {figures['kib_a_merchant_large']:.0f} KiB with "
        f"{LARGE_DIMENSION:,} numbers; {figures['bytes_a_number']:.0f} bytes a number"
    )
    for name, merchants in figures["knees"].items():
        where = (
            f"none up to {figures['merchants']} merchants" if merchants is None else f"{merchants} merchants"
        )
        console.print(f"the knee of {name}: {where}")
