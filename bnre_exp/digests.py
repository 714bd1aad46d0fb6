"""What tells two values, tensors or files apart, and seeds that are the same in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line needs digests before it needs torch
    from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, whatever the order of its keys; 40 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    import torch

    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return sha.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            sha.update(chunk)
    return sha.hexdigest()


def stream_seed(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose, the same in every process (hash() is not)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")
