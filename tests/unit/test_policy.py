"""Which ending a transaction gets: every cause, in every state and mode."""

import itertools
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_dbscope import CommitPolicyError, ResponseHead, commit_on_success, commit_unless_error
from asgi_dbscope._lifecycle import ROLLBACK_ONLY, State
from asgi_dbscope._policy import ENDINGS, Cause, CommitPolicy, Ending, Mode, decide_ending

MODES: tuple[Mode, ...] = get_args(Mode)
OK = ResponseHead(200)
POLICIES: dict[bool, CommitPolicy] = {True: lambda head: True, False: lambda head: False}

heads = st.builds(
    ResponseHead,
    status=st.integers(min_value=-1, max_value=1000),
    headers=st.just(()),
    exception=st.none() | st.builds(LookupError),
    raised=st.booleans(),
)


def never_asked(head: ResponseHead) -> bool:
    """A policy where none has a say."""
    raise AssertionError(head)


def expected_ending(cause: Cause, state: State, mode: Mode, answer: bool) -> Ending:
    """The rules, in the words of the documentation."""
    if state in {State.ROLLBACK_ONLY_IDLE, State.ROLLBACK_ONLY_ACTIVE}:
        return Ending.ROLLBACK
    if cause is Cause.RELEASED:
        return Ending.COMMIT
    if mode == "manual":
        return Ending.ROLLBACK
    if cause is Cause.HEAD:
        return Ending.COMMIT if answer else Ending.ROLLBACK
    return Ending.COMMIT if cause is Cause.COMPLETED else Ending.ROLLBACK


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("state", State)
def test_every_cause_in_every_state_and_mode(cause, state):
    """G3, G4: The ending is the one of the rules, for each cause, state, mode and answer."""
    for mode, answer in itertools.product(MODES, (True, False)):
        ending = decide_ending(cause, state, mode=mode, policy=POLICIES[answer], head=OK)
        assert expected_ending(cause, state, mode, answer) is ending


@pytest.mark.parametrize("cause", [each for each in Cause if each is not Cause.HEAD])
def test_policy_is_asked_at_the_head_only(cause):
    """G3: No other cause than the head asks the commit policy."""
    for state, mode in itertools.product(State, MODES):
        decide_ending(cause, state, mode=mode, policy=never_asked, head=OK)


def test_policy_is_not_asked_where_nothing_may_commit():
    """G4: A rollback-only scope, and mode manual, roll back without asking."""
    for state in ROLLBACK_ONLY:
        for mode in MODES:
            assert Ending.ROLLBACK is decide_ending(
                Cause.HEAD, state, mode=mode, policy=never_asked, head=OK
            )
    assert Ending.ROLLBACK is decide_ending(
        Cause.HEAD, State.ACTIVE, mode="manual", policy=never_asked, head=OK
    )


def test_head_that_can_not_be_understood_rolls_back():
    """G3: A head whose status is no number commits nothing, and no policy is asked."""
    ending = decide_ending(Cause.HEAD, State.ACTIVE, policy=never_asked, head=None)

    assert Ending.ROLLBACK is ending


def test_every_cause_has_its_row():
    """G3: The table of endings leaves out the head alone, where the policy decides."""
    assert set(Cause) - {Cause.HEAD} == ENDINGS.keys()


@given(head=heads, state=st.sampled_from(State), mode=st.sampled_from(MODES))
def test_policy_is_handed_the_head(head, state, mode):
    """G3: The policy is asked with the very head, and once at most."""
    asked = []

    def policy(given_head):
        asked.append(given_head)
        return True

    ending = decide_ending(Cause.HEAD, state, mode=mode, policy=policy, head=head)

    assert len(asked) == (ending is Ending.COMMIT)
    assert all(each is head for each in asked)


@given(head=heads)
def test_commit_unless_error(head):
    """G3: By default a response commits below 500, unless it stands for an exception."""
    assert (head.status < 500 and not head.raised) is commit_unless_error(head)
    assert (Ending.COMMIT if commit_unless_error(head) else Ending.ROLLBACK) is decide_ending(
        Cause.HEAD, State.ACTIVE, head=head
    )


@given(head=heads)
def test_commit_on_success(head):
    """G3: `commit_on_success` commits below 400, unless the response stands for an exception."""
    assert (head.status < 400 and not head.raised) is commit_on_success(head)


@given(head=heads)
def test_commit_on_success_is_the_stricter_one(head):
    """G3: What `commit_on_success` commits, `commit_unless_error` commits too."""
    assert commit_on_success(head) <= commit_unless_error(head)


@pytest.mark.parametrize(
    ("status", "by_default", "on_success"),
    [
        (200, True, True),
        (204, True, True),
        (303, True, True),
        (399, True, True),
        (400, True, False),
        (404, True, False),
        (422, True, False),
        (499, True, False),
        (500, False, False),
        (503, False, False),
        (599, False, False),
    ],
)
def test_statuses_of_the_presets(status, by_default, on_success):
    """G3: A 4xx that was returned commits by default; a 5xx never does; an exception never does."""
    presets: list[tuple[CommitPolicy, bool]] = [
        (commit_unless_error, by_default),
        (commit_on_success, on_success),
    ]
    for policy, expected in presets:
        assert expected is policy(ResponseHead(status))
        assert False is policy(ResponseHead(status, exception=LookupError(), raised=True))


@given(
    answer=st.none() | st.integers() | st.sampled_from(["", "commit"]) | st.lists(st.none()),
    status=st.integers(100, 599),
)
def test_answer_that_is_no_boolean_is_told(answer, status):
    """G3: A policy answers True or False; anything else is an error that names its type."""
    with pytest.raises(CommitPolicyError) as caught:
        decide_ending(
            Cause.HEAD, State.ACTIVE, policy=lambda head: answer, head=ResponseHead(status)
        )

    kind = type(answer).__name__
    assert f"answered with a {kind} for status {status}" in str(caught.value)


def test_error_of_a_policy_passes_as_it_is():
    """G3: What a policy raises is not wrapped."""
    error = LookupError("no idea")

    def policy(head):
        raise error

    with pytest.raises(LookupError) as caught:
        decide_ending(Cause.HEAD, State.ACTIVE, policy=policy, head=OK)

    assert error is caught.value
