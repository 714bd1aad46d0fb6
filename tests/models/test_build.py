"""Networks by name, heads, checkpoints and preprocessing: what is built, and what the errors say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from bnre_exp.data.preprocess import Preprocessing
from bnre_exp.errors import UserError
from bnre_exp.models.build import build_model, check_head
from bnre_exp.models.zoo import BuiltModel, timm_model, timm_preprocessing, torchvision_model, torchvision_preprocessing

TORCHVISION = "bnre_exp.models.torchvision_model"
TIMM = "bnre_exp.models.timm_model"
TINY = f"{__name__}.Tiny"


class Tiny(nn.Module):
    """A user's own network; its head is called differently from torchvision's."""

    def __init__(self, classes: int = 10, width: int = 4, wrap: str = "tensor") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.drop = nn.Dropout()
        self.last = nn.Linear(width, classes)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        logits = self.last(self.drop(self.bn(self.conv(x)).mean((2, 3))))
        outputs = {"tensor": logits, "dict": {"note": "x", "logits": logits, "aux": x}, "tuple": ((logits, x), x)}
        return outputs[self.wrap]


def tiny(**changes: Any) -> BuiltModel:
    options: dict[str, Any] = {"num_classes": 10, **changes}
    return build_model(TINY, **options)


def save(state: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def assert_same_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A Tiny whose every value differs from a new one's."""
    torch.manual_seed(1)
    module = Tiny()
    for value in module.state_dict().values():
        value.copy_(torch.rand(value.shape) * 3 + 1)
    return module


# Names and targets


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_0", "shufflenet_v2_x0_5"])
def test_torchvision_networks_have_the_datasets_classes(name: str) -> None:
    built = build_model(TORCHVISION, name=name, num_classes=7)
    assert not built.pretrained
    assert built.preprocessing is None
    assert built.notes == ()
    check_head(built.module, torch.rand(2, 3, 64, 64), 7)


def test_timm_networks_have_the_datasets_classes() -> None:
    built = build_model(TIMM, name="mobilenetv3_small_050", num_classes=7, kwargs={"drop_rate": 0.1})
    check_head(built.module, torch.rand(2, 3, 32, 32), 7)
    assert not built.pretrained
    assert built.preprocessing is None


def test_builders_return_plain_modules() -> None:
    assert isinstance(torchvision_model("resnet18", 5), torchvision.models.ResNet)
    assert timm_model("resnet18", 5).num_classes == 5


def test_own_network_gets_its_kwargs_only() -> None:
    built = tiny(name="ignored", kwargs={"classes": 3, "width": 8}, num_classes=3)
    assert isinstance(built.module, Tiny)
    assert built.module.conv.out_channels == 8
    check_head(built.module, torch.rand(2, 3, 8, 8), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": TORCHVISION, "name": "resnet81"}, r"resnet81.*torchvision.*resnet18"),
        ({"target": TORCHVISION, "name": "fcn_resnet50"}, "not a classification network"),
        ({"target": TORCHVISION, "name": None}, r"model\.name is not set"),
        ({"target": TORCHVISION, "name": "resnet18", "kwargs": {"foo": 1}}, r"model\.kwargs=.*foo"),
        ({"target": TORCHVISION, "name": "resnet18", "weights": "IMAGENET1K_V9"}, "DEFAULT or one of IMAGENET1K_V1"),
        ({"target": TORCHVISION, "name": "resnet18", "weights": "VGG11_Weights.IMAGENET1K_V1"}, "unknown for resnet18"),
        ({"target": TIMM, "name": "resnet81"}, r"resnet81.*timm.*resnet"),
        ({"target": TIMM, "name": "resnet18.no_such_tag"}, "no_such_tag"),
        ({"target": TIMM, "name": "resnet18", "weights": "IMAGENET1K_V1"}, "expected true"),
        ({"target": "nowhere.Net"}, "no module nowhere"),
        ({"target": "bnre_exp.models.Net"}, r"Net.*check the spelling"),
        ({"target": "bnre_exp.models.__all__"}, "is a list, not a callable"),
        ({"target": "not a path"}, "no dotted path"),
        ({"target": "builtins.dict"}, "returned a dict"),
        ({"target": TINY, "kwargs": {"depth": 3}}, r"model\.kwargs=.*depth"),
        ({"target": TINY, "weights": "DEFAULT"}, r"means nothing to .*Tiny"),
    ],
)
def test_wrong_names_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(**options, num_classes=10)


