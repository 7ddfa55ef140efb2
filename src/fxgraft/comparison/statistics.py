"""The statistics of paired runs: differences, intervals, verdicts, and what a number of pairs can show.

A pair is two runs that differ in the graft alone: the same images held out, the same seed. The mean difference
gets the interval of Student's t over the pairs. Several variants against one bare network are several tests:
their levels follow Holm's step-down rule (Holm, Scandinavian Journal of Statistics, 1979).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.05
POWER = 0.8
_MOST_PAIRS = 10_000
_ROUNDING = 1e-6
_EQUAL_PAIRS = 6
"""Pairs that must agree to the last digit before they count: scores are shares of a few images, so that two or three
equal differences are chance. Six of one sign are below 5 % in a sign test."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one variant, from its pairs.

    Scores and differences are on the scale of the score: shares for accuracies.

    Attributes:
        variant: the graft as it was written.
        pairs: number of pairs.
        bare: mean score of the bare runs of the pairs.
        patched: mean score of the patched runs.
        difference: mean of patched − bare.
        deviation: standard deviation of the differences; NaN with one pair.
        low: lower end of the interval of the mean difference.
        high: upper end.
        level: error level of the interval, after Holm's correction: 0.05 with one variant.
        p: p-value of the paired t test, corrected in the same way.
        detectable: the smallest difference that so many pairs show with 80 % power at this deviation.
        more: pairs to add until `interest` would be shown with 80 % power; 0 where there are enough.
        interest: the smallest difference that is asked for.
        lower_is_better: whether small scores are good.
        diverged: patched runs whose loss or outputs stopped being finite.
        bare_diverged: runs of the baseline whose loss or outputs stopped being finite.
        baseline: what the variant is compared with, as it was written.
    """

    variant: str
    pairs: int
    bare: float
    patched: float
    difference: float
    deviation: float
    low: float
    high: float
    level: float
    p: float
    detectable: float
    more: int
    interest: float
    lower_is_better: bool = False
    diverged: int = 0
    bare_diverged: int = 0
    baseline: str = "bare"

    @property
    def word(self) -> str:
        """One of "helps", "hurts", "no difference", "too few pairs"."""
        if self.low > 0 or self.high < 0:
            return "helps" if (self.difference > 0) != self.lower_is_better else "hurts"
        if self.bound <= self.interest or (self.pairs > 1 and not self.more):
            return "no difference"
        return "too few pairs"

    @property
    def bound(self) -> float:
        """The largest difference, in either direction, that the interval allows."""
        return max(abs(self.low), abs(self.high))

    def sentence(self, factor: float = 1.0, unit: str = "") -> str:
        """Write the verdict out.

        Args:
            factor: on every difference: 100 for percentage points.
            unit: behind every difference.
        """
        if self.word in ("helps", "hurts"):
            text = f"{self.word}: {factor * self.low:+.2g} to {factor * self.high:+.2g}{unit}"
        elif self.word == "no difference":
            text = f"no difference larger than ±{factor * self.bound:.2g}{unit}"
        elif self.pairs < 2:
            text = "too few pairs: one pair has no interval; at least 3"
        elif self.low == -math.inf:
            text = f"too few pairs: all {self.pairs} differ by the same; at least {_EQUAL_PAIRS}"
        else:
            more = f"{self.more}" if self.pairs + self.more < _MOST_PAIRS else f"over {_MOST_PAIRS}"
            text = f"too few pairs: {more} more would show {factor * self.interest:.2g}{unit}"
        counts = ((self.diverged, ""), (self.bare_diverged, f"{self.baseline} "))
        runs = [f"{count} {kind}run{'s' * (count > 1)} diverged" for count, kind in counts if count]
        return "; ".join([text, *runs])


def verdicts(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    interest: float,
    level: float = LEVEL,
    lower_is_better: bool = False,
    diverged: Mapping[str, tuple[int, int]] | None = None,
    baseline: str = "bare",
) -> list[Verdict]:
    """Judge every variant against the bare network, or another baseline.

    The variants' p-values are sorted; the k-th smallest of m is held against level / (m − k + 1) until one is not
    below its level, whose level all later ones keep. Each interval is drawn at the level of its variant, so that it
    excludes zero exactly where Holm's rule rejects.

    Args:
        pairs: by variant, the bare and the patched scores, pair by pair.
        interest: the smallest difference that matters, on the scale of the score.
        level: family-wise error level.
        lower_is_better: whether small scores are good.
        diverged: by variant, how many bare and patched runs diverged.
        baseline: what the variants are compared with, as it was written.

    Returns:
        One verdict a variant with at least one pair, in the order given.
    """
    differences = {name: np.subtract(after, before) for name, (before, after) in pairs.items() if len(after)}
    raw = {name: _p(values) for name, values in differences.items()}
    judged = {}
    rejecting, own, running = True, level, 0.0
    for rank, name in enumerate(sorted(raw, key=lambda n: raw[n])):
        left = len(raw) - rank
        if rejecting:
            own = level / left
            rejecting = raw[name] < own
        running = max(running, min(1.0, raw[name] * left))
        before, after = pairs[name]
        judged[name] = _verdict(
            name,
            before,
            after,
            own,
            running,
            interest,
            lower_is_better,
            (diverged or {}).get(name, (0, 0)),
            baseline,
        )
    return [judged[name] for name in differences]


def _verdict(
    name: str,
    before: Sequence[float],
    after: Sequence[float],
    level: float,
    p: float,
    interest: float,
    lower_is_better: bool,
    diverged: tuple[int, int],
    baseline: str,
) -> Verdict:
    from scipy import stats

    values = np.subtract(after, before)
    count, mean = len(values), float(np.mean(values))
    deviation = float(np.std(values, ddof=1)) if count > 1 else math.nan
    reach, more = math.inf, 2
    equal = _all_equal(values)
    if equal:
        more = _EQUAL_PAIRS - count
    elif count > 1:
        more = max(0, pairs_needed(deviation, interest, level) - count)
        reach = float(stats.t.ppf(1 - level / 2, count - 1)) * deviation / math.sqrt(count)
    return Verdict(
        variant=name,
        pairs=count,
        bare=float(np.mean(before)),
        patched=float(np.mean(after)),
        difference=mean,
        deviation=deviation,
        low=mean - reach,
        high=mean + reach,
        level=level,
        p=p,
        detectable=math.inf if equal else detectable(deviation, count, level),
        more=more,
        interest=interest,
        lower_is_better=lower_is_better,
        bare_diverged=diverged[0],
        diverged=diverged[1],
        baseline=baseline,
    )


def _all_equal(values: np.ndarray) -> bool:
    """Tell whether a few pairs agree so well that their deviation says nothing."""
    return 1 < len(values) < _EQUAL_PAIRS and _same(values)


def _same(values: np.ndarray) -> bool:
    """Tell whether values differ by rounding alone: 8/13 − 7/13 and 9/13 − 8/13 are not the same number."""
    return bool(np.ptp(values) <= _ROUNDING * max(1.0, float(np.abs(values).max())))


def _p(values: np.ndarray) -> float:
    if len(values) < 2 or _all_equal(values):
        return 1.0
    if _same(values):  # no difference at all, or one without any noise
        return float(bool(np.abs(values).max() <= _ROUNDING))
    from scipy import stats

    tested: Any = stats.ttest_1samp(values, 0.0)  # scipy's own types know less than it returns
    return float(tested.pvalue)


def power(difference: float, deviation: float, pairs: int, level: float = LEVEL) -> float:
    """Return the probability that the paired t test shows a true difference.

    Args:
        difference: true mean difference.
        deviation: standard deviation of the differences.
        pairs: number of pairs, 2 or more.
        level: two-sided error level.
    """
    from scipy import stats

    if deviation == 0:
        return float(difference != 0)
    centre = abs(difference) / deviation * math.sqrt(pairs)
    limit = stats.t.ppf(1 - level / 2, pairs - 1)
    # The other tail's share underflows to NaN far out, where it is zero.
    tails = stats.nct.sf(limit, pairs - 1, centre), stats.nct.cdf(-limit, pairs - 1, centre)
    return float(sum(np.nan_to_num(tail) for tail in tails))


def detectable(deviation: float, pairs: int, level: float = LEVEL, wanted: float = POWER) -> float:
    """Return the smallest true difference that so many pairs show with the wanted power.

    Args:
        deviation: standard deviation of the differences; with 1 the answer is in deviations.
        pairs: number of pairs.
        level: two-sided error level.
        wanted: probability of showing it.

    Returns:
        The difference, infinite with fewer than two pairs.
    """
    from scipy import optimize

    if pairs < 2:
        return math.inf
    if deviation == 0:
        return 0.0
    top = 1.0
    while power(top, 1.0, pairs, level) < wanted:
        top *= 2
    root: Any = optimize.brentq(lambda d: power(d, 1.0, pairs, level) - wanted, 0.0, top)
    return deviation * float(root)


def pairs_needed(deviation: float, difference: float, level: float = LEVEL) -> int:
    """Return the number of pairs that show a true difference with the power `POWER`, at most 10 000.

    Args:
        deviation: standard deviation of the differences, from a pilot.
        difference: true mean difference, not zero.
        level: two-sided error level.
    """
    counts = range(2, _MOST_PAIRS)
    return 2 + bisect_left(counts, POWER, key=lambda pairs: power(difference, deviation, pairs, level))
