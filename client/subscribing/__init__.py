"""What a subscriber promises, without I/O, and what drives it."""
