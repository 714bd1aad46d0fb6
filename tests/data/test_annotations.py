"""COCO's annotations against pycocotools, folders of YOLO against Ultralytics, and what the messages say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from torch import Tensor

from bnre_exp.data import DataSpec, Loaders, Preprocessing, annotations, build_loaders, coco, reading, yolo_folder
from bnre_exp.errors import UserError

SIZES = [(40, 30), (64, 48), (30, 44), (50, 50), (33, 61)]  # width, height


@pytest.fixture(autouse=True)
def _pillow_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics puts a function of its own in the place of Pillow's ``open``, which installs packages."""
    monkeypatch.setattr(Image, "open", Image.open)


def save_images(folder: Path, offset: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, (width, height) in enumerate(SIZES):
        pixels = np.random.RandomState(index + offset).randint(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def loaders_of(name: str, root: Path, digests_folder: Path | None = None, **changes: Any) -> Loaders:
    how = Preprocessing(32, 32, (0.0,) * 3, (1.0,) * 3, fit="pad")
    options: dict[str, Any] = {"batch_size": 2, "eval_batch_size": 3, "val_fraction": 0.0, **changes}
    spec = DataSpec(f"bnre_exp.data.{name}", root=str(root), targets="objects", **options)
    return build_loaders(spec, preprocessing=how, digests_folder=digests_folder)


# COCO


def segmentation(kind: str, box: list[float], size: tuple[int, int]) -> Any:
    x, y, w, h = box
    if kind == "polygon":
        return [[x, y, x + w, y + 1, x + w / 2, y + h]]
    if kind == "two polygons":
        return [[x, y, x + w / 3, y, x, y + h], [x + w, y, x + w, y + h, x + w / 2, y + h]]
    found = np.zeros((size[1], size[0]), np.uint8)
    found[int(y) : int(y + h), int(x) : int(x + w) : 2] = 1
    lengths = run_lengths.encode(np.asfortranarray(found))
    if kind == "compressed":
        return {"size": lengths["size"], "counts": lengths["counts"].decode()}
    changes = np.flatnonzero(np.diff(found.flatten("F"), prepend=0, append=0))
    ends = [0, *changes.tolist(), found.size]
    counts = np.diff(ends)
    return {"size": [size[1], size[0]], "counts": counts.tolist()}


SEGMENTATIONS = ("polygon", "two polygons", "compressed", "uncompressed")


def coco_json(split: str) -> dict[str, Any]:
    rng = np.random.RandomState(len(split))
    images = [
        {"id": 900 - 7 * index, "file_name": f"{index}.png", "width": width, "height": height}
        for index, (width, height) in enumerate(SIZES)
    ]
    found = list[dict[str, Any]]()
    for index, (width, height) in enumerate(SIZES[:-1]):  # the last has no objects
        for number in range(index + 1):
            w, h = rng.randint(6, width // 2), rng.randint(6, height // 2)
            box = [float(rng.randint(0, width - w)) + 0.25, float(rng.randint(0, height - h)), float(w) - 0.5, float(h)]
            points = [
                [int(rng.randint(0, width)), int(rng.randint(0, height)), int(rng.randint(0, 3))] for _ in range(4)
            ]
            found.append({
                "id": len(found) + 1, "image_id": images[index]["id"], "category_id": [90, 3, 17][number % 3],
                "bbox": box, "iscrowd": 0, "area": 1.0, "keypoints": sum(points, []), "num_keypoints": 4,
                "segmentation": segmentation(SEGMENTATIONS[(index + number) % 4], box, (width, height)),
            })  # fmt: skip
    crowd = {**found[0], "id": 500, "iscrowd": 1, "segmentation": segmentation("uncompressed", [1, 1, 9, 9], SIZES[0])}
    flat = {**found[0], "id": 501, "bbox": [3.0, 4.0, 7.0, 0.0]}
    names = [{"id": number, "name": name} for number, name in ((90, "mug"), (3, "cup"), (17, "pot"))]
    return {"images": images, "annotations": [*found, crowd, flat], "categories": names}


def coco_file(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    for offset, split in enumerate(("train", "val")):
        save_images(tmp_path / f"{split}2017", 100 * offset)
        coco_file(tmp_path, split).write_text(json.dumps(coco_json(split)))
    return tmp_path


def test_objects_are_those_of_pycocotools(coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, peer = coco(True, str(coco_root)), COCO(str(coco_file(coco_root)))
    numbers = sorted(peer.getCatIds())
    assert dataset.classes == [peer.cats[number]["name"] for number in numbers] == ["cup", "pot", "mug"]
    assert len(dataset) == 5
    for index, image_id in enumerate(sorted(peer.getImgIds())):
        image, target = dataset[index]
        entry = peer.imgs[image_id]
        assert image.shape == (3, entry["height"], entry["width"])
        assert torch.equal(image, torch.from_numpy(np.array(Image.open(dataset.images[index]))).permute(2, 0, 1))
        known = [one for one in peer.loadAnns(peer.getAnnIds(image_id, iscrowd=False)) if one["bbox"][3]]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in known)]).reshape(-1, 4)
        assert torch.equal(target["boxes"], boxes)
        assert target["labels"].tolist() == [numbers.index(one["category_id"]) for one in known]
        if known:
            masks = np.stack([peer.annToMask(one) for one in known])
            assert np.array_equal(target["masks"].numpy(), masks == 1) and masks.sum() > 20
            areas = [int(run_lengths.area(peer.annToRLE(one))) for one in known]
            assert target["masks"].flatten(1).sum(1).tolist() == areas
            points = np.array([one["keypoints"] for one in known]).reshape(len(known), 4, 3)
            assert np.array_equal(target["keypoints"].numpy(), points)
        else:
            assert target["boxes"].shape == (0, 4) and "masks" not in target
    capsys.readouterr()


@pytest.mark.parametrize("in_memory", [True, False])
def test_loaders_of_coco(coco_root: Path, in_memory: bool) -> None:
    loaders = loaders_of("coco", coco_root, in_memory=in_memory, augment=True, workers=2, num_classes=3)
    batches = list(loaders.test)
    assert [len(target) for _, target in batches] == [3, 2] and loaders.classes == ("cup", "pot", "mug")
    targets = [one for _, target in batches for one in target]
    assert [len(one["boxes"]) for one in targets] == [0, 4, 3, 2, 1]  # by image_id, downwards
    assert targets[1]["masks"].shape == (4, 32, 32) and targets[1]["keypoints"].shape == (4, 4, 3)
    scale = 32 / 50
    dataset = coco(False, str(coco_root))
    torch.testing.assert_close(targets[1]["boxes"], dataset[1][1]["boxes"] * scale)
    assert sum(len(target) for _, target in loaders.train) == 4


@pytest.mark.parametrize("in_memory", [True, False])
def test_digests_tell_a_change_of_an_annotation(coco_root: Path, in_memory: bool) -> None:
    first = loaders_of("coco", coco_root, in_memory=in_memory)
    known = coco_json("val")
    known["annotations"][2]["bbox"][0] += 1
    coco_file(coco_root, "val").write_text(json.dumps(known))
    second = loaders_of("coco", coco_root, in_memory=in_memory)
    assert first.digests["train"] == second.digests["train"] and first.digests["test"] != second.digests["test"]


def test_other_places_are_given_by_keywords(coco_root: Path) -> None:
    coco_file(coco_root).rename(coco_root / "mine.json")
    (coco_root / "train2017").rename(coco_root / "pictures")
    dataset = coco(True, str(coco_root), train_annotations="mine.json", train_images="pictures")
    assert dataset.files_of([1, 3]) == [dataset.images[1], dataset.images[3], coco_root / "mine.json"]
    assert len(dataset) == 5 and dataset[0][1]["boxes"].shape == (0, 4)


def entry_of(known: dict[str, Any], what: str, **changes: Any) -> None:
    for name, value in changes.items():
        if value is None:
            known[what][1].pop(name)
        else:
            known[what][1][name] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: entry_of(k, "annotations", image_id=5), "annotation 2 has the image_id 5, which is in no list"),
        (lambda k: entry_of(k, "annotations", category_id=4), "annotation 2 has the category_id 4, which is in no"),
        (lambda k: entry_of(k, "annotations", bbox=None), "has an entry of another form (KeyError: 'bbox'); expected"),
        (lambda k: entry_of(k, "annotations", bbox=[1, 2, 3]), "has an entry of another form (ValueError"),
        (lambda k: entry_of(k, "annotations", bbox="big"), "has an entry of another form (ValueError"),
        (lambda k: entry_of(k, "annotations", image_id="x"), "has an entry of another form (ValueError"),
        (lambda k: entry_of(k, "images", file_name=None), "has an entry of another form (KeyError: 'file_name')"),
        (lambda k: entry_of(k, "categories", id=None), "has an entry of another form (KeyError: 'id')"),
        (lambda k: k.update(images=[1]), "has an entry of another form (TypeError"),
        (lambda k: k.update(categories=[]), "lists no categories; expected COCO's instances"),
        (lambda k: (k.pop("images"), k.update(annotations=[])), "lists no images and no annotations"),
    ],
)  # fmt: skip
def test_annotations_of_another_form_are_told(
    coco_root: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    known = coco_json("train")
    change(known)
    coco_file(coco_root).write_text(json.dumps(known))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        coco(True, str(coco_root))
    assert str(coco_file(coco_root)) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("", "cannot be read: Expecting value"),
        ("[1]", "lists no images and no annotations and no categories"),
        ("\xff", "cannot be read: 'utf-8' codec"),
        (None, "cannot be read: [Errno 2]"),
    ],
)
def test_files_that_are_no_annotations_are_told(coco_root: Path, text: str | None, message: str) -> None:
    coco_file(coco_root).unlink()
    if text is not None:
        coco_file(coco_root).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(message)):
        coco(True, str(coco_root))


