"""Backends: a Program in, an Artifact out, and the runtime that loads it."""
