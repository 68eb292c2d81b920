"""The merchant: catalog, policy, ledger, private training, and the recognizer at work."""
