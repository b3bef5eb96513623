"""What is built and installed is what the project says it is."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import asgi_dbscope

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {
    "dramatiq",
    "fastapi",
    "faststream",
    "flask",
    "litestar",
    "quart",
    "starlette",
    "taskiq",
    "uvicorn",
}


@pytest.fixture(scope="module")
def project():
    """The [project] table."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def metadata():
    """The metadata of the installed distribution."""
    return importlib.metadata.metadata("asgi-dbscope")


def requirements(extra=None):
    """The requirements of the installed distribution, or those one of its extras adds."""
    found = map(Requirement, importlib.metadata.requires("asgi-dbscope") or [])
    if extra is None:
        return {each.name: each for each in found if not each.marker}
    return {
        each.name: each for each in found if each.marker and each.marker.evaluate({"extra": extra})
    }


def python(*lines):
    """Run these lines in an interpreter of their own."""
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def lines_of(name):
    """The lines of one of the project's files, without their indentation."""
    return [line.strip() for line in (ROOT / name).read_text().splitlines()]


@pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="tox installs the wheel")
def test_installed_package_is_tested():
    """Under tox the package comes from the built wheel, not from the working tree."""
    assert not Path(asgi_dbscope.__file__).is_relative_to(ROOT / "asgi_dbscope")


def test_version_is_told_once(project, metadata):
    """The installed version is the one in pyproject.toml."""
    assert project["version"] == metadata["Version"]


def test_changelog_knows_version(project):
    """The changelog has a section for this version, or for what is not released yet."""
    sections = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert {"Unreleased", project["version"]} & set(sections)


def test_core_needs_two_packages_only():
    """Without extras the package needs SQLAlchemy, with its asyncio layer, and anyio."""
    needed = requirements()

    assert {"anyio", "sqlalchemy"} == set(needed)
    assert {"asyncio"} == needed["sqlalchemy"].extras


def test_extras_are_those_documented(metadata):
    """The extras are one for each asynchronous driver, and demo."""
    extras = {"demo", "mysql", "postgresql", "psycopg", "sqlite"}

    assert extras == set(metadata.get_all("Provides-Extra"))


def test_oldest_environment_runs_declared_lower_bounds(project):
    """Each lower bound that we declare is the version that the `oldest` environment installs."""
    constraints = [
        Requirement(line)
        for line in lines_of("tests/constraints-oldest.txt")
        if line and line[0] != "#"
    ]
    pinned = {each.name: each.specifier for each in constraints}
    declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]

    for requirement in map(Requirement, declared):
        (bound,) = requirement.specifier
        (pin,) = pinned[requirement.name]

        assert (">=", Version(bound.version)) == (bound.operator, Version(pin.version))


def test_types_are_shipped():
    """The package tells type checkers that it is typed."""
    assert Path(asgi_dbscope.__file__).with_name("py.typed").exists()


def test_license_is_shipped(metadata):
    """The license expression and file are part of the metadata."""
    assert "MIT" == metadata["License-Expression"]
    assert ["LICENSE"] == metadata.get_all("License-File")


def test_import_loads_no_framework():
    """Importing the package imports no web framework and no server."""
    loaded = python("import sys, asgi_dbscope; print(*sys.modules)").stdout.split()

    assert "asgi_dbscope" in loaded
    assert not FRAMEWORKS & {name.partition(".")[0] for name in loaded}


def test_public_names_exist():
    """Everything in `__all__` can be imported."""
    assert [] == [name for name in asgi_dbscope.__all__ if not hasattr(asgi_dbscope, name)]


def test_demo_without_its_extra_says_what_to_install():
    """Without the demo's packages there is one line that says what to install, and no traceback."""
    ran = python(
        "import runpy, sys",
        "sys.modules.update(dict.fromkeys(('fastapi', 'rich', 'starlette', 'uvicorn')))",
        "sys.argv[1:] = ['demo', '--once']",
        "runpy.run_module('asgi_dbscope', run_name='__main__')",
    )

    told = "The demo needs fastapi, which is not installed: pip install 'asgi-dbscope[demo]'\n"
    assert ("", told, 2) == (ran.stdout, ran.stderr, ran.returncode)


def test_ci_runs_the_readme_command():
    """The README's command that runs the tests is the one that CI runs, to the letter."""
    commands = [line for line in lines_of("README.md") if line.startswith("python3 -m venv")]
    demo, tests = commands

    assert demo.endswith("python -m asgi_dbscope demo")
    assert tests.endswith("tox")
    assert tests in lines_of(".ci/run")
