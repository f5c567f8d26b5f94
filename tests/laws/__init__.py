"""The law matrix: every registered mixer against the eight laws of docs/contract.md, and a mutant for every check."""
