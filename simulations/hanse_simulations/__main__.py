"""`python -m hanse_simulations` is `hanse-sim`, for whoever knows the Python and not where its commands are."""

from hanse_simulations.cli import main

main()
