"""Values and rules of the archive; no input or output."""
