"""`python -m longspan.cli` is `longspan`."""

from longspan.cli.app import main

main()
