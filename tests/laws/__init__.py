"""The law matrix: every registered mixer against the eight laws of docs/design.md, and a mutant for every check."""
