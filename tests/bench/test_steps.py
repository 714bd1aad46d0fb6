"""The benchmark of steps: what it times, what it divides by what, and what it says where something is missing."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import warnings
from functools import partial

import pytest
import torch

from bnre_exp import activation_quantizers, reestimate_bn_stats, weight_quantizers
from scripts.bench import steps
from scripts.bench.speed import case as of_case
from scripts.bench.speed import contenders, measure, page, peers, scaling
from scripts.bench.speed.case import EVALUATE, FOLD, INSERT, QAT, REESTIMATE, STEPS, Case, Clock, a_batch, a_call
from scripts.bench.speed.contenders import Variant

TINY = Case("tests.networks:flat_cnn", size=8, batch=4, timed=1)


@pytest.fixture(autouse=True)
def as_it_was():
    """The script silences what is no figure of its own."""
    with warnings.catch_warnings():
        yield
    logging.disable(logging.NOTSET)
    gc.unfreeze()


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which each look takes ten seconds more than the one before: 0, 10, 30, 60, ..."""
    looks = itertools.accumulate(itertools.count(0, 10))
    monkeypatch.setattr(of_case, "now", lambda device: next(looks))


def test_of_a_loader_whole_batches_are_timed_and_not_the_first(monkeypatch):
    seconds = iter([5.0, 11.0])  # looked at when the second batch is asked for, and after the last that is timed
    monkeypatch.setattr(of_case, "now", lambda device: next(seconds))
    clock = Clock(["a", "b"], timed=3, device="cpu", extra=1)
    assert len(clock) == 5 and list(clock) == ["a", "b", "a", "b", "a"] and clock.seconds == 2.0


@pytest.mark.parametrize("extra", [0, 1])
def test_a_function_that_takes_too_few_batches_is_no_figure(extra):
    step = a_batch(lambda loader: list(itertools.islice(loader, 1)), TINY, ["a"], extra)
    with pytest.raises(RuntimeError, match="fewer batches"):
        step()


def test_what_is_prepared_is_not_timed(ticking):
    seen = []
    assert a_call(seen.append, TINY, lambda: of_case.now("cpu"))() == 20 - 0 and seen == [0]


def test_every_contender_trains_with_the_optimizer_of_train(monkeypatch):
    """So that what is compared is the networks; train's own settings are what a user of ours gets."""
    made = []
    original = torch.optim.SGD.__init__
    monkeypatch.setattr(
        torch.optim.SGD, "__init__", lambda self, *a, **k: (original(self, *a, **k), made.append(self.defaults))[0]
    )
    contenders.fp32(TINY, Variant())[QAT]()
    contenders.ours(TINY, Variant())[QAT]()
    same = [{key: settings[key] for key in ("lr", "momentum", "nesterov", "weight_decay")} for settings in made]
    assert len(same) == 2 and same[0] == same[1] and same[0]["nesterov"]


@pytest.mark.parametrize("make", [contenders.fp32, contenders.ours, contenders.ours_weights_only])
def test_contenders_do_their_steps(make):
    done = {name: step() for name, step in make(TINY, Variant()).items()}
    assert set(done) == {
        contenders.fp32: set(STEPS) - {INSERT, FOLD},
        contenders.ours: set(STEPS),
        contenders.ours_weights_only: {REESTIMATE},
    }[make] and all(seconds > 0 for seconds in done.values())  # fmt: skip


def test_ours_with_weights_only_has_float_activations(monkeypatch):
    seen = []

    def watched(sim, *arguments):
        seen.append((len(activation_quantizers(sim)), len(weight_quantizers(sim))))
        return reestimate_bn_stats(sim, *arguments)

    monkeypatch.setattr(contenders, "reestimate_bn_stats", watched)
    contenders.ours_weights_only(TINY, Variant())[REESTIMATE]()
    contenders.ours(TINY, Variant())[REESTIMATE]()
    (without, weights), (quantizers, same) = seen
    assert without == 0 < quantizers and weights == same > 0


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(peers.aimet, marks=pytest.mark.slow),
        pytest.param(peers.brevitas, marks=pytest.mark.slow),
        peers.fvcore,
        peers.torch_update_bn,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_peers_do_their_steps(make):
    rows = list(measure.timings(TINY, {"peer": make}, measure.QUICK))
    assert {row["step"]: row["error"] for row in rows if "error" in row} == {} and rows
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows)