def test_coco_without_a_root_is_told() -> None:
    with pytest.raises(UserError, match=r"dataset\.root is not set: .*Expected ROOT/annotations/instances_train2017"):
        coco(True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root, k: (root / "train2017" / "1.png").unlink(), r"1\.png"),
        (lambda root, k: (root / "train2017" / "1.png").write_bytes(b""), r"1\.png"),
        (lambda root, k: (root / "train2017" / "1.png").write_bytes(b"none"), r"1\.png"),
        (lambda root, k: entry_of(k, "annotations", bbox=[1.0, 2.0, float("nan"), 4.0]), r"\[1.0, 2.0, nan, 4.0\]"),
        (lambda root, k: entry_of(k, "annotations", bbox=[60.0, 2.0, 9.0, 4.0]), r"is empty or outside of its image"),
        (lambda root, k: entry_of(k, "annotations", bbox=[9.0, 2.0, -3.0, 4.0]), r"is empty or outside of its image"),
        (lambda root, k: entry_of(k, "images", width=65), r"item 3 .*it has 64 x 48 pixels; .*json says 65 x 48"),
        (lambda root, k: entry_of(k, "annotations", keypoints=[1, 2]), r"item 3 "),
        (
            lambda root, k: entry_of(k, "annotations", segmentation=segmentation("compressed", [1, 1, 5, 5], (48, 64))),
            r"item 3 ",
        ),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_images_and_objects_that_cannot_be_used_are_named(
    coco_root: Path, change: Callable[[Path, dict[str, Any]], Any], message: str, in_memory: bool
) -> None:
    known = coco_json("train")
    change(coco_root, known)
    coco_file(coco_root).write_text(json.dumps(known))
    with pytest.raises(UserError, match=message):
        loaders_of("coco", coco_root, in_memory=in_memory)


