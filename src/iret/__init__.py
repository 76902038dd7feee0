"""iret: a vision transformer whose cost is a dial.

Public names load on first use; importing the package loads neither torch nor NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iret.fixed import FixedCounts, capture_graph
    from iret.model import Iret
    from iret.output import Output, Trace
    from iret.runtime.cost import Shape
    from iret.runtime.points import OperatingPoints
    from iret.runtime.session import Session
    from iret.zoo import create_model, list_models, load

_HOMES = {
    "FixedCounts": "iret.fixed",
    "Iret": "iret.model",
    "Output": "iret.output",
    "Trace": "iret.output",
    "Shape": "iret.runtime.cost",
    "OperatingPoints": "iret.runtime.points",
    "Session": "iret.runtime.session",
    "capture_graph": "iret.fixed",
    "create_model": "iret.zoo",
    "list_models": "iret.zoo",
    "load": "iret.zoo",
}

__all__ = [
    "FixedCounts",
    "Iret",
    "OperatingPoints",
    "Output",
    "Session",
    "Shape",
    "Trace",
    "__version__",
    "capture_graph",
    "create_model",
    "list_models",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'iret' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "iret":
            raise
        raise ImportError(f"iret.{name} needs {error.name}; install it with: pip install 'iret[torch]'") from error


def __dir__() -> list[str]:
    return __all__
