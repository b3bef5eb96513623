"""No code block of README and docs goes unseen."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, blocks_of, name_of, shown

SHELL = {"bash", "console", "sh"}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.why_not]


def test_every_block_of_python_is_run_by_a_test():
    """Each block of Python in README and docs has a name, and a test that runs it.

    Only one that needs another project's framework may say why it is `not run`.
    """
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        import_module(f"tests.docs.{path.stem}")

    assert shown == {(name_of(block.page), block.name) for block in PYTHON}


def test_names_of_blocks_are_unique():
    """Within a page a block's name is one block's."""
    names = [(name_of(block.page), block.name) for block in PYTHON]

    assert len(set(names)) == len(names)


def test_languages_are_known():
    """A block is Python, shell, or something that nobody can run here."""
    languages = {block.language for block in BLOCKS}

    assert languages <= {"ini", "java", "python", "text", *SHELL}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_installed_exists(page):
    """Each `pip install` names this project with extras that it has, or tox."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {f"asgi-dbscope[{extra}]" for extra in project["optional-dependencies"]}
    known |= {"asgi-dbscope", ".[demo]", "tox", "tox-uv"}

    for block in blocks_of(page):
        if block.language in SHELL:
            for arguments in re.findall(r"pip install ([^&\n]*)", block.code):
                words = [word.strip("'\"") for word in arguments.split()]
                assert {word for word in words if not word.startswith("-")} <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Each relative link leads to a file that is there, and to a heading it has."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", linked.read_text())
            assert anchor in {
                re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings
            }
