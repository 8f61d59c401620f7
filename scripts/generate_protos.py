#!/usr/bin/env python3
"""Write the Python code of serve/protos/**/*.proto next to them. Needs the development dependency grpcio-tools.

python scripts/generate_protos.py            write
python scripts/generate_protos.py --check    change nothing; exit 1 if the committed code is not current
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "serve" / "protos"


def generate(root: Path = ROOT) -> dict[Path, str]:
    """{path relative to root: text} of all protos under `root`. Raises RuntimeError if protoc refuses one."""
    from grpc_tools import protoc

    protos = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{root}", f"-I{well_known}", *outputs, *protos]) != 0:
            raise RuntimeError(f"protoc refused the files under {root}; its complaint is above")
        written = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        texts = {path.relative_to(folder): _into_package(path.read_text()) for path in written}
    # A grpc module of a proto without services would be empty.
    return {path: text for path, text in texts.items() if not path.match("*_pb2_grpc.py") or "Servicer" in text}


def _into_package(text: str) -> str:
    """protoc imports by proto path (`preble.v1`); the files live in the package `serve.protos`."""
    return re.sub(r"^from preble\.v1 import", "from serve.protos.preble.v1 import", text, flags=re.MULTILINE)


def stale(root: Path = ROOT) -> list[str]:
    """What `--check` complains about: files that are missing, differ, or have no proto any more."""
    expected = generate(root)
    found = {path.relative_to(root) for path in root.rglob("*_pb2*") if path.suffix in (".py", ".pyi")}
    differ = (path for path, text in expected.items() if path not in found or (root / path).read_text() != text)
    return sorted(str(path) for path in {*differ, *(found - expected.keys())})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the code is not current")
    if parser.parse_args().check:
        names = stale()
        if names:
            print(f"not current: {', '.join(names)}; run python scripts/generate_protos.py", file=sys.stderr)
        return 1 if names else 0
    for path, text in generate().items():
        (ROOT / path).write_text(text)
        print(f"wrote {ROOT / path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
