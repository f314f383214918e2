"""Text and tokens for training, exact to resume."""
