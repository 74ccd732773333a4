"""What a trained classifier is used for."""
