"""Passes that decide, under a budget, what every layer becomes."""
