"""Seeing what a run does."""
