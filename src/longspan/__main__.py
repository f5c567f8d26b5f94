"""Run the command line by `python -m longspan`."""

from longspan.cli import main

main()
