"""The table of propagations and the rollback rules: pure, so every case is tried."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_dbscope import ConfigurationError, Propagation
from asgi_dbscope._propagation import (
    ENTRIES,
    Entry,
    RollbackRules,
    Situation,
    check_propagation,
)

CASES = list(itertools.product(Propagation, Situation))


class Mild(Exception):  # noqa: N818 - short names for a small tree
    """An exception."""


class Milder(Mild):
    """Below it."""


class Mildest(Milder):
    """Below that."""


class Other(Exception):  # noqa: N818 - as above
    """Beside them."""


class Both(Mildest, Other):
    """Below two."""


TREE = (Mild, Milder, Mildest, Other, Both)
CLASSES = st.sets(st.sampled_from((Exception, *TREE)))


@pytest.mark.parametrize(("propagation", "situation"), CASES)
def test_table_has_an_entry_for_each_propagation_in_each_situation(propagation, situation):
    """No case is left out of the table."""
    assert isinstance(ENTRIES[propagation][situation], Entry)


@pytest.mark.parametrize(("propagation", "situation"), CASES)
def test_entry_is_one_that_the_situation_can_give(propagation, situation):
    """Nothing joins or sets a savepoint where no transaction is, nor begins one where one is."""
    possible = {
        Situation.NO_SCOPE: {Entry.NEW_SCOPE, Entry.AUTOCOMMIT_SCOPE, Entry.REFUSE_WITHOUT},
        Situation.NO_TRANSACTION: {
            Entry.NEW_SCOPE,
            Entry.BEGIN,
            Entry.AS_IS,
            Entry.REFUSE_WITHOUT,
        },
        Situation.IN_TRANSACTION: {
            Entry.NEW_SCOPE,
            Entry.AUTOCOMMIT_SCOPE,
            Entry.JOIN,
            Entry.SAVEPOINT,
            Entry.REFUSE_WITHIN,
        },
    }

    assert ENTRIES[propagation][situation] in possible[situation]


@pytest.mark.parametrize("propagation", ["REQUIRED", "REQUIRES_NEW", "NESTED"])
@pytest.mark.parametrize("situation", list(Situation))
def test_block_that_asks_for_a_transaction_always_has_one(propagation, situation):
    """These three never go without."""
    entry = ENTRIES[Propagation(propagation)][situation]

    assert entry in {Entry.NEW_SCOPE, Entry.BEGIN, Entry.JOIN, Entry.SAVEPOINT}


@pytest.mark.parametrize("propagation", list(Propagation))
def test_propagation_is_known_by_its_name(propagation):
    """A member and its name are one."""
    assert propagation is check_propagation(propagation.value)
    assert propagation is check_propagation(propagation)
    assert propagation == propagation.value


@pytest.mark.parametrize("value", ["", "required", "NEW", None, 1, object])
def test_unknown_propagation_is_told_with_those_that_are(value):
    """The error lists the seven."""
    with pytest.raises(ConfigurationError) as caught:
        check_propagation(value)

    assert repr(value) in str(caught.value)
    for known in Propagation:
        assert repr(known.value) in str(caught.value)


# --------------------------------------------------------------------------------------
# Rollback rules
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [*TREE, KeyboardInterrupt, GeneratorExit])
def test_every_exception_rolls_back_without_rules(error):
    """The default is Python's: what is raised failed."""
    assert RollbackRules().rolls_back(error())
    assert RollbackRules(rollback_for=Mild).rolls_back(error())


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, SystemExit])
def test_what_is_no_exception_rolls_back_whatever_is_named(error):
    """G10: A cancellation and the like can't be forgiven."""
    assert RollbackRules(no_rollback_for=Exception).rolls_back(error())


@given(rolls_back=CLASSES, commits=CLASSES, error=st.sampled_from(TREE))
def test_nearest_named_class_decides(rolls_back, commits, error):
    """Of the classes that are named, the first in the exception's own order decides."""
    named = [cls for cls in error.__mro__ if cls in rolls_back | commits]
    expected = True if not named else named[0] in rolls_back

    rules = RollbackRules(rollback_for=rolls_back, no_rollback_for=tuple(commits))

    assert expected is rules.rolls_back(error())


def test_one_class_may_be_named_without_a_list():
    """A class by itself is as good as a list of one."""
    assert not RollbackRules(no_rollback_for=Mild).rolls_back(Milder())
    assert not RollbackRules(no_rollback_for=[Mild]).rolls_back(Milder())


@pytest.mark.parametrize("wrong", [5, "Mild", [5], Mild(), [Mild, int], BaseException])
@pytest.mark.parametrize("name", ["rollback_for", "no_rollback_for"])
def test_what_is_no_exception_class_is_told(name, wrong):
    """Only classes of Exception can be named."""
    with pytest.raises(ConfigurationError, match=rf"^{name} takes classes of Exception; got"):
        RollbackRules(**{name: wrong})
