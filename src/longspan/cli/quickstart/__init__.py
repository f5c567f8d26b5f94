"""`longspan quickstart`."""


def quickstart() -> int:
    """Placeholder."""
    return 0
