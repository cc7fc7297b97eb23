"""What several files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.servers import ADAPTERS, serving


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server that takes two adapters."""
    with serving(tmp_path_factory.mktemp("server") / "log", *ADAPTERS) as (found, _):
        yield found
