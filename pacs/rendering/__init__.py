"""Pictures from pixels: rendering of frames, and of volumes made of many."""
