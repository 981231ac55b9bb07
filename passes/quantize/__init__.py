"""Passes that change the numeric format of weights and activations."""
