"""The classifier as it is tested, and what its answers are worth."""
