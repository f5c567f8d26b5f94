"""Run the command line with `python -m longspan.cli`, the same as `longspan`."""

from longspan.cli import main

main()
