"""From a config and its data to a trained classifier."""
