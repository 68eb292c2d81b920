"""What the parties must agree on, to the bit: messages, plan, privacy mechanism, recognizer."""
