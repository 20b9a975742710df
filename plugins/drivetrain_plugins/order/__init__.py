"""In which order rows are trained on, and where a batch ends."""
