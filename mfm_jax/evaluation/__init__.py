"""The classifier as tested, and what its answers are worth."""
