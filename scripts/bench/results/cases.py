"""What is measured of every network, seed and scheme: jobs of the runner, by name, as overrides."""

from __future__ import annotations

NETWORKS = {"mobilenet_v2": "MobileNetV2", "resnet18": "ResNet18"}
SCHEMES = ("w4a8", "w3a8", "w2a8", "w4a4")
CONTROLLED = ("w2a8", "w4a4")  # schemes at which QAT is also controlled
BATCHES, PRIOR_BATCHES, BATCH_SIZE, CALIBRATION = 100, 10, 128, 8
CURVE = (1, 2, 5, 10, 20, 50, 100)
TOLERANCE = 0.05
QAT_LR, QAT_WEIGHT_DECAY = 0.01, 1e-4

COMMON = [
    "dataset=fashion_mnist", "dataset.image_size=28", f"dataset.batch_size={BATCH_SIZE}", "export=off",
    "tracking.enabled=false", "runtime.device=cpu", "runtime.threads=1",
]  # fmt: skip
# 14 336 images less a tenth for validation are 100 batches: for QAT, and for re-estimation.
LATER = ["train=off", "dataset.train_limit=14336", f"reest.num_batches={BATCHES}", f"quant.calib_batches={CALIBRATION}"]
CURVED = f"reest.curve=[{','.join(map(str, CURVE))}]"

PTQ = {
    "ptq": [CURVED],
    "ptq pooled": ["reest.method=pooled"],
    "ptq prior": [f"reest.prior={PRIOR_BATCHES * BATCH_SIZE}"],
    "ptq tolerance": [f"reest.tolerance={TOLERANCE}"],
    "ptq 32 images": ["reest.num_samples=32"],
    "ptq 32 images prior": ["reest.num_samples=32", "reest.prior=32"],
    "ptq minmax": ["quant.weight_range=minmax", "quant.act_range=minmax"],
    "ptq full grid": ["quant.weight_grid=full"],
}
QAT = {
    "qat": [CURVED],
    "qat pooled": ["reest.method=pooled"],
    "qat tolerance": [f"reest.tolerance={TOLERANCE}"],
    "qat calibrate": ["qat.prepare=calibrate"],
    "qat none": ["qat.prepare=none"],
    "qat full grid": ["quant.weight_grid=full"],
}
CONTROL = {
    "qat frozen": ["qat.bn=frozen"],
    "qat momentum 0.001": ["qat.bn_momentum=0.001"],
    "qat momentum 0.9": ["qat.bn_momentum=0.9"],
    "qat freezing": ["qat.oscillation=freezing"],
}


def jobs(scheme: str) -> dict[str, list[str]]:
    """The jobs of a scheme, by name: those without QAT first."""
    how = [f"quant={scheme}"]
    trained = [*how, "qat.epochs=1", f"qat.lr={QAT_LR}", f"qat.weight_decay={QAT_WEIGHT_DECAY}"]
    with_qat = {**QAT, **(CONTROL if scheme in CONTROLLED else {})}
    return {
        **{name: [*how, "qat=off", *more] for name, more in PTQ.items()},
        **{name: [*trained, *more] for name, more in with_qat.items()},
    }
