"""Packs: append-only files of Part-10 objects; the log the index derives from."""
