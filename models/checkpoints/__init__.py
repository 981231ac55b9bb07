"""Trained weights and the small data they are checked on."""
