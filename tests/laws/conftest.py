"""How many examples the laws draw: eight for each of fifty forms in `make test`, many in `make test-long`."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("laws", settings.get_profile("longspan"), max_examples=8)
settings.register_profile("many", settings.get_profile("longspan"), max_examples=60)


@pytest.fixture(autouse=True)
def examples() -> Iterator[None]:
    settings.load_profile("laws")
    yield
    settings.load_profile("longspan")
