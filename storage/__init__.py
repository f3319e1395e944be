"""Everything durable, and the vocabulary it is written in. Imports nothing of ours."""
