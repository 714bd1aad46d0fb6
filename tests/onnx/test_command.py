"""``python -m bnre_exp.onnx``: what a user types, and what a mistake says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bnre_exp.onnx import load_model
from bnre_exp.onnx.__main__ import main
from tests.networks import flat_cnn, randomize
from tests.onnx.models import bn, bn_tensors, built, dynamo, run, values_of


@pytest.fixture(scope="module")
def exported():
    return dynamo(randomize(flat_cnn()), torch.randn(4, 3, 8, 8))


@pytest.fixture
def folder(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(exported, "in.onnx")
    np.save("data.npy", np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32))
    return tmp_path


def test_reestimate_then_fold(folder, capsys):
    assert (
        main(["reestimate", "in.onnx", "out.onnx", "--data", "data.npy", "--batch-size", "16", "--num-batches", "5"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "3 batch norms re-estimated from 5 batches of 16 (3 passes over the data)" in printed
    assert main(["fold", "out.onnx", "folded.onnx"]) == 0
    printed = capsys.readouterr().out
    assert "3 batch norms folded, 0 kept" in printed and "outputs on random input differ by at most" in printed
    x = np.load("data.npy")[:5]
    np.testing.assert_allclose(
        run(load_model("folded.onnx"), x)[0], run(load_model("out.onnx"), x)[0], rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(run(load_model("in.onnx"), x)[0], run(load_model("out.onnx"), x)[0], rtol=1e-2)
    again = ["reestimate", "in.onnx", "again.onnx", "--data", "data.npy", "--batch-size", "16", "--num-batches", "5"]
    assert main(again) == 0
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_named_data_and_folders_of_images(folder, capsys):
    model = ["reestimate", "in.onnx"]
    assert main([*model, "digits.onnx", "--data", "digits", "--num-batches", "2", "--image-size", "8"]) == 0
    images = folder / "images" / "deeper"
    images.mkdir(parents=True)
    for index, pixels in enumerate(load_digits().images[:8]):
        Image.fromarray((pixels * 15).astype(np.uint8)).save(images / f"{index}.png")
    options = ["--data", "images", "--batch-size", "4", "--num-batches", "2", "--image-size", "8"]
    assert main([*model, "images.onnx", *options]) == 1
    assert "give --mean and --std" in capsys.readouterr().err
    assert main([*model, "images.onnx", *options, "--mean", "0.5", "--std", "0.5"]) == 0
    assert values_of(load_model("images.onnx")).keys() == values_of(load_model("in.onnx")).keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reestimate", "nowhere.onnx", "out.onnx", "--data", "data.npy"], "there is no such file"),
        (["reestimate", "data.npy", "out.onnx", "--data", "data.npy"], "is not an ONNX model"),
        (["reestimate", "in.onnx", "out.onnx", "--data", "nowhere"], "expected an .npy or .npz file, a folder"),
        (["reestimate", "in.onnx", "out.onnx", "--data", "in.npy"], "no array file"),
        (["reestimate", "in.onnx", "out.onnx", "--data", "wrong.npy"], r"the data are"),
        (["reestimate", "in.onnx", "out.onnx", "--data", "data.npy", "--num-batches", "0"], "num_batches=0"),
        (["reestimate", "in.onnx", "data.npy/out.onnx", "--data", "data.npy"], "cannot be written"),
        (["fold", "none.onnx", "out.onnx"], "has no BatchNormalization"),
        (["reestimate", "none.onnx", "out.onnx", "--data", "data.npy"], "has no BatchNormalization"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, message, folder, capsys):
    np.save("wrong.npy", np.zeros((8, 3, 4), np.float32))
    (folder / "in.npy").write_text("no array")
    onnx.save(built([onnx.helper.make_node("Relu", ["x"], ["y"])], {}, ["N", 3, 8, 8]), "none.onnx")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and error.count("\n") == 1
    assert not (folder / "out.onnx").exists()


def test_in_place(folder):
    before = values_of(load_model("in.onnx"))
    assert main(["reestimate", "in.onnx", "in.onnx", "--data", "data.npy", "--num-batches", "1"]) == 0
    after = values_of(load_model("in.onnx"))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        f"{layer}.running_{kind}" for layer in "147" for kind in ("mean", "var")
    }


def test_several_inputs_come_from_an_npz_file(folder, capsys):
    add = onnx.helper.make_node("Add", ["a", "b"], ["x"])
    onnx.save(built([add, bn("x", "y")], bn_tensors(3), ["N", 3], inputs=("a", "b")), "two.onnx")
    a = np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32)
    np.savez("two.npz", a=a, b=2 * a)
    options = ["--data", "two.npz", "--batch-size", "30", "--num-batches", "1"]
    assert main(["reestimate", "two.onnx", "out.onnx", *options]) == 0
    np.testing.assert_allclose(values_of(load_model("out.onnx"))["bn.running_mean"], 3 * a.mean(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--momentum", "5", "--method", "ema"], "--momentum 5.0"),
        (["--mean", "0.5"], "arrays are taken as they are"),
        (["--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_options_out_of_range(options, message, folder, capsys):
    assert main(["reestimate", "in.onnx", "out.onnx", "--data", "data.npy", *options]) == 1
    assert message in capsys.readouterr().err and not (folder / "out.onnx").exists()


def test_a_fold_that_cannot_be_checked_is_not_written(folder, capsys):
    np.save("nan.npy", np.full((4, 3, 8, 8), np.nan, np.float32))
    assert main(["fold", "in.onnx", "out.onnx", "--data", "nan.npy"]) == 1
    assert "outputs are not finite" in capsys.readouterr().err and not (folder / "out.onnx").exists()
    np.save("bytes.npy", np.ones((4, 3, 8, 8), np.uint8))
    assert main(["reestimate", "in.onnx", "out.onnx", "--data", "bytes.npy"]) == 1
    assert "the data are integers (uint8)" in capsys.readouterr().err
