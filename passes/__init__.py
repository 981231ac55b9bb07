"""Passes: one file each, grouped in families."""
