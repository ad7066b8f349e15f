"""Generate the committed stubs, `v1/*_pb2.py` and their kin, from `v1/*.proto`.

`make stubs` writes them; `make stubs-check` (`--check`) compares and changes nothing. Both run in
an environment of their own, pinned by constraints-stubs.txt, whose tools are the oldest that the
supported runtimes accept.
"""

import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path("protos/v1")
WELL_KNOWN_TYPES = Path(protoc.__file__).parent / "_proto"
TYPED_SERVICES = Path(sys.executable).parent / "protoc-gen-mypy_grpc"


def generate(out: Path) -> None:
    """Write all stubs under `out`; those for gRPC only where a file defines a service."""
    protos = sorted(p.relative_to(ROOT) for p in (ROOT / SOURCES).glob("*.proto"))
    services = [p for p in protos if re.search(r"^service\s", (ROOT / p).read_text(), re.MULTILINE)]
    compile_protos(protos, f"--python_out={out}", f"--pyi_out={out}")
    if services:
        plugin = f"--plugin=protoc-gen-mypy_grpc={TYPED_SERVICES}"
        compile_protos(services, plugin, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}")


def compile_protos(protos: list[Path], *options: str) -> None:
    include = [f"-I{ROOT}", f"-I{WELL_KNOWN_TYPES}"]
    if protoc.main(["protoc", *include, *options, *(str(ROOT / p) for p in protos)]) != 0:
        sys.exit("protoc refused; nothing was compared or is complete")


def stubs(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((root / SOURCES).glob("*_pb2*.py*"))}


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        fresh, committed = stubs(Path(tmp)), stubs(ROOT)
    names = fresh.keys() | committed.keys()
    stale = sorted(n for n in names if fresh.get(n) != committed.get(n))
    if sys.argv[1:] == ["--check"]:
        if stale:
            sys.exit(f"stubs differ from their .proto files, run `make stubs`: {', '.join(stale)}")
        print(f"{len(fresh)} stubs agree with their .proto files")
        return
    for name in stale:
        path = ROOT / SOURCES / name
        if name in fresh:
            path.write_bytes(fresh[name])
        else:
            path.unlink()
        print(f"{'wrote' if name in fresh else 'removed'} {SOURCES / name}")


if __name__ == "__main__":
    main()
