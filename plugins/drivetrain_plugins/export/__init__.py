"""Handing the model on."""
