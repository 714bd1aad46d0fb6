"""What the page says of the method and of every contender."""

from __future__ import annotations

HOW = """\
What a step costs in `bnre_exp`, beside the same network in floating point, which is the limit, and beside other
libraries: per-channel weights at 4 bits and per-tensor activations at 8, unless said otherwise. All contenders are in
one process and take turns, round by round, each round in another order; shown is the median over rounds, with the
smallest and the largest. They have the same weights, BN statistics, random images and labels. A batch's seconds are
those between two requests for a batch to the loader that the library's own function is given, the first batch of
every call left out, so that what is done once a call is not in them (it is in the first panel of the second picture);
what is said to be a call is timed whole. Peak memory is the high-water mark of the resident set, each contender in a
process of its own, above that process with all libraries, the data and the float network in memory (on a GPU: of
torch's allocator).

Taken on: {machine}.

The script is `scripts/bench/steps.py` (`pip install '.[bench]'` brings the other libraries); all raw figures are in
the file of this page's name that ends in `.json`. To repeat it:"""

CONTENDERS = """\
- **FP32**: the float network in channels-last, plain torch. QAT step: forward, cross entropy, backward, SGD with
  Nesterov's momentum (`fused=True`), the optimizer of every contender. Re-estimation: its forward pass in training
  mode under `no_grad`. Evaluation and calibration: its forward pass in evaluation mode, as many times.
- **ours**: `train`, `reestimate_bn_stats`, `evaluate`, `calibrate`, `quantize` and `fold_batch_norms` of `bnre_exp`,
  in channels-last, with all that they check and count; evaluation includes the metrics.
- **ours, weights only**: re-estimation where activations are left in floating point.
- **AIMET**: `prepare_model` and `QuantizationSimModel` with its own per-channel configuration (weights min-max,
  scales learned), in torch's default memory format, as its documentation has it; the same training loop as FP32; its
  `reestimate_bn_stats`; plain forward passes for evaluation; `compute_encodings`; `fold_all_batch_norms_to_scale`.
  **AIMET, channels-last** is the same on a network and images in channels-last, for the steps by batches.
- **Brevitas**: `preprocess_for_quantize(merge_bn=False)` and `quantize` of `brevitas.graph`, weights per channel with
  learned scales (`Int8WeightPerChannelFloat` at 4 bits, `PARAMETER_FROM_STATS`), activations with its own quantizers,
  biases float, in channels-last; the same training loop; plain forward passes for evaluation; `calibration_mode`.
- **update_bn** and **fvcore**: `torch.optim.swa_utils.update_bn` and `fvcore.nn.precise_bn.update_bn_stats` on the
  FP32 network.
- **compiled** and **bfloat16** (with `--compile`, `--precision bfloat16`): for FP32 `torch.compile` of the network, and
  autocast around its forward pass; for ours the arguments of these names."""

NOT_THE_SAME = """\
Not the same work, so to be read with care: the libraries place activation quantizers differently (of resnet18,
mobilenet_v2 and efficientnet_b0: ours 31, 65 and 190, AIMET 31, 82 and 288, Brevitas 28, 55 and 148), and Brevitas's
are symmetric around zero where others have a zero point. Calibration fits by the library's own default: ours by the
mean square error, AIMET by minimum and maximum, Brevitas by a percentile. Brevitas has no re-estimation of BN: it is
torch's `update_bn` on its network. Nor does it fold a BN into the scale of a quantized layer, only into weights
before they are quantized. AIMET's folding fails on networks that are nested. Our `quantize` also compares the traced
network with the original, in both modes and at two batch sizes. In re-estimation, FP32, Brevitas and `update_bn` have
all modules in training mode, ours and AIMET's only BN."""
