"""What the console daemon serves."""
