"""Plugins by subject; there are no fixtures here."""

pytest_plugins = [
    "tests.fix_postgres",
    "tests.fix_database",
    "tests.fix_asgi",
    "tests.fix_leaks",
    "tests.fix_frameworks",
    "tests.fix_server",
]
