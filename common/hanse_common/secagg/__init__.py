"""Secure aggregation: the server learns the sum of many client updates and nothing else about any of them.

Two pure state machines, `merchant.Merchant` and `aggregator.Aggregator`, take and return the typed messages of
`messages`. They know no files, clocks, threads of control or transport. What each trip is for, and which attack
each check stops, is written in `merchant`, top to bottom.

Lineage: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (the variant
against an active server), on the complete graph; with the roster, the model and the round bound into every key.
"""
