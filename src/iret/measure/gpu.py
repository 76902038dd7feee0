"""NVIDIA GPUs through NVML, and whatever Zeus reads.

NVML counts a board's millijoules since the driver was loaded on Volta and later; on older boards its watts are sampled. Boards
are numbered as nvidia-smi does, which CUDA_VISIBLE_DEVICES and CUDA's own order may not follow, and a board's MIG slices are
not told apart. Call `torch.cuda.synchronize()` before both ends of a window. Tested with a stand-in for each library; NVML was
read on one board too (docs/energy.md).
"""

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from iret.measure.energy import Clock, Counter, CounterMeter, EnergyError, EnergyMeter, PowerMeter

NVML_RESOLUTION_S = (
    5.0  # the counter and the power move about ten times a second: shorter windows blur, tiny ones read 0 J
)
NVML_PERIOD_S = 0.1
ZEUS_RESOLUTION_S = NVML_RESOLUTION_S  # it reads the same counters


def nvml_meters(nvml: Any = None, *, clock: Clock = time.perf_counter, is_threaded: bool = True) -> list[EnergyMeter]:
    """One meter for each board. `nvml` is the module `pynvml`, imported where it is None.

    Raises:
        EnergyError: nvidia-ml-py is not installed, or there is no driver or no board.
    """
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError as error:
            raise EnergyError("NVML needs nvidia-ml-py; install it with: pip install 'iret[energy]'") from error

    def ask(name: str, *arguments: object) -> Any:
        try:
            return getattr(nvml, name)(*arguments)
        except nvml.NVMLError as error:
            raise EnergyError(f"NVML gives no answer to {name} ({error}); does nvidia-smi work?") from error

    ask("nvmlInit")
    boards = [ask("nvmlDeviceGetHandleByIndex", index) for index in range(ask("nvmlDeviceGetCount"))]
    if not boards:
        raise EnergyError("NVML finds no NVIDIA GPU; inside a container, start it with its GPUs.")
    meters: list[EnergyMeter] = []
    for index, board in enumerate(boards):
        source, scope = f"nvml:{index}", f"GPU {index} board ({ask('nvmlDeviceGetName', board)})"
        if _counts_energy(nvml, board):
            counter = Counter(read_j=_scaled(ask, "nvmlDeviceGetTotalEnergyConsumption", board))
            meters.append(CounterMeter(source, scope, [counter], resolution_s=NVML_RESOLUTION_S, clock=clock))
        else:
            read_w = _scaled(ask, "nvmlDeviceGetPowerUsage", board)
            read_w()  # boards that meter nothing are found out now
            meters.append(
                PowerMeter(
                    source,
                    scope,
                    read_w,
                    period_s=NVML_PERIOD_S,
                    resolution_s=NVML_RESOLUTION_S,
                    clock=clock,
                    is_threaded=is_threaded,
                )
            )
    return meters


def _counts_energy(nvml: Any, board: object) -> bool:
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except nvml.NVMLError:
        return False
    return True


def _scaled(ask: Callable[..., Any], name: str, board: object) -> Callable[[], float]:
    """NVML counts in thousandths."""
    return lambda: ask(name, board) * 1e-3


class ZeusMeter(EnergyMeter):
    """The GPUs and CPU packages of a `zeus.monitor.ZeusMonitor` together; not DRAM, nor Apple's and Jetson's chips.

    Zeus's own `total_energy` is that of the GPUs alone, and is not used. Zeus would synchronise CUDA by importing torch, and is
    told not to: that is the caller's.
    """

    def __init__(self, monitor: Any) -> None:
        """Raises EnergyError if the monitor watches nothing."""
        watched = [f"GPU {index} board" for index in monitor.gpu_indices]
        watched += [f"CPU package {index}" for index in monitor.cpu_indices]
        if not watched:
            raise EnergyError("Zeus finds neither a GPU nor a CPU counter it may read; RAPL needs root or zeusd.")
        super().__init__("zeus", " + ".join(watched), resolution_s=ZEUS_RESOLUTION_S)
        self._monitor = monitor
        self._key = f"iret {id(self)}"

    def _begin(self) -> None:
        self._ask(self._monitor.begin_window)

    def _end(self) -> tuple[float, float]:
        found = self._ask(self._monitor.end_window)
        parts = [*found.gpu_energy.values(), *(found.cpu_energy or {}).values()]
        if len(parts) != len(self._monitor.gpu_indices) + len(self._monitor.cpu_indices):
            raise EnergyError("Zeus left out a GPU or CPU package it had found, so the sum would be too small.")
        if min(parts) <= 0 and found.time >= self.resolution_s:
            raise EnergyError("a counter that Zeus reads stood still or started again in this window; measure again.")
        return float(sum(parts)), float(found.time)

    def _abandon(self) -> None:
        self._ask(self._monitor.end_window, cancel=True)

    def _ask(self, call: Callable[..., Any], **options: bool) -> Any:
        try:
            return call(self._key, sync_execution=False, **options)
        except Exception as error:  # Zeus passes on whatever its back ends raise
            raise EnergyError(f"Zeus failed ({type(error).__name__}: {error}).") from error


def zeus_meter(monitor: Any = None) -> ZeusMeter:
    """A meter over `monitor`, or over a ZeusMonitor of all it finds.

    Raises:
        EnergyError: zeus is not installed, cannot start, or finds nothing to read.
    """
    if monitor is None:
        try:
            monitor = import_module("zeus.monitor").ZeusMonitor()
        except ImportError as error:
            raise EnergyError("Zeus is not installed; it is optional: pip install zeus") from error
        except Exception as error:  # as above
            raise EnergyError(f"Zeus cannot start ({type(error).__name__}: {error}).") from error
    return ZeusMeter(monitor)
