"""Optimizers and what limits their gradients."""
