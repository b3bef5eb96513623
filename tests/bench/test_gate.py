"""The gate on instructions."""

import pytest

from bench.gate import CONTROLS, OURS, judge

BASELINE = {
    "asgi.bare": {"none": 16_000.0},
    "asgi.by_hand": {"select": 1_200_000.0, "insert": 1_700_000.0},
    OURS: {"none": 31_000.0, "select": 1_300_000.0, "insert": 1_800_000.0},
}


def counted(path: str, rise: float, *, elsewhere: float = 1.0) -> dict[str, dict[str, float]]:
    """What is counted after one path rose, where everything takes *elsewhere* as many."""
    found = {
        name: {each: count * elsewhere for each, count in paths.items()}
        for name, paths in BASELINE.items()
    }
    found[OURS][path] *= rise
    return found


@pytest.mark.parametrize("path", CONTROLS)
def test_a_rise_of_five_percent_is_refused_with_the_command_that_shows_where(path):
    """A request that takes 5 % more fails the gate, on each path."""
    found = judge(counted(path, 1.05), BASELINE)

    assert found[0].startswith(f"{path}: 5.0% more instructions")
    assert f"python -m bench.profile {path} --against " in found[1]


@pytest.mark.parametrize("path", CONTROLS)
def test_a_rise_within_the_tolerance_passes(path):
    """1.9 % more is tolerated."""
    assert [] == judge(counted(path, 1.019), BASELINE)


def test_another_machine_is_no_rise():
    """A processor or build on which everything takes more makes no difference."""
    assert [] == judge(counted("none", 1.0, elsewhere=1.1), BASELINE)


def test_a_fall_is_told_and_passes(capsys):
    """What takes less should be recorded, and passes."""
    assert [] == judge(counted("select", 0.9), BASELINE)
    assert "select: 10.0% less" in capsys.readouterr().out
