"""Saving is all or nothing, and never at the cost of other files."""

from __future__ import annotations

import json
import resource
import signal

import pytest
from torch import fx, nn

from bnre_exp import QuantScheme, UserError, bypassed, fold_batch_norms, quantize
from bnre_exp.export.checkpoint.save_load import load_folded, save_folded
from tests.export.saving import IMAGES, assert_same, folded_network, round_trip
from tests.networks import Net, flat_cnn, randomize


def test_what_cannot_be_saved(tmp_path):
    sim = quantize(flat_cnn(), IMAGES, QuantScheme())
    with pytest.raises(UserError, match="not folded yet"):
        save_folded(sim, tmp_path / "net")
    with pytest.raises(UserError, match="got a Sequential"):
        save_folded(flat_cnn(), tmp_path / "net")
    folded, _ = fold_batch_norms(sim)
    with bypassed(folded), pytest.raises(UserError, match="bypassed"):
        save_folded(folded, tmp_path / "net")
    hidden = fx.symbolic_trace(Net(lambda self, x: x.data_ptr() + x.grad))
    with pytest.raises(UserError, match="data_ptr.*leaf_modules"):
        save_folded(hidden, tmp_path / "net")
    odd = nn.ModuleDict({"it's - 1": nn.ReLU(), "tab\t": nn.ReLU()})
    with pytest.raises(UserError, match=r"'odd.tab\\t' has characters"):
        save_folded(fx.symbolic_trace(Net(lambda self, x: self.odd["tab\t"](x), odd=odd)), tmp_path / "net")
    assert not (tmp_path / "net").exists()
    round_trip(fx.symbolic_trace(Net(lambda self, x: self.odd["it's - 1"](x), odd=odd)), tmp_path / "net", IMAGES)


def test_only_a_checkpoint_is_replaced(tmp_path):
    folded = folded_network(flat_cnn(), IMAGES)
    target = tmp_path / "new" / "net"
    save_folded(folded, target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        save_folded(folded, target)
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()
    round_trip(folded_network(randomize(flat_cnn()), IMAGES), target, IMAGES)
    (target / "network.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(UserError, match="other files"):
        save_folded(folded, target)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "net"):
        with pytest.raises(UserError, match="file"):
            save_folded(folded, path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    folded = folded_network(flat_cnn(), IMAGES)
    save_folded(folded, tmp_path / "net")
    other = folded_network(randomize(flat_cnn()), IMAGES)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes a file; as good as a full disk
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save_folded(other, tmp_path / "net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_same(folded, load_folded(tmp_path / "net"), IMAGES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]
