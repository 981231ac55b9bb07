"""Passes that make a model smaller by leaving parts of it out."""
