"""Plugins by subject; there are no fixtures here."""

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# The benchmarks are in the checkout; the package comes from where it is installed.
sys.path.append(str(Path(__file__).parents[1]))

pytest_plugins = [
    "tests.fix_coverage",
    "tests.fix_postgres",
    "tests.fix_mariadb",
    "tests.fix_pgbouncer",
    "tests.fix_database",
    "tests.fix_asgi",
    "tests.fix_clock",
    "tests.fix_leaks",
    "tests.fix_frameworks",
    "tests.fix_retry",
    "tests.fix_server",
    "tests.fix_served",
    "tests.fix_sync",
    "tests.fix_programs",
    "tests.fix_proxy",
    "tests.fix_in_doubt",
]

# A busy machine is no bug.
settings.register_profile(
    "patient",
    settings.get_profile(settings.get_current_profile_name()),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("patient")
