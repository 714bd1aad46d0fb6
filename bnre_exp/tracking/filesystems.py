"""What kind of file system a folder is on."""

from __future__ import annotations

import os
from pathlib import Path

NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "pvfs2",
    "orangefs", "wekafs", "panfs", "quobyte", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse", "fuse.quobyte",
}  # fmt: skip


def is_on_network(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a folder is on a network's file system; False where the system does not say (no ``/proc``)."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    real = os.path.realpath(folder)
    best, kind = "", ""
    for line in lines:  # proc(5): ID parent major:minor root mount-point options ... - type source super-options
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split(" ")[0]
    return kind in NETWORK
