"""minipuzzle."""
