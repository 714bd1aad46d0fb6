"""The page of results: of what its jobs measure, over seeds. What is measured there takes hours; here it is made up."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from bnre_exp.cli.compose import compose_config
from scripts.bench.results import page
from scripts.bench.results.cases import COMMON, CONTROLLED, CURVE, LATER, SCHEMES, jobs
from scripts.bench.results.pictures import draw
from scripts.bench.results.summary import AIMET, summary

ROWS = ("fp32", "ptq", "recal_only", "reest", "fold", "reest_only", "qat_start", "qat", "recalibrated")


def measured(right: int, images: int = 200) -> dict:
    """A job of which every row has ``right`` of ``images`` right."""
    bits = base64.b64encode(np.packbits(np.arange(images) < right).tobytes()).decode()
    row = {"value": right / images, "right": bits, "images": images, "seconds": 1.0}
    return {
        "rows": {name: row for name in ROWS}, "metrics": {"reest/batches": right / 10},
        "curve": {str(count): right / images for count in CURVE},
    }  # fmt: skip


@pytest.fixture
def known() -> dict:
    """Of MobileNetV2 two seeds, and of a third seed the first job alone. AIMET: 100 of 200 right, we: 160 and 120."""
    found = {}
    for seed, right in ((0, 160), (1, 120)):
        for scheme in SCHEMES:
            found.update({("mobilenet_v2", seed, scheme, job): measured(right) for job in jobs(scheme)})
            found.update({("mobilenet_v2", seed, scheme, job): measured(100) for job in AIMET})
    found["mobilenet_v2", 2, SCHEMES[0], "ptq"] = measured(10)
    about = {"command": "results.py", "torch": "2", "machine": "m", "epochs": 3, "aimet": "2", "aimet_fold": {}}
    return {**about, **summary(found)}


def test_every_job_composes():
    names = {
        name for scheme in SCHEMES for name, how in jobs(scheme).items() if compose_config([*COMMON, *LATER, *how])
    }
    assert {"ptq", "qat none", "qat frozen", "qat freezing"} <= names
    assert "qat frozen" in jobs(CONTROLLED[0]) and "qat frozen" not in jobs("w4a8")


def test_only_seeds_that_are_whole_count(known):
    assert known["seeds"] == {"mobilenet_v2": {scheme: [0, 1] for scheme in SCHEMES}}
    assert known["values"]["mobilenet_v2"]["w4a8"]["ptq"]["reest"] == [0.8, 0.6]


def test_changes_are_of_the_same_images_and_their_certainty_is_counted(known):
    tests = known["tests"]["mobilenet_v2"]["w3a8"]["aimet"]
    assert [test["change"] for test in tests] == pytest.approx([0.3, 0.1]) and all(test["sure"] for test in tests)
    assert [test["change"] for test in known["tests"]["mobilenet_v2"]["w3a8"]["pooled"]] == [0, 0]
    cells = page.Cells(known, "mobilenet_v2").at("w3a8")
    assert cells.change("aimet") == "+20.00 ± 14.14, sure in 2 of 2"
    assert cells("ptq", "reest") == "70.00 ± 14.14" and cells.count("ptq") == "12 to 16"


def test_the_page_has_a_row_a_scheme_and_says_where_a_peer_is_ahead(known, tmp_path):
    text = page.markdown(known, ["a.png", "b.png"])
    assert "ResNet18\n" not in text and text.count("| W4A4 (2) |") == 8
    assert "Nowhere, on average over the seeds." in text
    for test in known["tests"]["mobilenet_v2"]["w2a8"]["aimet qat"]:
        test["change"] = -test["change"]
    text = page.markdown(known, ["a.png", "b.png"])
    assert "- MobileNetV2, W2A8, QAT from none, AIMET as documented: -20.00 ± 14.14, sure in 2 of 2" in text
    assert all(path.stat().st_size > 10_000 for path in draw(known, tmp_path, "x"))
