"""What plugins of several roles share, and other packages may use: columns of rows, streams of blocks."""
