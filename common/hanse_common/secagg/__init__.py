"""Secure aggregation: the integer ring in which updates are summed."""
