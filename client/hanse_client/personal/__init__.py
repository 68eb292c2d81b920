"""What is the shop's own: its corrections, and what is learned from its labels and products. None of it ever leaves."""
