"""Passes that decide when operators run and where their results lie in memory."""
