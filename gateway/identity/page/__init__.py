"""The page to log in with, in one file."""
