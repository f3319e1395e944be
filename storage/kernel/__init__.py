"""Errors, identifiers, clock, limits and settings: what every package speaks."""
