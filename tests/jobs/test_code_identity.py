"""What a key is made of: code that is reached, versions, tensors."""

from __future__ import annotations

import importlib.metadata
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bnre_exp.digests import digest, tensors_digest
from bnre_exp.jobs import code_identity
from bnre_exp.jobs.code_identity import code_digest, users_code, versions


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    write(
        tmp_path,
        mynet_fp="import torch\nfrom blocks_fp import layers\nimport blocks_fp.extra as e\n",
        blocks_fp__layers="from . import deep\nfrom torchvision.ops import Conv2dNormActivation\n",
        blocks_fp__deep="import os, json\nx = 1\n",
        blocks_fp__extra="from .deep import x\n",
        blocks_fp__unused="x = 1\n",
        other_fp="import mynet_fp\n",
    )
    (tmp_path / "blocks_fp" / "__init__.py").write_text("")
    code_identity._place.cache_clear()
    yield tmp_path
    code_identity._place.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mynet_fp", "blocks_fp", "other_fp")]:
        del sys.modules[name]


def test_a_users_code_is_followed_through_its_imports(project):
    found = users_code(["mynet_fp"])
    assert set(found) == {
        "mynet_fp", "blocks_fp", "blocks_fp.layers", "blocks_fp.deep", "blocks_fp.extra", "torch", "torchvision",
    }  # fmt: skip
    assert found["torch"].startswith("torch 2") and len(found["blocks_fp.deep"]) == 40
    write(project, blocks_fp__deep="import os, json\nx = 2\n")
    assert users_code(["mynet_fp"]) == found  # as this process saw it first
    for first in (code_identity._first_sha256, code_identity._meaning):  # as a new process would
        first.cache_clear()
    changed = users_code(["mynet_fp"])
    assert {name for name in found if found[name] != changed[name]} == {"blocks_fp.deep"}
    write(project, blocks_fp__deep='"""What."""\nimport os, json\nx = 2  # why\n')
    for first in (code_identity._first_sha256, code_identity._meaning):
        first.cache_clear()
    assert users_code(["mynet_fp"]) == changed
    write(project, blocks_fp__unused="x = 2\n")
    assert users_code(["mynet_fp"]) == changed


def test_installed_packages_count_by_version_and_the_package_itself_not_at_all():
    found = users_code(["efficientnet_lite_pytorch", "bnre_exp.data", "json", "no_such_module"])
    assert set(found) == {"efficientnet_lite_pytorch"} and found["efficientnet_lite_pytorch"].endswith("0.1.0")


def test_nothing_is_imported_or_run_and_damaged_modules_do_no_harm(project):
    write(project, script_fp="import sys\nprint('RUNS')\nsys.exit(3)\n", broken_fp="def (:\n", wave="x = 1\n")
    write(project, mynet_fp="import wave\ntry:\n    import script_fp.part, broken_fp\nexcept ImportError:\n    pass\n")
    found = users_code(["mynet_fp", "mynet_fp.Net"])
    assert set(found) == {"mynet_fp", "script_fp", "broken_fp", "wave"}  # wave: local, whatever its name
    assert not {"script_fp", "broken_fp"} & set(sys.modules)


def test_tensors_differ_by_name_dtype_shape_and_value():
    x = torch.arange(6.0)
    variants = [
        {"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x.double()}, {"a": x + 1e-6}, {"a": x, "b": x},
        {"a": torch.tensor(0.0)}, {"a": torch.empty(0)}, {"a": torch.tensor([True])}, {"a": x.bfloat16()},
    ]  # fmt: skip
    digests = [tensors_digest(variant) for variant in variants]
    assert len(set(digests)) == len(digests)
    image = torch.rand(2, 3, 4, 4)
    layout = {"a": image.to(memory_format=torch.channels_last)}
    assert tensors_digest({"a": image}) == tensors_digest(layout)


def test_digest_and_versions():
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1}) != digest({"a": 1, "b": [2.5, 0]})
    assert versions(["torch", "no-such-thing"]) == {
        "torch": torch.__version__.partition("+")[0],
        "no-such-thing": "another",
    }
    assert code_digest(["algorithms.fold"]) == code_digest(["algorithms.fold"]) != code_digest(["algorithms"])
    with pytest.raises(ModuleNotFoundError, match="no algorithms.fuse"):
        code_digest(["algorithms.fuse"])


def test_a_package_in_the_place_of_another_counts_by_its_version(monkeypatch):
    tops = {"onnxruntime": ["onnxruntime-gpu"], "PIL": ["pillow-simd"]}
    numbers = {"onnxruntime-gpu": "1.30.0", "pillow-simd": "9.5.0.post1"}

    def version(name: str) -> str:
        if name not in numbers:
            raise importlib.metadata.PackageNotFoundError(name)
        return numbers[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(code_identity, "_distributions", lambda: tops)
    before = versions(["onnxruntime", "pillow"])
    assert before == {"onnxruntime": "onnxruntime-gpu 1.30.0", "pillow": "pillow-simd 9.5.0.post1"}
    numbers["onnxruntime-gpu"] = "1.31.0"
    assert versions(["onnxruntime"]) == {"onnxruntime": "onnxruntime-gpu 1.31.0"}


def test_modules_belong_to_the_distributions_that_python_names():
    expected = importlib.metadata.packages_distributions()
    found = code_identity._distributions()
    assert {top: set(names) for top, names in found.items()} == {top: set(names) for top, names in expected.items()}
