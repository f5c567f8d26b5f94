"""What tests of HTML pages share."""

import re


def without_pixels(html: str) -> str:
    """A page without its pictures: in base64 any word may occur by chance, "http" once in 30 pages."""
    return re.sub(r"(data:image/png;base64,)[A-Za-z0-9+/=]+", r"\1", html)