def test_a_module_that_misses_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs a_package_that_is_not_there"):
        build_model("needs_more.Net", num_classes=10)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", r"importing its module raised ZeroDivisionError: division by zero \(.*raises\.py, line 2\)"),
        ("raise ValueError('no')", r"importing its module raised ValueError: no \(.*raises\.py, line 2\)"),
        ("Net = torch.nothing", r"importing its module raised AttributeError: .*nothing"),
        ("def Net(): return {}['a']", r"model\._target_=raises\.Net raised KeyError: 'a' \(.*raises\.py, line 2\)"),
        ("def Net(): raise TypeError('odd')", r"model\._target_=raises\.Net raised TypeError: odd"),
    ],
)
def test_what_a_users_code_raises_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    (tmp_path / "raises.py").write_text(f"import torch\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "raises", raising=False)
    with pytest.raises(UserError, match=message):
        build_model("raises.Net", num_classes=10)


class Keyed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return {"a": x}["b"]


def test_what_a_network_raises_is_told() -> None:
    with pytest.raises(UserError, match=r"cannot take images of shape \[2, 3, 8, 8\]: KeyError: 'b'"):
        check_head(Keyed(), torch.rand(2, 3, 8, 8), 10)


def test_timm_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_model(TIMM, name="resnet18", num_classes=10)


# Heads


@pytest.mark.parametrize("wrap", ["tensor", "dict", "tuple"])
def test_check_head(wrap: str) -> None:
    module = Tiny(wrap=wrap).train()
    module.bn.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    check_head(module, torch.rand(2, 3, 8, 8), 10)
    assert module.training
    assert module.drop.training
    assert not module.bn.training
    assert_same_state(module, before)
    with pytest.raises(UserError, match=r"10 classes.*dataset has 4.*model\.kwargs.*model\.replace_head=true"):
        check_head(module, torch.rand(2, 3, 8, 8), 4)
    assert module.training


def test_check_head_names_what_the_network_cannot_take() -> None:
    with pytest.raises(UserError, match=r"cannot take images.*\[2, 1, 8, 8\]"):
        check_head(Tiny(), torch.rand(2, 1, 8, 8), 10)
    with pytest.raises(UserError, match=r"got \[2, 4, 6, 6\]"):
        check_head(nn.Conv2d(3, 4, 3), torch.rand(2, 3, 8, 8), 10)


def test_own_network_gets_a_new_head_on_request() -> None:
    built = tiny(num_classes=4, replace_head=True)
    check_head(built.module, torch.rand(2, 3, 8, 8), 4)
    assert "last had 10 classes, the dataset has 4" in built.notes[0]
    assert tiny(num_classes=10, replace_head=True).notes == ()


@pytest.mark.parametrize(
    ("target", "name", "weights"), [(TORCHVISION, "mobilenet_v2", "DEFAULT"), (TIMM, "resnet18", "true")]
)
def test_weights_of_other_classes_are_refused_before_anything_is_fetched(target: str, name: str, weights: str) -> None:
    with pytest.raises(UserError, match=r"1000 classes, the dataset has 10.*model\.replace_head=true"):
        build_model(target, name=name, num_classes=10, weights=weights)


@pytest.fixture
def cached_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.hub's cache holding a file in the place of MobileNetV3's weights (random ones of the same shapes)."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    entry = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    state = torchvision.models.mobilenet_v3_small().state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / Path(entry.url).name)
    return state


def test_pretrained_weights_are_loaded_and_the_head_replaced(cached_weights: dict[str, Any]) -> None:
    built = build_model(TORCHVISION, name="mobilenet_v3_small", num_classes=10, weights="DEFAULT", replace_head=True)
    assert built.pretrained
    assert built.preprocessing == Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert built.notes == ("head replaced: classifier.3 had 1000 classes, the dataset has 10",)
    assert_same_state(built.module, {k: v for k, v in cached_weights.items() if not k.startswith("classifier.3")})
    check_head(built.module, torch.rand(2, 3, 32, 32), 10)
    kept = build_model(TORCHVISION, name="mobilenet_v3_small", num_classes=1000, weights="IMAGENET1K_V1")
    assert_same_state(kept.module, cached_weights)
    assert kept.notes == ()


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of its making
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"resnet18.*\.pth could not be fetched.*model\.checkpoint=FILE"):
        build_model(TORCHVISION, name="resnet18", num_classes=1000, weights="DEFAULT")


