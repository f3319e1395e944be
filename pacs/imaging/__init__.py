"""Data sets, character sets, codecs: bytes in, values out."""
