"""What pairs of samples say, and how sure that is."""

import random

from bench.estimate import Estimate, estimate, interval


def test_interval_reaches_over_what_each_process_says():
    """What processes differ by is in it; the figure is the median of all pairs."""
    found = estimate([[1.0, 1.1, 1.2], [2.0, 2.1, 2.2], [1.5, 1.6, 1.7]])

    assert Estimate(1.6, 1.0, 2.2) == found


def test_interval_of_one_process_is_by_rank():
    """Of twenty values the median is between the sixth and the fifteenth, with 95 %."""
    values = [float(each) for each in range(1, 21)]
    random.Random(0).shuffle(values)

    assert (6.0, 15.0) == interval(values)


def test_interval_of_few_is_all_of_them():
    """With less than six values nothing is sure but that it is among them."""
    assert (1.0, 5.0) == interval([3.0, 1.0, 4.0, 5.0, 2.0])
    assert (7.0, 7.0) == interval([7.0])
