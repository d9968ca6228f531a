"""The package: written whole or not at all, and checked before anything in it is used.

`docs/format.md` is its specification. Needs neither torch nor onnx, and loads nothing native.
Weights are bound by `lingc.engine.bind`.
"""

from lingc.engine.bound import BoundWeights, bind_dir
from lingc.engine.checks import Check, Report
from lingc.engine.examine import LEVELS, Level, verify
from lingc.engine.manifest import FileEntry, Manifest, Variant
from lingc.engine.package import Code, Package, open_package
from lingc.engine.reading import read_manifest
from lingc.engine.writer import Contents, PackageWriter, write_package

__all__ = [
    "LEVELS",
    "BoundWeights",
    "Check",
    "Code",
    "Contents",
    "FileEntry",
    "Level",
    "Manifest",
    "Package",
    "PackageWriter",
    "Report",
    "Variant",
    "bind_dir",
    "open_package",
    "read_manifest",
    "verify",
    "write_package",
]
