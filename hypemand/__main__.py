"""``python -m hypemand``: the same as the console script."""

from hypemand.cli import main

main()
