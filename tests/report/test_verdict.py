"""The sentences that a run ends with."""

from __future__ import annotations

import math

import pytest
import torch

from bnre_exp.report.verdict import BESIDE, verdicts
from bnre_exp.tasks import Evaluation
from bnre_exp.tasks.task import Headline

TOP1, MAE, MAP = Headline("top1", "top-1"), Headline("mae", "MAE", higher_is_better=False), Headline("map", "mAP")
SECONDS = {"reest_only": 4.06, "reest": 4.2, "qat": 61.0, "ptq": 1.0}
BATCHES = {"reest_only": 100.0, "reest": 100.0}


def right(count: int, of: int = 400, headline: Headline = TOP1) -> Evaluation:
    """So many of the samples right, the first ones."""
    scores = (torch.arange(of) < count).float()
    return Evaluation({headline.name: count / of}, headline, of, scores.long(), scores)


def told(**evaluations: Evaluation) -> dict[str, tuple[str, str]]:
    return {v.stage: (v.word, v.sentence) for v in verdicts(evaluations, SECONDS, BATCHES)}


def test_without_qat_the_start_is_what_was_recalibrated():
    found = told(fp32=right(390), ptq=right(50), recal_only=right(60), reest=right(380))
    assert found == {
        "reest": (
            "helped",
            "Re-estimation helped: top-1 0.1500 → 0.9500 (+0.8000; 95% interval +0.7560 to +0.8360), from 100 batches "
            "in 4.2 s. Ship the re-estimated network.",
        )
    }
    assert told(ptq=right(50), reest=right(380))["reest"][1].startswith("Re-estimation helped: top-1 0.1250 → 0.9500")


def test_an_interval_that_parts_from_the_exact_test_is_explained():
    start, end = torch.zeros(128), torch.zeros(128)
    start[:3], end[3:14] = 1, 1  # 11 better, 3 worse
    found = told(
        **{
            name: Evaluation({"top1": float(scores.mean())}, TOP1, 128, scores.long(), scores)
            for name, scores in (("ptq", start), ("reest", end))
        }
    )
    word, sentence = found["reest"]
    assert word == "no difference" and "interval +0.0022 to +0.1209, but p = 0.057 by McNemar, exact), from" in sentence


def test_with_qat_each_step_has_its_own_gain():
    found = told(
        ptq=right(40),
        recal_only=right(40),
        reest_only=right(300),
        qat_start=right(290),
        qat=right(380),
        reest=right(379),
    )
    assert {stage: word for stage, (word, _) in found.items()} == {
        "reest_only": "helped", "reest": "no difference", BESIDE: "helped",
    }  # fmt: skip
    assert found["reest_only"][1].startswith("Re-estimation alone, without training, helped: top-1 0.1000 → 0.7500")
    assert found["reest_only"][1].endswith(", from 100 batches in 4.1 s.")
    assert found["reest"][1].startswith(
        "After QAT, re-estimation made no difference that 400 test images can show: top-1 0.9500 → 0.9475 (-0.0025; "
    )
    assert found["reest"][1].endswith("in 4.2 s. Keep it or drop it.")
    assert found[BESIDE][1].startswith("QAT brought more than re-estimation alone: top-1 0.7500 → 0.9475 (+0.1975; ")
    assert found[BESIDE][1].endswith(", for 61.0 s of training.")


def test_harm_is_said_and_so_is_what_to_do():
    found = told(ptq=right(300), reest_only=right(380), qat=right(350), reest=right(300))
    assert found["reest"][0] == "harmed" and "After QAT, re-estimation harmed" in found["reest"][1]
    assert found["reest"][1].endswith(
        "Leave it out (reest=off), or give it more batches, and images like those of training."
    )
    assert found[BESIDE][0] == "harmed" and "QAT ended below re-estimation alone" in found[BESIDE][1]
    nothing_more = told(ptq=right(100), reest_only=right(380), qat=right(380), reest=right(380))[BESIDE][1]
    assert "QAT brought nothing beyond re-estimation alone that 400 test images can show" in nothing_more


def scored(value: float, scores: torch.Tensor, headline: Headline) -> Evaluation:
    return Evaluation({headline.name: value}, headline, len(scores), torch.zeros(len(scores)), scores)


def test_a_metric_of_which_less_is_better_is_told_in_its_own_direction():
    errors = torch.linspace(1, 2, 200).double()
    before, after = scored(float(errors.mean()), -errors, MAE), scored(float(errors.mean()) - 0.25, 0.25 - errors, MAE)
    word, sentence = told(ptq=before, reest=after)["reest"]
    assert word == "helped" and "MAE 1.5000 → 1.2500 (-0.2500; 95% interval -0.2500 to -0.2500)" in sentence


def test_a_metric_that_is_no_mean_of_scores_is_told_beside_them():
    scores = torch.rand(100, generator=torch.Generator().manual_seed(0))
    before = scored(0.3, scores, MAP)
    word, sentence = told(ptq=before, reest=scored(0.4, scores + 0.05, MAP))["reest"]
    assert word == "helped" and "mAP 0.3000 → 0.4000 (+0.1000; score of an image +0.0500, 95% interval" in sentence
    word, sentence = told(ptq=before, reest=scored(0.28, scores + 0.05, MAP))["reest"]
    assert word == "unclear" and sentence.startswith(
        "Of re-estimation, the metric and the images' scores say different"
    )


def test_scores_that_are_no_numbers_have_no_verdict():
    broken = scored(0.3, torch.full((4,), math.nan), MAP)
    assert told(ptq=broken, reest=broken) == {} == told(fp32=right(10), ptq=right(9))


def test_figures_of_the_test_go_with_it():
    (verdict,) = verdicts({"ptq": right(50), "reest": right(380)}, SECONDS, BATCHES)
    assert verdict.metrics["score_change"] == pytest.approx(330 / 400) and verdict.metrics["p_value"] < 1e-50
    assert verdict.metrics["score_low"] < 330 / 400 < verdict.metrics["score_high"]


def test_the_interval_is_of_the_metric_and_there_is_none_where_scores_are_another():
    (found,) = verdicts({"ptq": right(50), "reest": right(380)}, SECONDS, BATCHES)
    assert found.interval == pytest.approx((0.125 + found.test.low, 0.125 + found.test.high))
    torch.manual_seed(0)
    errors = torch.rand(100, dtype=torch.float64)
    before, after = (scored(float(e.mean()), -e, MAE) for e in (errors, errors / 2))
    (found,) = verdicts({"ptq": before, "reest": after}, SECONDS, BATCHES)
    low, high = found.interval
    assert low < after.value < high < before.value and high - low == pytest.approx(found.test.high - found.test.low)
    (found,) = verdicts({"ptq": scored(0.1, errors, MAP), "reest": scored(0.9, errors + 1, MAP)}, SECONDS, BATCHES)
    assert found.interval is None
