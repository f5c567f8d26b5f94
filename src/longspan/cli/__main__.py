"""`python -m longspan.cli` is `longspan`."""

from longspan.cli import main

main()
