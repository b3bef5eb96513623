"""What the package's own source does and doesn't: its imports, its SQL, its means."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import asgi_dbscope

PACKAGE = Path(asgi_dbscope.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = [each for each in FILES if each.parent == PACKAGE]
"""Without the integrations, each of which imports what it is for, and the demo."""

DANGEROUS = {
    *("eval", "exec", "compile", "__import__", "breakpoint", "input"),
    *("marshal", "pickle", "shelve", "subprocess", "ctypes", "urllib", "http.client"),
}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_imports_two_packages_only(path):
    """SQLAlchemy and anyio, beside Python's own and ours: nothing else can be attacked by us."""
    roots = {each.partition(".")[0] for each in imported(ast.parse(path.read_text()))}

    assert set() == roots - {"anyio", "asgi_dbscope", "sqlalchemy"} - sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_is_made_from_data(path):
    """No eval, no pickle, no programs started, nothing fetched."""
    tree = ast.parse(path.read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }

    assert set() == DANGEROUS & (called | set(imported(tree)))


SQL_METHODS = {"exec_driver_sql", "execute", "text"}


def statements(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.expr]]:
    """What is given to a method that runs SQL as a text, and the function around it."""
    for around in ast.walk(tree):
        if not isinstance(around, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
            continue
        for node in ast.walk(around):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in SQL_METHODS:
                    yield around, node.args[0]


def is_fixed(value: ast.expr, around: ast.AST) -> bool:
    """Whether a text holds nothing but what stands in the source, and numbers."""
    if isinstance(value, ast.Constant):
        return True
    if isinstance(value, ast.JoinedStr):
        return all(is_number_or_constant(each) for each in value.values)
    if isinstance(value, ast.Name):
        assigned = [
            node.value
            for node in ast.walk(around)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id == value.id
        ]
        return value.id.isupper() or (
            bool(assigned) and all(is_fixed(each, around) for each in assigned)
        )
    if isinstance(value, ast.Subscript):  # of a table of statements
        return isinstance(value.value, ast.Name) and value.value.id.isupper()
    return isinstance(value, ast.Call)  # of SQLAlchemy's: select(), CreateSchema()


def is_number_or_constant(part: ast.expr) -> bool:
    """Whether a part of an f-string can be nothing but a number, or stands in the source."""
    if isinstance(part, ast.Constant):
        return True
    assert isinstance(part, ast.FormattedValue)
    if isinstance(part.value, ast.Name) and part.value.id.isupper():
        return True
    spec = part.format_spec
    return isinstance(spec, ast.JoinedStr) and ast.unparse(spec).rstrip("'\"")[-1:] in {"d", "f"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_value_is_formatted_into_sql(path):
    """A statement is a literal; a value is bound, or is formatted as nothing but a number."""
    found = [
        f"{path.name}:{value.lineno}: {ast.unparse(value)}"
        for around, value in statements(ast.parse(path.read_text()))
        if not is_fixed(value, around)
    ]

    assert [] == found


@pytest.mark.parametrize(
    "source",
    [
        "def f(c, x): c.exec_driver_sql(f'SET a = {x}')",
        "def f(c, x): c.exec_driver_sql(f'SET a = {x!r}')",
        "def f(c, x): c.execute('SET a = ' + x)",
        "def f(c, x): c.execute('SET a = %s' % x)",
        "def f(c, x):\n    sql = f'SET a = {x}'\n    c.execute(sql)",
        "def f(x): return text(x)",
    ],
)
def test_formatted_value_would_be_found(source):
    """What the test before looks for it finds."""
    assert [False] == [
        is_fixed(value, around)
        for around, value in statements(ast.parse(source))
        if isinstance(around, ast.FunctionDef)
    ]
