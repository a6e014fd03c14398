"""What a device is asked before anything is sent: Python's version, what is missing, free space, files already there.

Read as text and run there with whatever Python 3 it has: the standard library only, and no syntax newer than 3.6.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys

__all__ = ["MARK", "NEEDED", "main"]

NEEDED = {"numpy": "numpy", "PIL": "pillow", "pydantic": "pydantic"}  # module -> what to install
MARK = "@vitrim "


def main() -> None:
    """Print one marked line of JSON about this machine and the current folder."""
    files = {}
    for folder, _, names in os.walk("."):
        for name in names:
            path = os.path.join(folder, name)
            digest = hashlib.sha256()
            with open(path, "rb") as stream:
                for piece in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(piece)
            files[os.path.relpath(path).replace(os.sep, "/")] = digest.hexdigest()
    found = {
        "python": list(sys.version_info[:3]),
        "missing": [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None],
        "free_bytes": shutil.disk_usage(".").free,
        "files": files,
    }
    print(MARK + json.dumps(found))


if __name__ == "__main__":
    main()
