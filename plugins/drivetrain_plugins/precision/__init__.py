"""Number formats of the forward pass."""
