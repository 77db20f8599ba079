"""``python -m mbq`` is the command ``mbq``."""

from mbq.cli import main

main()
