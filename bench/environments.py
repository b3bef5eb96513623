"""Where contestants' packages are installed: beside ours if their pins allow it, else apart."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HOME = Path(__file__).parent / ".environments"

NOTE = "made-of.txt"
"""Of each environment: what it was made of."""

COMMON = ("sqlalchemy[asyncio]", "asyncpg", "psycopg[binary]", "uvicorn", "uvloop", "httptools")
"""What every environment has, in the very versions that the runner's has."""

FRAMEWORKS = ("starlette", "fastapi", "litestar")


@dataclass(frozen=True)
class Environment:
    """A virtual environment beside the runner's own.

    Attributes:
        packages: What it is for.

        loosened: What these need in another version than the runner's.
    """

    packages: tuple[str, ...]
    loosened: frozenset[str] = frozenset()


ENVIRONMENTS: dict[str, Environment] = {
    "peers": Environment(
        (
            "advanced-alchemy==1.12.0",
            "asgi-sqlalchemy==0.2.0",
            "context-async-sqlalchemy==2.1.9",
            "fastapi-async-sqlalchemy==0.8.1",
            "starlette-dishka==1.0.2",
        )
    ),
    "fastapi-sqla": Environment(("fastapi-sqla==4.0.1",), frozenset({"fastapi"})),
}
"""By name; `main` is the runner's own."""


def python(environment: str) -> Path:
    """The interpreter there."""
    if environment == "main":
        return Path(sys.executable)
    return HOME / environment / "bin" / "python"


def is_there(environment: str) -> bool:
    """Whether it is, and is made of what it would be made of now."""
    if environment == "main":
        return True
    note = HOME / environment / NOTE
    return note.exists() and note.read_text() == made_of(environment)


def _constraints(environment: str) -> str:
    return "".join(
        f"{name}=={version}\n"
        for name, version in versions("main").items()
        if name not in ENVIRONMENTS[environment].loosened | {"python", "asgi-dbscope"}
    )


def made_of(environment: str) -> str:
    """What it is, or would be, made of."""
    return _constraints(environment) + "\n".join(ENVIRONMENTS[environment].packages)


def install(environment: str, tell: Callable[[str], object]) -> None:
    """Make it, if it isn't there: by uv, which has to be installed."""
    if is_there(environment):
        return
    tell(f"installing {environment}")
    chosen = ENVIRONMENTS[environment]
    place = HOME / environment
    building = HOME / f"{environment}.building"  # what is half there isn't there
    shutil.rmtree(building, ignore_errors=True)
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    HOME.mkdir(exist_ok=True)
    constraints = HOME / f"{environment}.txt"
    constraints.write_text(_constraints(environment))
    subprocess.run([uv, "venv", "-q", "--relocatable", "-p", sys.executable, building], check=True)
    subprocess.run(
        [
            *(uv, "pip", "install", "-q", "--python", str(building / "bin" / "python")),
            *("--constraints", str(constraints), *COMMON, *FRAMEWORKS, *chosen.packages),
        ],
        check=True,
        env={"UV_SYSTEM_CERTS": "true", **os.environ},
    )
    (building / NOTE).write_text(made_of(environment))
    shutil.rmtree(place, ignore_errors=True)
    building.rename(place)


_LIST = """
import importlib.metadata as m, json, platform
found = {each.name.lower(): each.version for each in m.distributions()}
print(json.dumps({"python": platform.python_version(), **dict(sorted(found.items()))}))
"""


@functools.cache
def versions(environment: str) -> dict[str, str]:
    """What is installed there."""
    told = subprocess.run(
        [python(environment), "-P", "-c", _LIST], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, str] = json.loads(told.stdout)
    return found
