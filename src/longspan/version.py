"""The version of the library, in its own module so that every other may import it."""

__version__ = "0.2.0"
