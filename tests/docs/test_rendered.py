"""What the documentation says of states, endings, guarantees and errors is what the code says."""

import importlib.util
import re
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import asgi_dbscope
from asgi_dbscope import ResponseHead, State, commit_on_success, commit_unless_error
from asgi_dbscope._lifecycle import TRANSITIONS, Event, Outcome
from asgi_dbscope._policy import Cause, Ending, decide_ending
from asgi_dbscope._propagation import ENTRIES, Propagation, Situation
from tests.docs.blocks import ROOT

GUARANTEES = [f"G{number}" for number in range(1, 23)]


@pytest.fixture(scope="module")
def rendered():
    """The module that renders, as Sphinx has it."""
    path = ROOT / "docs" / "_ext" / "rendered.py"
    spec = importlib.util.spec_from_file_location("rendered", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rendered"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["rendered"]


@pytest.fixture(scope="module")
def tests_by_guarantee(rendered):
    """The tests that name each guarantee, looked for once."""
    return rendered.find_tests(ROOT)


def content_of(page, directive):
    """The lines inside the directive `{rendered} ...` of a page."""
    text = (ROOT / "docs" / page).read_text()
    (found,) = re.findall(
        rf"^```{{rendered}} {directive}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return found.splitlines()


# --------------------------------------------------------------------------------------
# The lifecycle
# --------------------------------------------------------------------------------------


def test_table_of_transitions_is_the_code(rendered):
    """Read back, the rendered table of transitions is the one the scope runs by."""
    head, *rows = rendered.read_table(rendered.transitions())
    read = {
        State[row[0].strip("`")]: {
            Event[event.strip("`")]: State[cell.strip("`")]
            for event, cell in zip(head[1:], row[1:], strict=True)
            if cell
        }
        for row in rows
    }

    assert TRANSITIONS == read


def test_diagram_draws_the_transitions_and_no_more(rendered):
    """The picture has a box for each state and a labelled arrow for each step of the table."""
    svg = ET.fromstring(rendered.diagram())
    groups = list(svg.findall(".//{*}g"))
    boxes = [each.attrib["data-state"] for each in groups if "data-state" in each.attrib]
    drawn: dict[State, dict[Event, State]] = {}
    for each in groups:
        if "data-start" in each.attrib:
            steps = drawn.setdefault(State[each.attrib["data-start"]], {})
            for label in each.findall(".//{*}tspan"):
                event = Event[str(label.text)]
                assert event not in steps
                steps[event] = State[each.attrib["data-end"]]

    assert [each.name for each in State] == boxes
    assert {state: steps for state, steps in TRANSITIONS.items() if steps} == drawn


def test_boxes_of_the_diagram_do_not_overlap(rendered):
    """Every state has a place of its own in the picture."""
    places = [rendered.PLACES[state] for state in State]

    for position, (x, y) in enumerate(places):
        for other_x, other_y in places[position + 1 :]:
            assert abs(x - other_x) > rendered.BOX_WIDTH or abs(y - other_y) > rendered.BOX_HEIGHT


@pytest.mark.parametrize(
    ("renderer", "enumeration"), [("states", State), ("events", Event), ("outcomes", Outcome)]
)
def test_meanings_are_complete(rendered, renderer, enumeration):
    """Each member of an enumeration has a row that says what it means."""
    _, *rows = rendered.read_table(rendered.RENDERERS[renderer]([]))

    assert [each.name for each in enumeration] == [row[0].strip("`") for row in rows]
    assert all(row[1] for row in rows)


def test_table_of_endings_is_what_is_decided(rendered):
    """G3, G4: each cell of the rendered endings is what `decide_ending()` decides."""
    _, *rows = rendered.read_table(rendered.endings())
    words = {"commit": Ending.COMMIT, "roll back": Ending.ROLLBACK}
    heads = dict(rendered.HEADS)

    assert {each.name for each in Cause} == {row[0].strip("`") for row in rows}
    assert set(heads) == {row[1] for row in rows if row[0] == "`HEAD`"}
    for name, happened, plain, manual, rollback_only in rows:
        cause = Cause[name.strip("`")]
        head = heads.get(happened)
        assert decide_ending(cause, State.ACTIVE, head=head) is words[plain]
        assert decide_ending(cause, State.ACTIVE, mode="manual", head=head) is words[manual]
        assert Ending.ROLLBACK is words[rollback_only]


def test_table_of_policies_is_what_they_answer(rendered):
    """G3: each cell of the rendered commit policies is what the policy answers."""
    head, *rows = rendered.read_table(rendered.policies())

    assert ["", "`commit_unless_error`", "`commit_on_success`"] == head
    for name, *cells in rows:
        response = rendered.HEADS[name]
        answers = [commit_unless_error(response), commit_on_success(response)]
        assert ["commit" if each else "roll back" for each in answers] == cells
    assert ResponseHead(404, raised=True) in rendered.HEADS.values()


# --------------------------------------------------------------------------------------
# Transactional blocks
# --------------------------------------------------------------------------------------


def test_table_of_propagations_is_the_code(rendered):
    """Read back, the rendered table of propagations is the one that blocks are entered by."""
    _, *rows = rendered.read_table(rendered.propagation())
    entries = {words: entry for entry, words in rendered.ENTRY_WORDS.items()}
    read = {
        Propagation[name.partition(":")[0].strip("`")]: {
            situation: entries[cell] for situation, cell in zip(Situation, cells, strict=True)
        }
        for name, *cells in rows
    }

    assert ENTRIES == read


def test_columns_of_the_propagations_are_explained(rendered):
    """Each column of the table of propagations has a row that says what it means."""
    head, *_ = rendered.read_table(rendered.propagation())
    _, *rows = rendered.read_table(rendered.situations())

    assert head[1:] == [row[0] for row in rows]
    assert all(row[1] for row in rows)


# --------------------------------------------------------------------------------------
# The guarantees
# --------------------------------------------------------------------------------------


def test_every_guarantee_has_a_row(rendered):
    """The page has each guarantee once, in order, with a state that is known."""
    guarantees = rendered.read_guarantees(content_of("guarantees.md", "guarantees"))

    assert GUARANTEES == [each.name for each in guarantees]
    assert {each.state for each in guarantees} <= set(rendered.STATES)
    assert all(each.promise.endswith((".", ")")) for each in guarantees)


def test_held_guarantees_have_tests(rendered, tests_by_guarantee):
    """What the page calls held, or partly held, at least one test names in its docstring."""
    guarantees = rendered.read_guarantees(content_of("guarantees.md", "guarantees"))
    held = {each.name for each in guarantees if each.state != "not yet"}

    assert set() == held - set(tests_by_guarantee)


def test_every_environment_runs_tests_of_every_guarantee(tests_by_guarantee):
    """What tox leaves out of an environment is never all that shows a guarantee."""
    runs = re.findall(r"-m pytest --ignore=tests/chaos (.*)", (ROOT / "tox.ini").read_text())
    assert 3 == len(runs)
    for run in runs:
        left_out = tuple(f"{folder}/" for folder in re.findall(r"--ignore=(\S+)", run))
        once = find_once() if "not once" in run else set()
        kept = {
            name
            for name, tests in tests_by_guarantee.items()
            for each in tests
            if not each.path.startswith(("tests/chaos/", *left_out))
            and not {each.path, f"{each.path}::{each.name}"} & once
        }

        assert set() == set(GUARANTEES) - kept


def find_once():
    """The tests that are marked `once`, and the files that are as a whole."""
    found = set()
    for path in ROOT.glob("tests/**/test_*.py"):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        if re.search(r"^pytestmark = pytest\.mark\.once$", text, re.MULTILINE):
            found.add(name)
        marked = r"^@pytest\.mark\.once\n(?:@.*\n)*(?:async )?def (\w+)"
        found |= {f"{name}::{each}" for each in re.findall(marked, text, re.MULTILINE)}
    assert found
    return found


def test_tests_name_guarantees_that_exist(tests_by_guarantee):
    """No test names a guarantee that the page doesn't have."""
    assert set() == set(tests_by_guarantee) - set(GUARANTEES)


def test_table_of_guarantees_lists_the_files_of_their_tests(rendered, tmp_path):
    """The table counts, by file, the tests whose docstrings name a guarantee."""
    (tmp_path / "tests" / "asgi").mkdir(parents=True)
    (tmp_path / "tests" / "test_y.py").write_text('def test_e():\n    """G1: three."""\n')
    (tmp_path / "tests" / "asgi" / "test_x.py").write_text(
        'def test_a():\n    """G1, G3: one."""\n'
        'async def test_b():\n    """G1: two."""\n'
        'def test_c():\n    """G10 is not named by this one."""\n'
        'def helper():\n    """G1: not a test."""\n'
        "def test_d(): ...\n"
    )
    content = [
        "G1 | held | First.",
        "G2 | not yet | Second,",
        "  going on.",
        "G3 | partly | Third.",
    ]

    assert [
        ["", "promise", "state", "tests, how many in which file"],
        ["**G1**", "First.", "held", "`asgi/test_x.py` (2), `test_y.py` (1)"],
        ["**G2**", "Second, going on.", "not yet", ""],
        ["**G3**", "Third.", "partly", "`asgi/test_x.py` (1)"],
    ] == rendered.read_table(rendered.guarantees(content, tmp_path))
    assert {"G1": ["one.", "two.", "three."], "G3": ["one."]} == {
        name: [test.sentence for test in tests]
        for name, tests in rendered.find_tests(tmp_path).items()
    }


def test_readme_says_of_each_guarantee_what_the_page_says(rendered):
    """The README's short table has the same guarantees in the same states."""
    long = rendered.read_guarantees(content_of("guarantees.md", "guarantees"))
    rows = re.findall(
        r"^\| (G\d+) \| .* \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )

    assert [(each.name, each.state) for each in long] == rows


# --------------------------------------------------------------------------------------
# Errors, modules, API
# --------------------------------------------------------------------------------------


def test_every_error_has_a_remedy(rendered):
    """The page of errors has each error of the package once, and no other."""
    remedies = rendered.read_remedies(content_of("errors.md", "errors"))
    classes = rendered.error_classes()

    assert list(classes) == list(remedies)
    assert all(remedies.values())
    assert all(asgi_dbscope.errors.DBScopeError in cls.__mro__ for cls in classes.values())


def test_list_of_errors_says_what_their_docstrings_say(rendered):
    """The rendered list has each error's docstring, its bases and its remedy."""
    listed = rendered.error_list(content_of("errors.md", "errors"))

    for name, cls in rendered.error_classes().items():
        said = " ".join(cls.__doc__.split()).replace("``", "`")
        assert f"~asgi_dbscope.{name}`" in listed
        assert said in listed


def test_map_of_modules_is_complete(rendered):
    """The module map names every module of the package."""
    _, *rows = rendered.read_table(rendered.modules())
    package = Path(asgi_dbscope.__file__).parent
    found = {path.stem for path in package.glob("*.py")} - {"__init__"}
    found |= {path.parent.name for path in package.glob("*/__init__.py")}

    assert found == {row[0].strip("`") for row in rows}
    assert all(row[1] for row in rows)


def test_api_page_has_every_public_name():
    """Everything in `__all__` is documented on the page of the API, and nothing else."""
    text = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(
        r"(?m)^\.\. auto(?:class|function|data|exception):: asgi_dbscope\.(\w+)$", text
    )

    assert sorted(asgi_dbscope.__all__) == sorted(documented)
