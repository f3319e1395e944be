"""Use cases; each is the only door for what it does."""
