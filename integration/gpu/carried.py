"""Libraries that were carried along (`bring_peers.py`): unpacked once, found by every process."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

from .bring_peers import ARCHIVE, INTO, LIBRARY, SITE


def use(folder: Path = INTO) -> str:
    """Put what is packed in a folder where this process and those it starts will find it.

    Returns
    -------
    str
        What there is, for the log.
    """
    archive, site, library = folder / ARCHIVE, folder / SITE, folder / LIBRARY
    if not archive.exists():
        return f"no {archive}: peers that are installed are timed (integration/gpu/bring_peers.py)"
    if not site.exists() or site.stat().st_mtime < archive.stat().st_mtime:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="tar")
        os.utime(site)
    sys.path.append(str(site))
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(site)) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if library.exists():
        os.environ["QPLUG_VLLM_LIBRARY"] = str(library)
    return f"peers of {archive}"
