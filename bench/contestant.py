"""Who takes part: a way to get a session, in one framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.apps import Application, Setup


@dataclass(frozen=True)
class Contestant:
    """A way to get a session, in one framework.

    Attributes:
        way: The name of its file.

        framework: A module of `bench.frameworks`.

        title: What tables say.

        make: Makes the app. The contestant's packages are imported there: the runner has none.

        variant: Tells apart what one file has twice for a framework.

        packages: Whose versions the results name, beside the framework's.

        environment: Where these are installed.

        is_sync: Whether its endpoints are `def`.
    """

    way: str
    framework: str
    title: str
    make: Callable[[Setup], Application]
    variant: str = ""
    packages: tuple[str, ...] = ()
    environment: str = "main"
    is_sync: bool = False

    @property
    def name(self) -> str:
        """What `--only` and the results call it."""
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.group}.{self.way}{variant}"

    @property
    def group(self) -> str:
        """Who is measured together: the same framework, and the same kind of endpoints."""
        return f"{self.framework}-sync" if self.is_sync else self.framework