def test_categories_that_differ_between_the_splits_are_refused(coco_root: Path) -> None:
    """Classes are numbered by the order of their ids: with other ids, mAP would be that of exchanged classes."""
    known = coco_json("val")
    ids = [entry["id"] for entry in known["categories"]]
    for entry, other in zip(known["categories"], reversed(ids)):
        entry["id"] = other
    coco_file(coco_root, "val").write_text(json.dumps(known))
    with pytest.raises(UserError, match="the training images have the classes .*, the test images "):
        loaders_of("coco", coco_root)


def test_masks_of_another_size_than_the_image_are_refused_though_they_have_as_many_pixels(coco_root: Path) -> None:
    known = coco_json("train")
    known["annotations"][0]["segmentation"] = segmentation("compressed", [1, 1, 5, 5], (30, 40))
    known["images"][0].update(width=None, height=None)
    coco_file(coco_root).write_text(json.dumps(known))
    with pytest.raises(UserError, match=re.escape("its masks are [1, 40, 30]; expected [1, 30, 40]")):
        loaders_of("coco", coco_root)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was parsed; every file counts as settled, and none is known."""
    texts = list[str]()
    loads = json.loads
    monkeypatch.setattr(reading, "_CLOCK_TICK", -(10**12))
    monkeypatch.setattr(annotations.json, "loads", lambda text: texts.append(text) or loads(text))
    annotations._PARSED.clear()
    yield texts
    annotations._PARSED.clear()


def test_a_file_of_annotations_is_parsed_once(coco_root: Path, parsed: list[str]) -> None:
    for _ in range(3):
        first, other = coco(True, str(coco_root)), coco(False, str(coco_root))
        assert len(first) == len(other) == 5
    assert len(parsed) == 2
    changed = coco_json("train")
    changed["categories"][0]["name"] = "jug"
    coco_file(coco_root).write_text(json.dumps(changed))  # as long as before
    assert coco(True, str(coco_root)).classes == ["cup", "pot", "jug"] and len(parsed) == 3
    before = coco_file(coco_root).stat()
    changed["categories"][0]["name"] = "box"
    coco_file(coco_root).write_text(json.dumps(changed))
    os.utime(coco_file(coco_root), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert coco(True, str(coco_root)).classes == ["cup", "pot", "box"] and len(parsed) == 4
    assert first.classes == ["cup", "pot", "mug"]


def test_the_files_of_two_datasets_are_kept(coco_root: Path, parsed: list[str]) -> None:
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        (coco_root / name).write_bytes(coco_file(coco_root).read_bytes())
    for name in ("a", "b", "c", "d", "a", "e", "a", "c"):
        coco(True, str(coco_root), train_annotations=name)
    assert len(parsed) == 5
    coco(True, str(coco_root), train_annotations="b")
    assert len(parsed) == 6 and len(annotations._PARSED) == 4


def test_a_file_that_has_just_changed_is_parsed_again(coco_root: Path) -> None:
    """Its next change may have the same time."""
    annotations._PARSED.clear()
    coco(True, str(coco_root))
    assert not annotations._PARSED


# YOLO


ROWS = {
    "detect": [
        ["1 0.5 0.5 0.25 0.5", "0 0.2 0.3 0.2 0.2"], ["2 0.75 0.25 0.5 0.5"], None, [],
        ["0 0.1 0.1 0.2 0.2", "0 0.1 0.1 0.2 0.2", "1 0.5 0.5 1 1"],  # one twice
    ],
    "segment": [
        ["1 0.1 0.1 0.9 0.2 0.5 0.8", "0 0.2 0.2 0.6 0.2 0.6 0.7 0.2 0.7"], ["2 0 0 1 0 1 1 0 1"], None, [],
        ["0 0.1 0.1 0.2 0.1 0.8 0.5 0.8 0.9 0.1 0.6"],
    ],
    "pose": [
        ["1 0.5 0.5 0.5 0.5 0.4 0.4 2 0.6 0.6 1", "0 0.2 0.3 0.2 0.2 0 0 0 0.2 0.3 2"],
        ["2 0.75 0.25 0.5 0.5 0.7 0.2 2 0.8 0.3 0"], None, [], ["0 0.1 0.1 0.2 0.2 0.1 0.1 1 0.15 0.1 1"],
    ],
    "pose of two": [["1 0.5 0.5 0.5 0.5 0.4 0.4 0.6 0.6"], ["0 0.5 0.5 1 1 0 0 0.99 0.5"], None, [], []],
}  # fmt: skip


def write_yolo(root: Path, kind: str, **changes: Any) -> Path:
    for offset, split in enumerate(("train", "val")):
        save_images(root / "images" / split, 100 * offset)
        (root / "labels" / split).mkdir(parents=True)
        for index, rows in enumerate(ROWS[kind]):
            if rows is not None:
                (root / "labels" / split / f"{index}.txt").write_text("\n".join(rows))
    known: dict[str, Any] = {"path": str(root), "train": "images/train", "val": "images/val"}
    known["names"] = {0: "cup", 1: "mug", 2: "pot"}
    if kind.startswith("pose"):
        known["kpt_shape"] = [2, 2 if kind == "pose of two" else 3]
    known.update(changes)
    text = yaml.safe_dump({name: value for name, value in known.items() if value is not None})
    (root / "data.yaml").write_text(text)
    return root


def theirs(root: Path, task: str) -> list[dict[str, Any]]:
    dataset = pytest.importorskip("ultralytics.data.dataset")
    known = yaml.safe_load((root / "data.yaml").read_text())
    options: dict[str, Any] = {"img_path": str(root / "images" / "train"), "data": known, "task": task}
    found = dataset.YOLODataset(**options, augment=False, imgsz=64, cache=False).labels
    return sorted(found, key=lambda label: str(label["im_file"]))


@pytest.mark.parametrize("kind", ROWS)
def test_objects_are_those_of_ultralytics(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("ultralytics")
    from ultralytics.data.utils import polygon2mask

    root = write_yolo(tmp_path, kind)
    dataset, peer = yolo_folder(True, str(root)), theirs(root, kind.split()[0])
    assert dataset.classes == ["cup", "mug", "pot"] and [str(path) for path in dataset.images] == [
        label["im_file"] for label in peer
    ]
    for (image, target), label in zip(dataset, peer, strict=True):
        height, width = label["shape"]
        assert image.shape == (3, height, width)
        x, y, w, h = torch.from_numpy(label["bboxes"]).reshape(-1, 4).unbind(1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        expected = corners * torch.tensor([width, height, width, height])
        order, peers = by_place(target["boxes"]), by_place(expected)
        torch.testing.assert_close(target["boxes"][order], expected[peers], rtol=0, atol=1e-4)
        assert target["labels"][order].tolist() == label["cls"].flatten()[peers.numpy()].tolist()
        for place, polygon in enumerate(label["segments"]):
            points = np.round(polygon * [width, height]).astype(np.int32)
            mask = torch.from_numpy(polygon2mask((height, width), [points.flatten()])).bool()
            mine = target["masks"][place]
            assert int((mine & mask).sum()) / int((mine | mask).sum()) > 0.85
        if kind.startswith("pose"):
            points = torch.from_numpy(label["keypoints"]) * torch.tensor([width, height, 1])
            found = target["keypoints"]
            found = found if found.shape[-1] == 3 else torch.nn.functional.pad(found, (0, 1), value=1.0)
            torch.testing.assert_close(found[order], points[peers])


def by_place(boxes: Tensor) -> Tensor:
    return torch.tensor(np.lexsort(boxes.numpy().T.round(2)), dtype=torch.int64)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_image_that_lies_on_its_side_is_annotated_upright(tmp_path: Path, orientation: int) -> None:
    root = write_yolo(tmp_path, "detect")
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(root / "images" / "train" / "1.png", exif=exif)
    pixels, target = yolo_folder(True, str(root))[1]
    width, height = (30, 40) if orientation > 4 else (40, 30)
    assert pixels.shape == (3, height, width)
    assert target["boxes"].tolist() == [[0.5 * width, 0, width, 0.5 * height]]
    assert tuple(theirs(root, "detect")[1]["shape"]) == (height, width)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ROWS)
def test_loaders_of_yolo_folders(tmp_path: Path, kind: str, in_memory: bool) -> None:
    root = write_yolo(tmp_path, kind)
    loaders = loaders_of("yolo_folder", root, in_memory=in_memory, augment=True, num_classes=3)
    targets = [one for _, target in loaders.test for one in target]
    assert [len(one["boxes"]) for one in targets] == [2, 1, 0, 0, 2] if kind == "detect" else len(targets) == 5
    if kind == "segment":
        assert targets[0]["masks"].shape == (2, 32, 32) and targets[0]["masks"].any()
    if kind.startswith("pose"):
        assert targets[1]["keypoints"].shape == (1, 2, 3)
    (root / "labels" / "val" / "0.txt").write_text(ROWS[kind][1][0])  # type: ignore[index]
    changed = loaders_of("yolo_folder", root, in_memory=in_memory)
    assert changed.digests["train"] == loaders.digests["train"] and changed.digests["test"] != loaders.digests["test"]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("detect", "1 0.5 0.5 0.2", "line 2: '1 0.5 0.5 0.2'; expected CLASS X Y WIDTH HEIGHT"),
        ("detect", "cup 0.5 0.5 0.2 0.2", "line 2: could not convert string to float: 'cup'; expected CLASS X Y"),
        ("detect", "0.5 0.5 0.5 0.2 0.2", "line 2: '0.5 0.5 0.5 0.2 0.2'; expected CLASS"),
        ("detect", "nan 0.5 0.5 0.2 0.2", "line 2: 'nan 0.5 0.5 0.2 0.2'; expected CLASS"),
        ("detect", "inf 0.5 0.5 0.2 0.2", "line 2: 'inf 0.5 0.5 0.2 0.2'; expected CLASS"),
        ("detect", "0 0.5 0.5 nan 0.2", "such as [nan,"),
        ("detect", "0 0.5 0.5 0 0.2", "1 of its 2 boxes are empty or outside of the image of 64 x 48"),
        ("detect", "0 12 13 20 20", "1 of its 2 boxes are empty or outside"),
        ("detect", "3 0.5 0.5 0.2 0.2", "its classes go from 2 to 3; expected 0 to 2"),
        ("detect", "-1 0.5 0.5 0.2 0.2", "its classes go from -1 to 2; expected 0 to 2"),
        ("detect", "0 0.1 0.1 0.9 0.2 0.5 0.8", "line 1: a row of 5 numbers; expected an outline"),
        ("segment", "0 0.1 0.1 0.9 0.2", "line 2: a row of 5 numbers; expected an outline of three points or more"),
        ("segment", "0 0.1 0.1 0.9 0.2 0.5 0.8 0.7", "line 2: a row of 8 numbers; expected an outline"),
        ("pose", "0 0.1 0.1 0.2 0.2 0.1 0.1 1", "line 2: a row of 8 numbers; kpt_shape=[2, 3] says 11"),
        ("pose", "0 0.1 0.1 0.2 0.2", "line 2: a row of 5 numbers; kpt_shape=[2, 3] says 11"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, kind: str, row: str, message: str, in_memory: bool) -> None:
    root = write_yolo(tmp_path, kind)
    with (root / "labels" / "train" / "1.txt").open("a") as file:
        file.write(f"\n{row}\n")
    with pytest.raises(UserError, match=rf"item 1 \(.*1\.png\): .*{re.escape(message)}"):
        loaders_of("yolo_folder", root, in_memory=in_memory, num_classes=3)


def write_many(root: Path, count: int) -> Path:
    """A folder for YOLO with more images than are looked at as a sample."""
    for split in ("train", "val"):
        for index in range(count):
            image = root / "images" / split / f"{index:03}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(image)
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split / f"{index:03}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cup]\n")
    return root


@pytest.mark.parametrize("row", ["0 0.5 0.5 0.5", "1 0.5 0.5 0.5 0.5", "0 0.9 0.5 0.5 0.5"])
def test_every_row_is_checked_before_training_and_only_once(
    tmp_path: Path, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, asked, rows = write_many(tmp_path, 150), set[Path](), annotations._rows
    known: dict[str, Any] = {"in_memory": False, "num_classes": 1, "digests_folder": tmp_path / "digests"}
    monkeypatch.setattr(annotations, "_rows", lambda file, *rest: asked.add(file) or rows(file, *rest))
    for is_asked in (True, False):
        asked.clear()
        loaders_of("yolo_folder", root, **known)
        assert (len(asked) == 300) == is_asked
    (root / "labels" / "val" / "077.txt").write_text(f"{row}\n")  # not one of those whose pixels are looked at
    with pytest.raises(UserError, match=r"1 of 150 targets are wrong: item 77 \(.*images/val/077\.png\): "):
        loaders_of("yolo_folder", root, **known)


def test_of_few_images_only_their_files_are_read(coco_root: Path, tmp_path: Path) -> None:
    first = loaders_of("coco", coco_root, in_memory=False, train_limit=2)
    left = set(range(5)) - set(first.train.dataset.indices.tolist())  # type: ignore[attr-defined]
    dataset = coco(True, str(coco_root))
    dataset.images[min(left)].write_bytes(b"no picture")
    assert loaders_of("coco", coco_root, in_memory=False, train_limit=2).digests == first.digests
    with pytest.raises(UserError, match="cannot be read"):
        loaders_of("coco", coco_root, in_memory=False)


def test_a_byte_order_mark_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    root = write_yolo(tmp_path, "detect")
    (root / "labels" / "train" / "1.txt").write_text("\ufeff2 0.75 0.25 0.5 0.5\n\n  \n", encoding="utf-8")
    assert yolo_folder(True, str(root))[1][1]["labels"].tolist() == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": None}, "does not say where train is, or has no names. Expected a file data.yaml"),
        ({"train": None}, "does not say where train is, or has no names"),
        ({"train": "images/nowhere"}, "images/nowhere are not there"),
        ({"train": ["images/train", "images/nowhere"]}, "images/nowhere are not there"),
        ({"train": "labels/train"}, "holds no pictures"),
        ({"train": 5}, "5; expected folders of pictures, or lists of them"),
        ({"train": "images/train/0.png"}, "0.png is no list of pictures"),
        ({"names": "cup"}, "names='cup'; expected a list, or names by number from 0 on"),
        ({"names": {1: "cup", 2: "mug"}}, "expected a list, or names by number from 0 on"),
        ({"names": {"cup": 0}}, "expected a list, or names by number from 0 on"),
        ({"kpt_shape": 17}, "kpt_shape=17; expected [POINTS, 2] or [POINTS, 3]"),
        ({"kpt_shape": [17]}, "kpt_shape=[17]; expected"),
        ({"kpt_shape": [17, 4]}, "kpt_shape=[17, 4]; expected"),
        ({"kpt_shape": [0, 3]}, "kpt_shape=[0, 3]; expected"),
        ({"kpt_shape": ["a", 3]}, "expected [POINTS, 2] or [POINTS, 3]"),
    ],
)
def test_a_data_yaml_of_another_form_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    root = write_yolo(tmp_path, "detect", **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        yolo_folder(True, str(root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [", "cannot be read: while parsing"),
        (b"\xff\xff", "cannot be read: 'utf-8' codec"),
        (b"- train", "does not say where train is"),
        (b"", "does not say where train is"),
        (None, "cannot be read: [Errno 2]"),
    ],
)
def test_a_file_that_is_no_data_yaml_is_told(tmp_path: Path, text: bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "data.yaml").write_bytes(text)
    with pytest.raises(UserError, match=re.escape(message)):
        yolo_folder(True, str(tmp_path))


def test_images_none_of_which_has_labels_are_told(tmp_path: Path) -> None:
    root = write_yolo(tmp_path, "detect")
    (root / "labels").rename(root / "annotations")
    expected = r"none of the 5 test images has a file of labels, such as .*/labels/val/0\.txt"
    with pytest.raises(UserError, match=expected):
        yolo_folder(False, str(root))
    with pytest.raises(UserError, match=r"dataset\.root is not set"):
        yolo_folder(True)


@pytest.mark.parametrize(
    "form", ["list", "text", "relative text", "other machine", "roboflow", "test", "names", "file"]
)
def test_images_are_found_however_the_file_names_them(tmp_path: Path, form: str) -> None:
    forms: dict[str, dict[str, Any]] = {
        "list": {"val": ["images/val", "images/val"]}, "text": {"val": "val.txt"}, "relative text": {"val": "val.txt"},
        "other machine": {"path": "/nowhere/at/all"}, "roboflow": {"path": None, "val": "../images/val"},
        "test": {"val": None, "test": "images/val"}, "file": {},
        "names": {"names": {str(number): f"c{number}" for number in range(12)}},
    }  # fmt: skip
    root = write_yolo(tmp_path / "images" / "data", "detect", **forms[form])
    folder = root / "images" / "val"
    lines = [
        f"./images/val/{index}.png" if form == "relative text" else str(folder / f"{index}.png") for index in (3, 0)
    ]
    (root / "val.txt").write_text("\n".join([*lines, ""]))
    found = yolo_folder(False, str(root / "data.yaml" if form == "file" else root))
    expected = [3, 0] if form.endswith("text") else [0, 1, 2, 3, 4] * (2 if form == "list" else 1)
    assert [path.resolve() for path in found.images] == [folder / f"{index}.png" for index in expected]
    assert len(found[expected.index(0)][1]["boxes"]) == 2
    if form == "names":
        assert found.classes == [f"c{number}" for number in range(12)]
