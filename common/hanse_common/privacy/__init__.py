"""The one differentially private mechanism and its accounting."""
