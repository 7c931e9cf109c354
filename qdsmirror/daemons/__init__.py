"""Masters, children and their wiring."""
