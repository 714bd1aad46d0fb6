"""Batches as Ultralytics' losses and validators take them, from pairs and from the dicts of their own loaders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnre_exp.errors import UserError
from bnre_exp.tasks.detection import objects_of

PER_CELL = 4  # pixels: masks are measured at a fourth of the images' sides, as theirs are
NEEDED = ("img", "cls", "bboxes", "batch_idx")  # of a batch of their loaders


def images_of(batch: Any) -> Tensor:
    """The images of a batch of either form, in [0, 1]."""
    if isinstance(batch, Mapping):
        images: Tensor = batch["img"]
        return images if images.is_floating_point() else images.float() / 255
    found = batch[0] if isinstance(batch, (tuple, list)) else batch
    return found  # type: ignore[no-any-return]


def theirs(batch: Any, kind: str, points: int) -> dict[str, Any]:
    """A batch as Ultralytics' losses and validators take it: boxes as centre and size, parts of the images' sides.
    points: of an object, in a pose network. Raises ``UserError`` for a batch without what this kind is taught."""
    if isinstance(batch, Mapping):
        _check_theirs(batch, kind)
    images = images_of(batch)
    height, width = images.shape[2:]
    extra: dict[str, Any] = {"img": images, "im_file": [str(place) for place in range(len(images))]}
    extra |= {"ori_shape": [(height, width)] * len(images), "ratio_pad": [None] * len(images)}
    if isinstance(batch, Mapping):
        masks = {"masks": _one_each(batch)} if kind == "segment" else {}
        return {**extra, **batch, "img": images, **masks}
    targets, device = objects_of(batch), images.device
    scale = torch.tensor([width, height, width, height], device=device)
    boxes = torch.cat([target["boxes"].to(device) for target in targets]) / scale
    counts = torch.tensor([len(target["boxes"]) for target in targets], device=device)
    made = {
        **extra,
        "batch_idx": torch.arange(len(targets), device=device).repeat_interleave(counts).float(),
        "cls": torch.cat([target["labels"] for target in targets]).to(device).float().reshape(-1, 1),
        "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1),
    }
    if kind == "segment":
        made.update(_masks(targets, (height, width), device))
    if kind == "pose":
        made["keypoints"] = _keypoints(targets, scale[:2], points)
    return made


def _check_theirs(batch: Mapping[str, Any], kind: str) -> None:
    needed = (*NEEDED, *{"segment": ("masks",), "pose": ("keypoints",)}.get(kind, ()))
    if missing := [name for name in needed if name not in batch]:
        raise UserError(
            f"A batch is a dict without {', '.join(missing)}; expected one of Ultralytics' loaders, with "
            f"{', '.join(needed)}, or a pair (images, targets)."
        )


def _one_each(batch: Mapping[str, Any]) -> Tensor:
    """The masks of a batch of their loaders, one an object ``[n, h, w]``. By their default there is one an image, which
    holds the numbers of its objects, from 1."""
    masks, images = batch["masks"], batch["batch_idx"].long()
    if len(masks) != len(batch["img"]) or (len(masks) == len(images) and not bool((masks > 1).any())):
        return cast(Tensor, masks)
    counts = images.bincount(minlength=len(masks))
    numbers = torch.arange(1, len(images) + 1, device=images.device) - (counts.cumsum(0) - counts)[images]
    return (masks[images] == numbers[:, None, None]).float()


def _masks(targets: Any, size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Masks of the objects ``[n, h, w]``, and the class of each pixel ``[N, h, w]``: of the smallest object there."""
    if any("masks" not in target for target in targets if len(target["boxes"])):
        raise UserError(
            "task: the network segments objects, and the dataset gives no masks of them for an image; every object "
            "needs one (COCO's segmentation must not be empty)."
        )
    smaller = (size[0] // PER_CELL, size[1] // PER_CELL)
    masks, classes = [torch.zeros(0, *smaller, device=device)], list[Tensor]()
    for target in targets:
        classes.append(torch.zeros(smaller, device=device))
        if not len(target["boxes"]):
            continue
        found = nn.functional.interpolate(target["masks"].to(device).float()[None], smaller, mode="nearest")[0]
        masks.append(found)
        areas = found.sum((1, 2))[:, None, None]
        smallest = torch.where(found > 0, areas, areas.amax() + 1).argmin(0)
        classes[-1] = target["labels"].to(device)[smallest] * (found > 0).any(0).float()
    return {"masks": torch.cat(masks), "sem_masks": torch.stack(classes)}


def _keypoints(targets: Any, scale: Tensor, many: int) -> Tensor:
    """Keypoints ``[n, K, 3]``, as parts of the images' sides, and 2 where they are seen, as COCO has it."""
    found = [target.get("keypoints") for target in targets if len(target["boxes"])]
    if any(points is None for points in found):
        raise UserError(
            "task: the network tells poses, and the dataset gives no keypoints of objects for an image; every "
            "object needs them."
        )
    odd = [list(points.shape) for points in found if points.ndim != 3 or list(points.shape[1:]) != [many, 3]]
    if odd:
        raise UserError(
            f"task: the network tells {many} keypoints an object; expected [n, {many}, 3], got {odd[0]}. A network for "
            "others is made by model.kwargs.data_kpt_shape=[K,3]."
        )
    every = torch.cat([torch.zeros(0, many, 3), *found]).to(scale.device)
    return torch.cat([every[..., :2] / scale, 2.0 * (every[..., 2:] > 0)], dim=-1)


def one_image(output: Any, place: int) -> Any:
    """The output for one image of a batch."""
    if isinstance(output, Tensor):
        return output[place : place + 1]
    if isinstance(output, Mapping):
        return {name: one_image(value, place) for name, value in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(one_image(value, place) for value in output)
    return output
