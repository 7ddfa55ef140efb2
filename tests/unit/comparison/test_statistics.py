"""Intervals, Holm's rule, power and verdicts, against numbers worked out by hand or tabulated."""

from __future__ import annotations

import math

import pytest

from fxgraft.comparison.statistics import detectable, pairs_needed, power, verdicts


def judged(after, before=None, **options):
    before = [0.0] * len(after) if before is None else before
    (found,) = verdicts({"x": (before, after)}, **{"interest": 0.5, **options})
    return found


def test_an_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.30265, so 2 ± 4.30265 / √3.
    found = judged([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.pairs, found.bare, found.patched, found.difference, found.deviation) == (
        3,
        2.0,
        4.0,
        2.0,
        1.0,
    )
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    # t = 2 √3 = 3.4641 with 2 degrees of freedom: p = 1 − t / √(2 + t²).
    assert found.p == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(2 + 12), abs=1e-9)


def test_holm_by_hand():
    """p-values below, above and far above: held against 0.05 / 3, 0.05 / 2, and again 0.05 / 2 as the second fails."""
    rows = {
        "first": [1.0, 1.1, 0.9, 1.0],
        "second": [1.0, 2.0, 3.0, 0.5],
        "third": [1.0, -1.0, 2.0, 0.5],
    }
    found = {
        each.variant: each for each in verdicts({k: ([0.0] * 4, v) for k, v in rows.items()}, interest=0.1)
    }
    assert [each.level for each in found.values()] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2])
    raw = {name: judged(values, interest=0.1).p for name, values in rows.items()}
    assert raw["first"] < 0.05 / 3
    assert 0.05 / 2 < raw["second"] < raw["third"]
    assert found["first"].p == pytest.approx(3 * raw["first"])
    assert found["second"].p == pytest.approx(2 * raw["second"])
    assert found["third"].p == pytest.approx(max(raw["third"], 2 * raw["second"]))
    for each in found.values():  # an interval excludes zero exactly where the rule rejects
        assert (each.low > 0 or each.high < 0) == (each.p < 0.05)


def test_power_is_the_textbooks():
    # Cohen, effect size 0.5, two-sided 5 %: 34 pairs for 80 % power, which they then have at 80.8 %.
    assert pairs_needed(1.0, 0.5) == 34
    assert power(0.5, 1.0, 34) == pytest.approx(0.8077775, abs=1e-5)
    assert power(0.0, 1.0, 10) == pytest.approx(0.05, abs=1e-6)
    assert power(2.0, 1.0, 6) == power(-2.0, 1.0, 6) == power(20.0, 10.0, 6)


@pytest.mark.parametrize("pairs", [2, 3, 5, 32, 200])
def test_what_can_be_shown_is_shown_with_the_wanted_power(pairs):
    assert power(detectable(0.049, pairs), 0.049, pairs) == pytest.approx(0.8, abs=1e-6)


def test_the_edges_of_power():
    assert detectable(1.0, 1) == math.inf
    assert detectable(0.0, 5) == 0.0
    assert power(0.1, 0.0, 5) == 1.0
    assert power(0.0, 0.0, 5) == 0.0
    assert pairs_needed(1.0, 1e-6) == 10_000


@pytest.mark.parametrize(
    ("after", "options", "sentence"),
    [
        ([1.0, 1.1, 0.9], {}, "helps: +0.75 to +1.2"),
        ([-1.0, -1.1, -0.9], {}, "hurts: -1.2 to -0.75"),
        ([-1.0, -1.1, -0.9], {"lower_is_better": True}, "helps: -1.2 to -0.75"),
        ([0.1, -0.1, 0.0], {}, "no difference larger than ±0.25"),
        ([3.0, -2.0, 1.0], {}, "too few pairs: 198 more would show 0.5"),
        ([1.0, 3.0, -2.0, 5.0], {"interest": 0.02}, "too few pairs: over 10000 more would show 0.02"),
        ([0.0] * 6, {}, "no difference larger than ±0"),
        ([1.0], {}, "too few pairs: one pair has no interval; at least 3"),
        (
            [1.0, 1.1, 0.9],
            {"diverged": {"x": (1, 2)}},
            "helps: +0.75 to +1.2; 2 runs diverged; 1 bare run diverged",
        ),
    ],
)
def test_verdicts(after, options, sentence):
    assert judged(after, **options).sentence() == sentence


def test_enough_pairs_that_show_nothing_are_no_call_for_more():
    """Their interval may be wider than what matters; the number of pairs was enough to show that much."""
    values = [0.55, -0.55] * 17
    found = judged(values, interest=0.3)
    assert found.more == 0
    assert found.word == "no difference"


def test_a_unit_and_a_factor():
    assert (
        judged([0.01, 0.011, 0.009], interest=0.02).sentence(100, " points") == "helps: +0.75 to +1.2 points"
    )


def test_a_variant_without_a_pair_has_no_verdict():
    assert verdicts({"x": ([], []), "y": ([0.0, 0.0], [1.0, 1.1])}, interest=0.1)[0].variant == "y"


def test_equal_differences_of_shares_are_equal():
    """8/13 − 7/13 and 9/13 − 8/13 differ in the last digit of a float."""
    found = judged([8 / 13, 9 / 13], [7 / 13, 8 / 13], interest=0.02)
    assert found.sentence() == "too few pairs: all 2 differ by the same; at least 6"
    assert found.p == 1.0
    assert judged([(k + 1) / 13 for k in range(6)], [k / 13 for k in range(6)], interest=0.02).word == "helps"


@pytest.mark.parametrize("step", [0.0, 0.05])
def test_a_few_pairs_that_agree_to_the_last_digit_show_nothing(step):
    """Scores of few images are coarse: two equal differences are chance, six of one sign are not."""
    few = judged([0.5 + step] * 2, [0.5] * 2)
    assert (few.word, few.more, few.p, few.low) == ("too few pairs", 4, 1.0, -math.inf)
    assert few.sentence() == "too few pairs: all 2 differ by the same; at least 6"
    assert judged([0.5 + step] * 6, [0.5] * 6).word == ("helps" if step else "no difference")
