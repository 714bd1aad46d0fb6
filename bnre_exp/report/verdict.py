"""Did re-estimation help? In a sentence, from what was measured on the same samples before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bnre_exp.algorithms.significance import PairedTest, paired_test
from bnre_exp.errors import UserError, counted
from bnre_exp.tasks.task import Evaluation

HELPED, HARMED, SAME, UNCLEAR = "helped", "harmed", "no difference", "unclear"
_EQUAL = 1e-5  # of a headline metric that is the mean of the scores, and of that mean


@dataclass(frozen=True)
class Verdict:
    """What one step did. stage: the row, as metrics name it, or :data:`BESIDE`; word: one of helped, harmed, no
    difference, unclear; sentence: for people; test: of the samples' scores; interval: of the row's headline metric,
    given that of the row it is compared with; None where the metric is not the mean of the scores."""

    stage: str
    word: str
    sentence: str
    test: PairedTest
    interval: tuple[float, float] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The test as metrics, without the ``stage/`` before the name."""
        test = self.test
        return {
            "score_change": test.change, "score_low": test.low, "score_high": test.high, "p_value": test.p_value,
        }  # fmt: skip


def verdicts(
    evaluations: Mapping[str, Evaluation], seconds: Mapping[str, float], batches: Mapping[str, float]
) -> list[Verdict]:
    """All that can be said of what a run has measured so far, in its order.

    evaluations, seconds (of the work), batches (of re-estimation): of its rows, by the name that metrics have.
    """
    not_trained = "recal_only" if "recal_only" in evaluations else "ptq"
    has_qat = "qat" in evaluations
    cost = {name: f", from {counted(int(count), 'batch', 'batches')} in {{:.1f}} s" for name, count in batches.items()}
    found = [
        _judged("reest_only", "reest_only", not_trained, evaluations, seconds, cost.get("reest_only", ""), ALONE),
        _judged(
            "reest", "reest", "qat" if has_qat else not_trained, evaluations, seconds, cost.get("reest", ""),
            AFTER_QAT if has_qat else WITHOUT_QAT,
        ),
    ]  # fmt: skip
    last = "reest" if "reest" in evaluations else "qat"
    if has_qat:
        training = {**seconds, last: seconds["qat"]}
        found.append(_judged(BESIDE, last, "reest_only", evaluations, training, ", for {:.1f} s of training", QAT))
    return [verdict for verdict in found if verdict is not None]


BESIDE = "qat_beside_reest_only"  # QAT's verdict: its last row, compared with re-estimation alone
Words = Mapping[str, tuple[str, str]]  # how the sentence begins, and what to do, by the word
ALONE: Words = {
    HELPED: ("Re-estimation alone, without training, helped", ""),
    SAME: ("Re-estimation alone, without training, made no difference that {images} can show", ""),
    HARMED: ("Re-estimation alone, without training, harmed", ""),
    UNCLEAR: ("Of re-estimation alone, the metric and the images' scores say different things", ""),
}
WITHOUT_QAT: Words = {
    HELPED: ("Re-estimation helped", "Ship the re-estimated network."),
    SAME: ("Re-estimation made no difference that {images} can show", "Keep it or drop it."),
    HARMED: (
        "Re-estimation harmed",
        "Leave it out (reest=off), or give it more batches, and images like those of training.",
    ),
    UNCLEAR: (
        "Of re-estimation, the metric and the images' scores say different things",
        "Decide by what counts for you, on more test images.",
    ),
}
AFTER_QAT: Words = {
    word: (f"After QAT, {said[0].lower()}{said[1:]}", advice) for word, (said, advice) in WITHOUT_QAT.items()
}
QAT: Words = {
    HELPED: ("QAT brought more than re-estimation alone", ""),
    SAME: (
        "QAT brought nothing beyond re-estimation alone that {images} can show",
        "Without training (qat=off) you would have had it sooner.",
    ),
    HARMED: (
        "QAT ended below re-estimation alone",
        "Ship the network that was re-estimated and not trained (qat=off), or train otherwise.",
    ),
    UNCLEAR: ("Of QAT beside re-estimation alone, the metric and the images' scores say different things", ""),
}


def _judged(
    name: str, stage: str, before: str, evaluations: Mapping[str, Evaluation], seconds: Mapping[str, float], cost: str,
    words: Words,
) -> Verdict | None:  # fmt: skip
    if stage not in evaluations or before not in evaluations:
        return None
    start, end = evaluations[before], evaluations[stage]
    try:
        test = paired_test(start.scores, end.scores)
    except UserError:  # a user's own task may give scores that are no numbers
        return None
    headline, change = end.headline, end.value - start.value
    for_better = change if headline.higher_is_better else -change
    is_mean = abs(for_better - test.change) <= _EQUAL * max(1.0, abs(change))
    word = SAME if not test.is_sure else HELPED if test.change > 0 else HARMED
    if test.is_sure and not is_mean and for_better * test.change < 0:
        word = UNCLEAR
    told = f"{headline.label} {start.value:.4f} → {end.value:.4f} ({change:+.4f}; "
    low, high = (test.low, test.high) if headline.higher_is_better or not is_mean else (-test.high, -test.low)
    told += "" if is_mean else f"score of an image {test.change:+.4f}, "
    told += f"{test.confidence:.0%} interval {low:+.4f} to {high:+.4f}"
    is_apart = test.low > 0 or test.high < 0  # the interval is an approximation, and may part from the exact test
    told += f", but p = {test.p_value:.3f} by {test.test})" if is_apart != test.is_sure else ")"
    said, advice = words[word]
    begin = said.format(images=counted(test.count, "test image"))
    interval = (start.value + low, start.value + high) if is_mean else None
    return Verdict(name, word, f"{begin}: {told}{cost.format(seconds[stage])}. {advice}".rstrip(), test, interval)
