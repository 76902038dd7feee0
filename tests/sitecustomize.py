"""Lets torchvision, and so timm, be imported beside a CPU build of torch. Tests only: `PYTHONPATH=tests` loads it.

The registry's torchvision for Linux is built against CUDA. Beside a CPU torch its compiled operators cannot be loaded,
and its own import then fails with `operator torchvision::nms does not exist`, because it registers shape rules for two
operators nobody declared. Declaring their schemas is enough: no test calls them. Python runs this file at every
start, so it must stay cheap: torch is touched only once somebody asks for torchvision.
"""

import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareMissingOperators:
    """An import finder that finds nothing; it only looks at the first request for torchvision."""

    library = None  # torch forgets the schemas when their Library is collected

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            cls.declare()
        return None

    @classmethod
    def declare(cls):
        from importlib.machinery import PathFinder

        found = PathFinder.find_spec("torchvision")
        try:
            import torch
        except Exception:  # a broken or missing torch is reported by whoever asked for torchvision
            return
        if found is not None and found.origin is not None and not are_operators_loaded(torch, found.origin):
            cls.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                cls.library.define(schema)


def are_operators_loaded(torch, init_file):
    """Whether torchvision's own compiled operators fit this torch; then they must not be declared twice."""
    from pathlib import Path

    folder = Path(init_file).parent
    for library in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False


sys.meta_path.insert(0, DeclareMissingOperators)
