"""The researcher: the same protocol code in one process, seeded, from YAML experiments."""
