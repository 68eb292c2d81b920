"""Benchmarks: each module is one, with `run(quick, device)` that returns flat figures."""
