"""``python -m gateway`` does what ``huying`` does."""

from gateway.cli import main

main()
