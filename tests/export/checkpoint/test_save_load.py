"""A folded network survives the way through files bit for bit, in a process that has never seen its code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from bnre_exp import LayerRule
from bnre_exp.export.checkpoint.save_load import load_folded, save_folded
from bnre_exp.quantsim.quantizers.affine import ChannelAffine
from bnre_exp.quantsim.tracing.trace import FollowTraining, trace
from tests.export.saving import IMAGES, assert_same, folded_network, round_trip
from tests.networks import Net, flat_cnn, randomize
from tests.torchvision_networks import network, small_or_slow


@pytest.mark.parametrize(
    "name",
    small_or_slow(
        "small resnet", "small mobilenet_v2", "small mobilenet_v3", "resnet18", "mobilenet_v2", "mobilenet_v3_small"
    ),
)
def test_torchvision_in_channels_last(name, tmp_path):
    images = torch.randn(3, 3, 32, 32)
    model = network(name).eval().to(memory_format=torch.channels_last)
    folded = folded_network(model, images, weight_bits=4, act_bits=6)
    loaded = round_trip(folded, tmp_path / "net", images)
    first = next(m for m in loaded.modules() if isinstance(m, nn.Conv2d))
    codes = first.parametrizations.weight.original
    assert codes.dtype == torch.int8 and first.parametrizations.bias.original.dtype == torch.int32
    assert codes.is_contiguous(memory_format=torch.channels_last) and not codes.is_contiguous()
    assert loaded.meta["fold_report"] == folded.meta["fold_report"]
    facts = ("ndim", "is_float", "is_single")
    for before, after in zip(folded.graph.nodes, loaded.graph.nodes):
        assert before.name == after.name
        assert [before.meta.get(key) for key in facts] == [after.meta.get(key) for key in facts]


def many_operations(self, x):
    half = x.shape[1] // 2
    y = torch.cat([x[:, :half], x[:, half:].flip(1)], dim=1)
    y = F.max_pool2d(F.hardswish(self.bn(self.conv(y))), 2)
    y = F.interpolate(y, scale_factor=2.0, mode="nearest").clamp(min=-1.5, max=float("inf"))
    y = y[..., ::2, 1:] * y.dim() - y.new_ones(1).to(y.device)
    y = F.adaptive_avg_pool2d(y, (2, 2)).view(x.size(0), -1).to(dtype=torch.float32)
    return {"logits": self.head(y), "shape": y.shape, "pair": (y.mean(), [y.amax(dim=(0, 1)), None]), "T": y.T}


def test_functions_methods_attributes_and_containers(tmp_path):
    model = Net(many_operations, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), head=nn.Linear(24, 5))
    x = torch.randn(3, 4, 9, 9)
    loaded = round_trip(folded_network(randomize(model), x), tmp_path / "net", x)
    targets = {node.target for node in loaded.graph.nodes}
    assert {torch.cat, F.hardswish, F.interpolate, getattr, "view", "flip"} <= targets
    assert isinstance(loaded(x)["pair"], tuple) and isinstance(loaded(x)["pair"][1], list)


def test_every_kind_of_argument(tmp_path):
    graph = fx.Graph()
    x = graph.placeholder("x")
    values = (
        slice(None, x, 2), {"a": (1, [2.5, -float("inf"), float("nan")]), 3: None}, torch.Size([2, 3]), torch.float64,
        torch.channels_last, torch.strided, torch.device("cpu"), "it's \"q\"\n\\", True, ..., (x,), [],
    )  # fmt: skip
    y = graph.call_method("to", (x,), {"dtype": torch.float64, "memory_format": torch.channels_last})
    graph.output((y, values))
    assert save_folded(fx.GraphModule(nn.Module(), graph), tmp_path / "net") == ()
    loaded = load_folded(tmp_path / "net")
    (output,) = loaded.graph.find_nodes(op="output")
    assert repr(output.args[0][1]) == repr(graph.find_nodes(op="output")[0].args[0][1])
    result, constants = loaded(torch.tensor(1.0).reshape(1, 1, 1, 1))
    assert result.dtype == torch.float64 and constants[4:10] == values[4:10]


def test_training_mode_still_drops(tmp_path):
    def forward(self, x):
        x = self.depth(self.bn(self.conv(x)))
        return F.dropout(x, 0.5, training=self.training)

    parts = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "depth": torchvision.ops.StochasticDepth(0.5, "row")}
    folded, _ = trace(randomize(Net(forward, **parts)), [IMAGES])
    loaded = round_trip(folded, tmp_path / "net", IMAGES)
    assert any(isinstance(module, FollowTraining) for module in loaded.modules())
    outputs = []
    for each in (folded.train(), loaded.train()):
        torch.manual_seed(1)
        outputs.append(each(IMAGES))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], folded.eval()(IMAGES))


def test_layers_of_other_dimensions_and_kept_bn(tmp_path):
    def forward(self, x):
        x = F.relu(self.bn2(self.up(F.relu(self.bn1(self.conv(x))))))
        return self.bn4(self.bn3(F.avg_pool1d(x, 2)))

    model = Net(
        forward,
        conv=nn.Conv1d(4, 8, 3, padding="same", groups=2, bias=False),
        bn1=nn.BatchNorm1d(8),
        up=nn.ConvTranspose1d(8, 12, 3, stride=2, output_padding=1, groups=4),
        bn2=nn.BatchNorm1d(12),
        bn3=nn.BatchNorm1d(12),
        bn4=nn.BatchNorm1d(12, affine=False, track_running_stats=False),
    )
    x = torch.randn(3, 4, 10)
    loaded = round_trip(folded_network(randomize(model), x, weight_bits=3), tmp_path / "net", x)
    assert isinstance(loaded.bn3, ChannelAffine) and isinstance(loaded.bn4, nn.BatchNorm1d)
    kept = {node.target: node.meta["kept_reason"] for node in loaded.graph.nodes if "kept_reason" in node.meta}
    assert kept.keys() == {"bn3", "bn4"}


def test_float64_wide_codes_and_float_layers(tmp_path):
    rules = (LayerRule("0", off=True), LayerRule("3", weight_bits=12))
    x = IMAGES.double()
    loaded = round_trip(folded_network(randomize(flat_cnn()).double(), x, overrides=rules), tmp_path / "net", x)
    assert loaded.get_parameter("0.weight").dtype == torch.float64
    assert loaded.get_buffer("3.parametrizations.weight.original").dtype == torch.int16
    assert loaded.get_buffer("3.parametrizations.weight.0.scale").dtype == torch.float64


def test_tensors_that_the_graph_reads_directly(tmp_path):
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.inner = nn.Module()
            self.inner.gain = nn.Parameter(torch.randn(4, 1, 1), requires_grad=False)
            self.register_buffer("table", torch.randn(14, 14).t(), persistent=False)
            self.tied = nn.Conv2d(3, 4, 3)
            self.tied.weight = self.conv.weight

        def forward(self, x):
            constant = torch.arange(14.0)
            y = self.conv(x) * self.inner.gain + self.table + constant
            return y + self.conv.bias[0] + self.tied(x)

    folded = folded_network(Direct(), IMAGES, weight_bits=None)
    assert folded.graph.find_nodes(op="get_attr")
    loaded = round_trip(folded, tmp_path / "net", IMAGES)
    assert isinstance(loaded.inner.gain, nn.Parameter) and not loaded.table.is_contiguous()


def test_modules_whose_constructor_hides_its_arguments(tmp_path):
    def forward(self, x):
        y = self.drop(self.act(self.up(self.prelu(self.conv(x)))))
        y = self.norm(y.flatten(2).transpose(1, 2))
        return self.attention(y, y, y)[0]

    model = Net(
        forward,
        conv=nn.Conv2d(3, 4, 5, padding=2, padding_mode="reflect"),
        prelu=nn.PReLU(4, init=0.3),
        up=nn.Upsample(scale_factor=0.25, mode="bilinear", align_corners=False),
        act=nn.Hardtanh(-2.0, 3.0),
        drop=nn.Dropout(0.3),
        norm=nn.LayerNorm(4, elementwise_affine=False),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )
    round_trip(folded_network(randomize(model), IMAGES), tmp_path / "net", IMAGES)
    model.attention = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)  # keeps its bias under another name
    folded = folded_network(randomize(model), IMAGES)
    named = save_folded(folded, tmp_path / "net")
    assert named == ("attention (torch.nn.modules.activation.MultiheadAttention)",)
    assert_same(folded, load_folded(tmp_path / "net", model=model), IMAGES)


def test_loading_leaves_random_state_alone_and_heeds_no_default_device(tmp_path):
    folded = folded_network(flat_cnn(), IMAGES)
    save_folded(folded, tmp_path / "net")
    before = torch.get_rng_state()
    with torch.device("meta"):
        loaded = load_folded(tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(folded, loaded, IMAGES)


def test_loaded_networks_are_independent_and_can_be_saved_again(tmp_path):
    folded = folded_network(flat_cnn(), IMAGES)
    first, second = (round_trip(folded, tmp_path / "net", IMAGES) for _ in range(2))
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.zero_()
    assert_same(folded, second, IMAGES)
    round_trip(second, tmp_path / "again", IMAGES)
    for name in ("network.json", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "net" / name).read_bytes()


def test_a_number_to_the_power_of_a_tensor(tmp_path):
    """As encodings of positions have it: 10000 ** x."""
    model = Net(lambda m, x: m.bn(m.conv(x)) * 10000 ** (x * 0.1), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    images = torch.rand(4, 3, 6, 6)
    round_trip(folded_network(model.eval(), images), tmp_path / "net", images)
