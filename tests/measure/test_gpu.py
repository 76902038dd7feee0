"""NVML and Zeus, each played by a stand-in."""

import sys
from types import SimpleNamespace

import pytest

from iret.measure.energy import CounterMeter, EnergyError, PowerMeter
from iret.measure.gpu import nvml_meters, zeus_meter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeNvml:
    """`mj` is the energy counter of each board, None where the board is too old to have one; `mw` is everyone's power."""

    class NVMLError(Exception):
        pass

    def __init__(self, *mj: int | None, mw: int = 0) -> None:
        self.mj, self.mw = list(mj), mw
        self.is_up = self.is_lost = False

    def nvmlInit(self) -> None:
        self.is_up = True

    def nvmlDeviceGetCount(self) -> int:
        assert self.is_up
        return len(self.mj)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, board: int) -> str:
        return f"Test {board}"

    def nvmlDeviceGetTotalEnergyConsumption(self, board: int) -> int:
        if self.is_lost or self.mj[board] is None:
            raise self.NVMLError("GPU is lost" if self.is_lost else "Not Supported")
        return self.mj[board]

    def nvmlDeviceGetPowerUsage(self, board: int) -> int:
        if self.is_lost:
            raise self.NVMLError("GPU is lost")
        return self.mw


# ---- NVML


def test_the_counter_of_each_board_is_read_in_joules():
    clock, nvml = Clock(), FakeNvml(5_000, 7_000)
    first, second = nvml_meters(nvml, clock=clock)
    second.start()
    clock.now, nvml.mj = 5.0, [999_000, 1_507_000]
    found = second.stop()
    assert isinstance(first, CounterMeter)
    assert (found.joules, found.source, found.scope) == (1500.0, "nvml:1", "GPU 1 board (Test 1)")
    assert found.kind == "measured"


def test_a_board_without_a_counter_has_its_power_sampled():
    clock, nvml = Clock(), FakeNvml(None, mw=100_000)
    (meter,) = nvml_meters(nvml, clock=clock, is_threaded=False)
    assert isinstance(meter, PowerMeter)
    meter.start()
    for _ in range(8):
        clock.now += 0.75
        meter.sample()
    assert meter.stop().joules == pytest.approx(600.0)


def test_a_window_shorter_than_the_counter_can_show_is_refused():
    clock, nvml = Clock(), FakeNvml(0)
    (meter,) = nvml_meters(nvml, clock=clock)
    meter.start()
    clock.now, nvml.mj = 0.05, [0]
    with pytest.raises(EnergyError, match="0.05 s is too short for nvml:0; .* until it lasts 5 s"):
        meter.stop()


@pytest.mark.parametrize("mj", [0, None])
def test_a_board_lost_in_the_window_is_an_error(mj):
    clock, nvml = Clock(), FakeNvml(mj, mw=1000)
    (meter,) = nvml_meters(nvml, clock=clock, is_threaded=False)
    meter.start()
    clock.now, nvml.is_lost = 6.0, True
    with pytest.raises(EnergyError, match="GPU is lost.; does nvidia-smi work"):
        meter.stop()


def test_a_board_that_meters_nothing_is_found_out_at_once():
    nvml = FakeNvml(0)
    nvml.is_lost = True
    with pytest.raises(EnergyError, match="no answer to nvmlDeviceGetPowerUsage"):
        nvml_meters(nvml)


def test_no_board_and_no_library_are_named(monkeypatch):
    with pytest.raises(EnergyError, match="finds no NVIDIA GPU"):
        nvml_meters(FakeNvml())
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    with pytest.raises(EnergyError, match=r"NVML needs nvidia-ml-py; install it with: pip install 'iret\[energy\]'"):
        nvml_meters()


def test_the_real_library_without_a_driver_or_board_is_one_sentence():
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(EnergyError, match="NVML gives no answer to nvmlInit .*; does nvidia-smi work?"):
            nvml_meters()
    else:
        pytest.skip("this machine has NVIDIA's driver")


# ---- Zeus


class FakeMonitor:
    """Two GPUs and a package; `found` is what the next window ends with."""

    gpu_indices, cpu_indices = [0, 1], [0]

    def __init__(self) -> None:
        self.found = SimpleNamespace(time=6.0, gpu_energy={0: 100.0, 1: 50.0}, cpu_energy={0: 7.0}, total_energy=150.0)
        self.windows: list[str] = []
        self.cancelled = 0

    def begin_window(self, key: str, sync_execution: bool = True) -> None:
        assert not sync_execution
        self.windows.append(key)

    def end_window(self, key: str, sync_execution: bool = True, cancel: bool = False) -> SimpleNamespace:
        assert not sync_execution
        self.windows.remove(key)
        self.cancelled += cancel
        return self.found


def test_zeus_adds_gpus_and_packages_in_its_own_window():
    monitor = FakeMonitor()
    with zeus_meter(monitor).window() as window:
        assert len(monitor.windows) == 1
    assert (window.reading.joules, window.reading.time_s) == (157.0, 6.0)
    assert (window.reading.source, window.reading.scope) == ("zeus", "GPU 0 board + GPU 1 board + CPU package 0")


def test_zeus_windows_are_cancelled_with_ours():
    monitor = FakeMonitor()
    with pytest.raises(KeyError), zeus_meter(monitor).window():
        raise KeyError
    assert (monitor.windows, monitor.cancelled) == ([], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": 1.0}, "1 s is too short for zeus"),
        ({"time": 1.0, "gpu_energy": {0: 0.0, 1: 0.0}}, "1 s is too short for zeus"),
        ({"gpu_energy": {0: 100.0, 1: 0.0}}, "stood still or started again"),
        ({"cpu_energy": {0: -9.0}}, "stood still or started again"),
        ({"cpu_energy": None}, "left out a GPU or CPU package"),
    ],
)
def test_doubtful_readings_of_zeus_are_refused(change, message):
    monitor = FakeMonitor()
    meter = zeus_meter(monitor)
    meter.start()
    vars(monitor.found).update(change)
    with pytest.raises(EnergyError, match=message):
        meter.stop()


def test_what_zeus_raises_becomes_one_sentence():
    monitor = FakeMonitor()
    meter = zeus_meter(monitor)
    meter.start()
    monitor.windows.clear()
    with pytest.raises(EnergyError, match="Zeus failed .ValueError: "):
        meter.stop()


def test_zeus_with_nothing_to_read_and_no_zeus_are_named(monkeypatch):
    empty = FakeMonitor()
    empty.gpu_indices = empty.cpu_indices = []
    with pytest.raises(EnergyError, match="finds neither a GPU nor a CPU counter"):
        zeus_meter(empty)
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    with pytest.raises(EnergyError, match="Zeus is not installed; it is optional: pip install zeus"):
        zeus_meter()
