"""What is minimised, and by how many items it is divided."""
