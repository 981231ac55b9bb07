"""Choosing what a training step keeps for backward and what it computes again."""
