"""Passes that replace a weight by a product of smaller ones."""
