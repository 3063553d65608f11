"""Checkpoints on disk: where they are, their format, what may be in them, and weights alone."""
