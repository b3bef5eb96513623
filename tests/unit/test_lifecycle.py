"""The lifecycle's table: every state with every event, and what follows from it."""

import itertools
from collections.abc import Iterator

import pytest

from asgi_dbscope import IllegalTransitionError
from asgi_dbscope._lifecycle import (
    OPEN,
    OUTCOMES,
    ROLLBACK_ONLY,
    TRANSITIONS,
    Event,
    Lifecycle,
    Outcome,
    State,
)

PAIRS = list(itertools.product(State, Event))
LEGAL = {(state, event): after for state in State for event, after in TRANSITIONS[state].items()}
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL]


def name_of(value: object) -> str:
    """The id of a parameter."""
    return value.name if isinstance(value, (State, Event, Outcome)) else str(value)


def in_state(state: State, outcome: Outcome = Outcome.NOT_BEGUN) -> Lifecycle:
    """A lifecycle that has come as far as *state*."""
    lifecycle = Lifecycle()
    lifecycle.state, lifecycle.outcome = state, outcome
    return lifecycle


def reachable_from(start: State, without: frozenset[Event] = frozenset()) -> set[State]:
    """Every state that some path from *start* comes to."""
    found, left = {start}, [start]
    while left:
        for event, after in TRANSITIONS[left.pop()].items():
            if event not in without and after not in found:
                found.add(after)
                left.append(after)
    return found


def walks(length: int) -> Iterator[list[tuple[State, Event, State]]]:
    """Every path of *length* steps that the table allows, from the beginning."""

    def extended(walk: list[tuple[State, Event, State]], state: State, left: int) -> Iterator[...]:  # type: ignore[misc]
        yield walk
        if left:
            for event, after in TRANSITIONS[state].items():
                yield from extended([*walk, (state, event, after)], after, left - 1)

    return extended([], State.IDLE, length)


def test_table_has_a_row_for_every_state():
    """G10: The table says of every state what may happen in it."""
    assert set(State) == TRANSITIONS.keys()
    assert len(State) * len(Event) == len(PAIRS) == len(LEGAL) + len(ILLEGAL)


@pytest.mark.parametrize(("state", "event"), LEGAL, ids=name_of)
@pytest.mark.parametrize("outcome", Outcome, ids=name_of)
def test_legal_event_goes_where_the_table_says(state, event, outcome):
    """G10: A legal event leads to the table's state, and tells the outcome if it ends something."""
    lifecycle = in_state(state, outcome)

    before = lifecycle.advance(event)

    assert state is before
    assert LEGAL[state, event] is lifecycle.state
    assert OUTCOMES.get(event, outcome) is lifecycle.outcome


@pytest.mark.parametrize(("state", "event"), ILLEGAL, ids=name_of)
@pytest.mark.parametrize("outcome", Outcome, ids=name_of)
def test_illegal_event_raises_and_changes_nothing(state, event, outcome):
    """G10: An illegal event is an error that names it and its state, and nothing has changed."""
    lifecycle = in_state(state, outcome)

    with pytest.raises(IllegalTransitionError) as caught:
        lifecycle.advance(event)

    assert f"{event.name} can't happen in state {state.name}" in str(caught.value)
    assert caught.value.__suppress_context__
    assert state is lifecycle.state
    assert outcome is lifecycle.outcome


def test_life_begins_idle_with_nothing_begun():
    """G5: A new scope is idle, and nothing was begun."""
    lifecycle = Lifecycle()

    assert State.IDLE is lifecycle.state
    assert Outcome.NOT_BEGUN is lifecycle.outcome


def test_every_state_is_reachable():
    """G10: No state is there in vain."""
    assert set(State) == reachable_from(State.IDLE)


@pytest.mark.parametrize("state", State, ids=name_of)
def test_every_state_leads_to_the_end(state):
    """G10: From every state the scope can end, also when no user's code does anything more."""
    users = frozenset({Event.BEGUN, Event.SET_ROLLBACK_ONLY})

    assert State.CLOSED in reachable_from(state, without=users)


def test_closed_is_final():
    """G9: Nothing happens after the end."""
    assert {} == TRANSITIONS[State.CLOSED]


@pytest.mark.parametrize("state", [each for each in State if each in ROLLBACK_ONLY], ids=name_of)
def test_rollback_only_never_commits(state):
    """G4: From the rollback-only states no path sends COMMIT."""
    reachable = reachable_from(state)

    assert reachable == ROLLBACK_ONLY | {State.CLOSED}
    for each in reachable:
        assert (
            not {Event.COMMIT_SENT, Event.COMMITTED, Event.ANSWER_LOST} & TRANSITIONS[each].keys()
        )


@pytest.mark.parametrize(
    "state",
    [each for each in State if each not in {*ROLLBACK_ONLY, State.COMMITTING, State.CLOSED}],
)
def test_rollback_only_can_be_set_wherever_something_may_still_commit(state):
    """G4: `set_rollback_only()` works in every state but while COMMIT is on its way."""
    assert TRANSITIONS[state][Event.SET_ROLLBACK_ONLY] in ROLLBACK_ONLY


def test_no_event_both_commits_and_rolls_back():
    """G10: Each event tells at most one outcome, and no two events tell the same."""
    assert len(OUTCOMES) == len(set(OUTCOMES.values()))
    assert set(Outcome) - {Outcome.NOT_BEGUN} == set(OUTCOMES.values())


def test_transaction_ends_exactly_once():
    """G10: On every path each transaction that is begun ends once, in one outcome."""
    seen = 0
    for walk in walks(7):
        is_open = False
        for before, event, after in walk:
            if event in OUTCOMES:
                assert is_open, walk
                is_open = False
            elif event is Event.BEGUN:
                is_open = True
            assert is_open == (after in OPEN), walk
            assert (before in OPEN) or event not in OUTCOMES, walk
        seen += 1
    assert 1000 < seen


def test_commit_is_confirmed_only_after_it_was_sent():
    """G1: COMMITTED and ANSWER_LOST can happen in one state only, which COMMIT_SENT leads to."""
    for event in (Event.COMMITTED, Event.ANSWER_LOST):
        assert [State.COMMITTING] == [state for state in State if event in TRANSITIONS[state]]
    for (before, event), after in LEGAL.items():
        if before is not State.COMMITTING:
            assert (after is State.COMMITTING) == (event is Event.COMMIT_SENT)


def test_scope_closes_only_when_nothing_is_open():
    """G19: With a transaction open a scope can't end: it has to be ended first."""
    for state in OPEN:
        assert Event.CLOSED not in TRANSITIONS[state]
    for state in set(State) - OPEN - {State.CLOSED}:
        assert State.CLOSED is TRANSITIONS[state][Event.CLOSED]


def test_open_states_are_those_with_a_transaction():
    """G10: A transaction is open in the states that BEGUN leads to, and while COMMIT is sent."""
    begun = {after for (_, event), after in LEGAL.items() if event is Event.BEGUN}

    assert begun | {State.COMMITTING} == OPEN
