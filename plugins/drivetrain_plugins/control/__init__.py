"""What steers the loop."""