def test_a_failed_download_of_timm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The offline switch of the hub's client: without it, its retries take most of a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"timm/resnet18\.a1_in1k could not be fetched.*model\.checkpoint=FILE"):
        build_model(TIMM, name="resnet18", num_classes=1000, weights="true")


# Checkpoints


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_checkpoint_formats(trained: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = save(trained.state_dict(), tmp_path / f"net{suffix}")
    built = tiny(checkpoint=path)
    assert_same_state(built.module, trained.state_dict())
    assert built.pretrained
    assert built.notes == ()
    assert built.preprocessing is None


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrapped_and_prefixed_checkpoints(trained: nn.Module, tmp_path: Path, wrapper: str) -> None:
    state = {f"module.model.{key}": value for key, value in trained.state_dict().items()}
    path = save({"epoch": 3, wrapper: state, "optimizer": {"lr": 0.1}}, tmp_path / "net.pth")
    built = tiny(checkpoint=path, strip_prefixes=["model.", "module."])
    assert_same_state(built.module, trained.state_dict())
    assert len(built.notes) == 2
    assert "module. was stripped" in built.notes[0]
    with pytest.raises(UserError, match=r"8 missing in the file.*9 unexpected.*: module\.model\.conv\.weight"):
        tiny(checkpoint=path)


def test_a_prefix_is_kept_where_not_every_key_has_it_or_the_network_wants_it(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Tiny()

    globals()["Wrapper"] = Wrapper
    state = Wrapper().state_dict()
    built = build_model(
        f"{__name__}.Wrapper", num_classes=10, checkpoint=save(state, tmp_path / "a.pth"), strip_prefixes=["model."]
    )
    assert_same_state(built.module, state)
    mixed = {("module." if key.startswith("conv") else "") + key: value for key, value in Tiny().state_dict().items()}
    with pytest.raises(UserError, match=r"unexpected in the file: module\.conv\.weight"):
        tiny(checkpoint=save(mixed, tmp_path / "b.pth"), strip_prefixes=["module."])


def test_another_architecture_is_one_readable_error(tmp_path: Path) -> None:
    path = save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError) as caught:
        build_model(TORCHVISION, name="resnet34", num_classes=10, checkpoint=path)
    assert "missing in the file" in str(caught.value)
    assert "layer1.2.conv1.weight" in str(caught.value)
    with pytest.raises(UserError) as caught:
        tiny(kwargs={"width": 6}, checkpoint=save(Tiny().state_dict(), tmp_path / "tiny.pth"), strict=False)
    message = str(caught.value)
    assert "7 of another shape: conv.weight [4, 3, 3, 3] in the file, [6, 3, 3, 3] expected" in message
    assert "and 2 more" in message
    with pytest.raises(UserError, match="unexpected"):
        tiny(checkpoint=path, strict=False)


def test_missing_and_unexpected_keys(trained: nn.Module, tmp_path: Path) -> None:
    state = dict(trained.state_dict())
    del state["bn.bias"]
    state["extra"] = torch.zeros(1)
    path = save(state, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"1 missing in the file: bn\.bias.*1 unexpected.*extra.*model\.strict=false"):
        tiny(checkpoint=path)
    built = tiny(checkpoint=path, strict=False)
    assert built.notes == ("1 keys missing in the checkpoint: bn.bias", "1 keys unexpected in the checkpoint: extra")
    del state["extra"]
    assert_same_state(built.module, state)


def test_num_batches_tracked_may_be_missing(trained: nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in trained.state_dict().items() if "num_batches" not in key}
    built = tiny(checkpoint=save(state, tmp_path / "net.pth"))
    assert_same_state(built.module, state)
    assert built.notes == ()


@pytest.mark.parametrize("target", [TINY, TORCHVISION])
def test_head_of_another_class_count(tmp_path: Path, target: str) -> None:
    source = Tiny(classes=100) if target == TINY else torchvision.models.mobilenet_v3_small(num_classes=100)
    head = "last" if target == TINY else "classifier.3"
    options: dict[str, Any] = {
        "name": "mobilenet_v3_small",
        "num_classes": 10,
        "checkpoint": save(source.state_dict(), tmp_path / "net.pth"),
    }
    with pytest.raises(UserError, match=r"head of 100 classes.*one of 10.*model\.replace_head=true"):
        build_model(target, **options)
    built = build_model(target, **options, replace_head=True)
    assert_same_state(built.module, {k: v for k, v in source.state_dict().items() if not k.startswith(head + ".")})
    assert f"{head}.weight" in built.notes[0]
    check_head(built.module, torch.rand(2, 3, 32, 32), 10)


def test_a_refused_checkpoint_changes_nothing(trained: nn.Module, tmp_path: Path) -> None:
    from bnre_exp.models.weights import load_checkpoint

    module = Tiny(classes=3)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(UserError):
        load_checkpoint(module, save(trained.state_dict(), tmp_path / "net.pth"), heads=["last"])
    assert_same_state(module, before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.txt", b"", r"ends in \.safetensors"),
        ("net.pth", b"hello world\n" * 9, "damaged"),
        ("net.pth", b"", "damaged"),
        ("net.pth", b"truncated", "damaged"),
        ("net.safetensors", b"hello world\n" * 9, "no intact safetensors"),
        ("net.pth", Tiny(), "Python objects"),
        ("net.pth", {"state_dict": {"a": torch.zeros(2)}, "args": argparse.Namespace(lr=1)}, "Python objects"),
        ("net.pth", [torch.zeros(2)], "holds a list"),
        ("net.pth", {"epoch": 3, "weights": {"a": torch.zeros(2)}}, "epoch, weights hold no tensors"),
        ("net.pth", {}, "not a state dict"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content == b"truncated":
        torch.save(Tiny().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-500])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        tiny(checkpoint=str(path))
    assert str(path) in str(caught.value)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        tiny(checkpoint=str(tmp_path / "absent.pth"))


# Preprocessing


def test_preprocessing_follows_torchvisions_weights() -> None:
    weights = torchvision.models.MobileNet_V2_Weights
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    first = torchvision_preprocessing(weights.IMAGENET1K_V1.transforms())
    second = torchvision_preprocessing(weights.IMAGENET1K_V2.transforms())
    assert first == Preprocessing(224, 256, mean, std)
    assert second == Preprocessing(224, 232, mean, std)
    bicubic = torchvision_preprocessing(torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1.transforms())
    assert bicubic == Preprocessing(224, 256, mean, std, "bicubic")


# PIL rounds between its two bicubic passes, so a few pixels differ by two grey levels there.
@pytest.mark.parametrize(
    ("name", "levels"),
    [("MobileNet_V2_Weights.IMAGENET1K_V2", 1), ("EfficientNet_B0_Weights.IMAGENET1K_V1", 2)],
)
def test_images_come_out_as_from_torchvisions_own_transforms(name: str, levels: int) -> None:
    from PIL import Image

    from bnre_exp.data.preprocess import normalise, resize_and_crop, to_uint8

    transforms = torchvision.models.get_weight(name).transforms()
    torch.manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 30, 40), (300, 400), mode="bicubic")[0].clamp(0, 1)
    image = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
    preprocessing = torchvision_preprocessing(transforms)
    ours = normalise(resize_and_crop(to_uint8(image), preprocessing).unsqueeze(0), preprocessing)[0]
    difference = (ours - transforms(image)).abs() * torch.tensor(preprocessing.std).view(3, 1, 1) * 255
    assert difference.max() <= levels + 0.01
    assert difference.mean() < 0.2


def test_preprocessing_follows_timms_data_config() -> None:
    config = timm.data.resolve_model_data_config(timm.create_model("resnet18"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert timm_preprocessing(config) == Preprocessing(224, 235, mean, std, "bicubic")
    assert timm_preprocessing({**config, "crop_pct": 1.0, "interpolation": "random"}).resize_size == 224


@pytest.mark.parametrize(("target", "weights", "resize"), [(TORCHVISION, "DEFAULT", 256), (TIMM, "True", 235)])
def test_checkpoint_with_weights_takes_their_preprocessing_and_fetches_nothing(
    tmp_path: Path, target: str, weights: str, resize: int
) -> None:
    builder = torchvision_model if target == TORCHVISION else timm_model
    state = builder("resnet18", 10).state_dict()
    path = save(state, tmp_path / "net.pth")
    built = build_model(target, name="resnet18", num_classes=10, weights=weights, checkpoint=path)
    assert_same_state(built.module, state)
    assert built.preprocessing is not None
    assert built.preprocessing.resize_size == resize
    assert build_model(target, name="resnet18", num_classes=10, weights="false").preprocessing is None
