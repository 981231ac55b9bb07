"""Passes that keep what a program computes and make it simpler."""
