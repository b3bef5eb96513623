"""What the end of a transaction owes: hooks and failures, each with the savepoint it came under."""

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from asgi_dbscope import ConfigurationError, Outcome
from asgi_dbscope._agenda import Agenda, Hook, Occasion


def savepoint(parent: Any = None) -> Any:
    """What the agenda asks of a savepoint: what it is inside of."""
    return SimpleNamespace(parent=parent)


def hook(name: str, occasion: Occasion = Occasion.COMMIT, **options: Any) -> Hook:
    """A hook that is told from others by its argument."""
    return Hook(occasion, print, (name,), **options)


def names(due: list[tuple[Hook, Outcome]]) -> list[Any]:
    """The arguments of the hooks that are due."""
    return [each.arguments[0] for each, _ in due]


@pytest.fixture
def agenda() -> Agenda:
    """Nothing is owed."""
    return Agenda()


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome.COMMITTED, ["commit", "completion"]),
        (Outcome.ROLLED_BACK, ["rollback", "completion"]),
        (Outcome.IN_DOUBT, ["completion"]),
    ],
)
def test_hooks_that_are_due_depend_on_the_outcome(agenda, outcome, expected):
    """Where nobody knows the outcome, only those run that are told of it."""
    for occasion in Occasion:
        agenda.add_hook(hook(occasion.name.lower(), occasion), None)

    agenda.end(outcome)

    assert expected == names(agenda.due)
    assert {outcome} == {became for _, became in agenda.due}


def test_hooks_are_due_once_in_their_order(agenda):
    """A transaction's end takes its hooks with it; the next one has its own."""
    for name in ("a", "b"):
        agenda.add_hook(hook(name), None)
    agenda.end(Outcome.COMMITTED)
    agenda.end(Outcome.COMMITTED)
    agenda.add_hook(hook("c"), None)
    agenda.end(Outcome.COMMITTED)

    assert ["a", "b", "c"] == names(agenda.due)


def test_late_hooks_wait_apart(agenda):
    """Those that wait for the response don't hold up the others."""
    agenda.add_hook(hook("late", when="after_response"), None)
    agenda.add_hook(hook("soon"), None)
    agenda.end(Outcome.COMMITTED)

    assert (["soon"], ["late"]) == (names(agenda.due), names(agenda.late))


def test_hooks_under_a_savepoint_go_with_it(agenda):
    """What came under a savepoint, or one inside of it, is rolled back with it; the rest stays."""
    outer = savepoint()
    inner = savepoint(outer)
    beside = savepoint()
    for name, where in (("none", None), ("outer", outer), ("inner", inner), ("beside", beside)):
        agenda.add_hook(hook(name), where)
        agenda.add_hook(hook(f"{name} undone", Occasion.ROLLBACK), where)

    agenda.roll_back_to(outer)
    agenda.end(Outcome.COMMITTED)

    assert ["none", "outer undone", "inner undone", "beside"] == names(agenda.due)


def test_failures_under_a_savepoint_are_healed_with_it(agenda):
    """The first failure that is left is the one that is told."""
    outer = savepoint()
    inner = savepoint(outer)
    errors = [ValueError(number) for number in range(3)]
    agenda.add_failure(errors[0], inner)
    agenda.add_failure(errors[1], outer)
    agenda.add_failure(errors[2], None)

    assert errors[0] is agenda.failure
    assert errors[0] is agenda.failure_under(outer)
    assert errors[0] is agenda.failure_under(inner)
    agenda.roll_back_to(inner)
    assert errors[1] is agenda.failure
    assert None is agenda.failure_under(inner)
    agenda.roll_back_to(outer)
    assert errors[2] is agenda.failure
    assert None is agenda.failure_under(outer)
    agenda.end(Outcome.ROLLED_BACK)
    assert None is agenda.failure


def test_agenda_is_empty_until_something_is_owed(agenda):
    """Late hooks are owed to nobody who waits for the head."""
    assert agenda.is_empty
    agenda.add_failure(ValueError(), None)
    assert not agenda.is_empty
    agenda.end(Outcome.ROLLED_BACK)
    agenda.add_hook(hook("late", when="after_response"), None)
    assert not agenda.is_empty
    agenda.end(Outcome.COMMITTED)
    assert agenda.is_empty
    agenda.add_hook(hook("soon"), None)
    agenda.end(Outcome.COMMITTED)
    assert not agenda.is_empty


# --------------------------------------------------------------------------------------
# One hook
# --------------------------------------------------------------------------------------


async def send() -> None:
    """Wait."""


class Sender:
    """An object that is called, and waited for."""

    async def __call__(self) -> None:
        """Wait."""


@pytest.mark.parametrize(
    ("function", "expected"),
    [(send, True), (Sender(), True), (Sender().__call__, True), (print, False)],
)
def test_hook_knows_whether_it_waits(function, expected):
    """Coroutine functions and objects with an asynchronous `__call__` are known before."""
    assert expected is Hook(Occasion.COMMIT, function).is_async


def test_partial_of_a_coroutine_function_is_known_too():
    """A partial waits as what it wraps does."""
    assert Hook(Occasion.COMMIT, partial(send)).is_async


@pytest.mark.parametrize("occasion", list(Occasion))
def test_only_a_completion_hook_is_told_the_outcome(occasion):
    """The outcome comes before the hook's own arguments."""
    seen: list[Any] = []
    made = Hook(occasion, lambda *args, **kwargs: seen.extend((args, kwargs)), (1,), {"key": 2})

    made.call(Outcome.COMMITTED)

    first = (Outcome.COMMITTED, 1) if occasion is Occasion.COMPLETION else (1,)
    assert [first, {"key": 2}] == seen


def test_coroutine_in_the_place_of_a_function_is_told_and_closed():
    """Nothing is left that nobody awaits."""
    coroutine: Any = send()
    with pytest.raises(ConfigurationError, match="Pass the function and its arguments apart"):
        Hook(Occasion.COMMIT, coroutine)

    assert inspect.CORO_CLOSED == inspect.getcoroutinestate(coroutine)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"when": "now"}, "when must be 'before_response' or 'after_response'; got 'now'"),
        ({"on_error": None}, "on_error must be 'log' or 'raise'; got None"),
    ],
)
def test_wrong_option_is_told(options, told):
    """The error names the values that there are."""
    with pytest.raises(ConfigurationError) as caught:
        hook("wrong", **options)

    assert told in str(caught.value)