def test_contenders_take_turns_and_what_fails_is_named():
    played = []

    def step(name, seconds):
        played.append(name)
        return next(seconds)

    def contender(name, values):
        return lambda case: {QAT: partial(step, name, iter(values)), **({FOLD: broken} if name == "b" else {})}

    def broken():
        raise ValueError("no\nmore")

    makes = {"a": contender("a", [1, 2, 3]), "b": contender("b", [4, 5, 6])}
    rows = list(measure.timings(TINY, makes, measure.Rounds(seconds=0, least=3)))
    assert played == list("abbaab")
    assert rows == [
        {"step": QAT, "contender": "a", "seconds": [1, 2, 3]},
        {"step": QAT, "contender": "b", "seconds": [4, 5, 6]},
        {"step": FOLD, "contender": "b", "error": "ValueError: no"},
    ]


@pytest.mark.parametrize(("step", "took", "count"), [(QAT, 5, 5), (QAT, 99, 3), (FOLD, 99, 2), (FOLD, 0, 15)])
def test_as_many_rounds_as_there_is_time_for(step, took, count):
    assert measure.Rounds(seconds=25, least=3, least_calls=2, most=15).count(step, took) == count


def known(**seconds):
    """Results of one network in which contenders took these seconds for a QAT step."""
    rows = [{"step": QAT, "contender": name, "seconds": values} for name, values in seconds.items()]
    memory = [{"step": QAT, "contender": name, "bytes": mib << 20} for name, mib in {"FP32": 2, "ours": 3}.items()]
    return {
        "command": "python x.py", "is_quick": False, "missing": {}, "notes": [], "contenders": [*seconds],
        "scaling": [], "machine": steps.machine("cpu"),
        "cases": [{"name": "net 8×8, batch 4", "timings": rows, "memory": memory}],
    }  # fmt: skip


def test_ratios_are_those_of_medians():
    results = known(FP32=[1.0, 2.0, 90.0], ours=[0.1, 3.0, 4.0], AIMET=[6.0, 9.0])
    results["cases"][0]["timings"].append({"step": FOLD, "contender": "AIMET", "error": "KeyError: `x`"})
    text = page.markdown(results, "a.png", None)
    assert "| QAT step, ours / FP32 | 1.50 | ≤ 1.3 |" in text and "| QAT step, AIMET / ours | 2.50 | ≥ 2.5" in text
    assert "| peak memory of a QAT step, ours / FP32 | 1.50 | ≤ 1.35 |" in text
    known_as = known(**{"FP32, compiled": [2.0], "ours": [4.0], "ours, compiled": [1.0], "ours, weights only": [1.0]})
    more = page.markdown(known_as, "a.png", None)
    assert "| QAT step, ours, compiled / FP32, compiled | 0.50 |" in more and "weights only /" not in more
    assert "| QAT step, ours, compiled / ours | 0.25 |" in more
    assert "Brevitas / ours" not in text and "evaluation batch, ours" not in text
    assert "| QAT step | 2.00 (1.00–90.00) | 3.00 (0.100–4.00) | 7.50 (6.00–9.00) |" in text
    assert "| folding | – | – | fails |" in text and "- AIMET, folding: `KeyError: 'x'`" in text


@pytest.mark.parametrize(
    ("is_quick", "load", "words"), [(False, 0.4, []), (True, 0.4, ["rough"]), (False, 9.0, ["busy"])]
)
def test_figures_that_are_not_to_be_relied_on_are_called_so(is_quick, load, words):
    results = known(FP32=[1.0], ours=[2.0]) | {"is_quick": is_quick}
    results["machine"] |= {"load before": load, "cores": 2}
    text = page.markdown(results, "a.png", None)
    assert [word for word in ("rough", "busy") if word in text] == words


@pytest.mark.parametrize("missing", [{}, {"AIMET": "ImportError: none", "Brevitas": "ImportError: none"}])
def test_what_is_not_installed_is_left_out(missing):
    makes = steps.chosen(steps.all_makes([]), [], missing)
    assert ("AIMET" in makes) == ("Brevitas" in makes) == (not missing) and {"FP32", "ours", "update_bn"} <= set(makes)
    named = steps.chosen(steps.all_makes([]), ["ours", "AIMET, channels-last"], missing)
    assert set(named) == ({"ours"} if missing else {"ours", "AIMET, channels-last"})


