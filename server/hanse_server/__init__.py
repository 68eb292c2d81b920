"""The operator: coordinates rounds, aggregates updates, publishes the shared recognizer."""