def test_a_library_that_cannot_be_imported_is_missing(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"one": "json", "two": "no_such_module.x"})
    found = {"two": "ModuleNotFoundError: No module named 'no_such_module'"}
    assert peers.missing(["one", "two, channels-last"]) == found and peers.missing(["one"]) == {}


def test_variants_are_told_to_our_functions_where_they_can_be(monkeypatch):
    more = steps.variants(True, ["bfloat16"])
    assert [v.label("ours") for v in more] == ["ours, compiled", "ours, bfloat16", "ours, compiled, bfloat16"]

    def able(model, loader, *, compile=False, precision="float32"):
        told.append((compile, precision))
        list(loader)

    def unable(model, loader):
        raise AssertionError

    told = []
    monkeypatch.setattr(contenders, "evaluate", able)
    monkeypatch.setattr(contenders, "reestimate_bn_stats", unable)
    made = contenders.ours(TINY, more[2])
    assert REESTIMATE not in made and made[EVALUATE]() > 0 and told == [(True, "bfloat16")]
    assert "ours, compiled: left out of" in (notes := contenders.not_offered(more))[0] and "unable" in notes[0]


def test_the_script_writes_page_figures_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "missing", lambda _: {"AIMET": "ImportError: none"})
    for name, value in {"BATCHES": (2,), "WIDTHS": (0.25,), "DEPTHS": ("resnet18",)}.items():
        monkeypatch.setattr(scaling, name, value)
    monkeypatch.setattr(scaling, "fp32", lambda case, variant: contenders.fp32(TINY, variant))
    monkeypatch.setattr(scaling, "ours", lambda case, variant: contenders.ours(TINY, variant))
    monkeypatch.setattr(scaling, "NETWORK", TINY.network)
    output = tmp_path / "docs" / "bench"
    arguments = ["--network", TINY.network, "--shape", "8x4", "--quick", "--no-memory", "--output", str(output)]
    assert steps.main([*arguments, "--contender", "FP32", "ours", "AIMET", "update_bn"]) == 0
    results, text = json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()
    (case,) = results["cases"]
    assert {(row["step"], row["contender"]) for row in case["timings"]} >= {(INSERT, "ours"), (REESTIMATE, "update_bn")}
    assert "QAT step, ours / FP32" in text and "- AIMET could not be imported, so its column is left out" in text
    assert (
        "| seconds | FP32 | ours | update_bn |" in text and "Peak memory was not measured." in text and "rough" in text
    )
    for picture in ("bench", "bench_scaling"):
        assert (
            f"images/{picture}.png" in text and (tmp_path / "docs" / "images" / f"{picture}.png").stat().st_size > 9999
        )
    assert "QAT step, ours" in capsys.readouterr().out
    output.with_suffix(".md").unlink()
    assert steps.main([*arguments, "--render"]) == 0 and output.with_suffix(".md").read_text() == text


def test_a_contender_that_there_is_not_is_an_error(capsys):
    with pytest.raises(SystemExit):
        steps.main(["--contender", "theirs"])
    assert "no contender is called theirs" in capsys.readouterr().err


@pytest.mark.skipif(not measure.can_measure_memory("cpu"), reason="this system does not tell peaks")
def test_peaks_are_those_of_the_step_above_what_was_held_before():
    held = torch.zeros(16 << 20)  # 64 MiB

    def step():
        torch.ones(24 << 20)  # 96 MiB
        return 1.0

    def broken():
        raise ValueError("no")

    class Wire:
        def send(self, rows):
            self.rows = rows

    wire = Wire()
    measure._child(wire, "it", lambda case: {EVALUATE: step, QAT: lambda: 1.0, FOLD: broken}, TINY)
    evaluating, training, folding = wire.rows
    assert 90 < evaluating["bytes"] / 2**20 < 112 and training["bytes"] / 2**20 < 16 and held is not None
    assert folding == {"step": FOLD, "contender": "it", "error": "ValueError: no"}
