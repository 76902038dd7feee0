"""The window, the reading, counters and sampled power: recordings played on a clock that the tests move."""

import math
import threading

import pytest

from iret.measure import energy
from iret.measure.energy import Counter, CounterMeter, EnergyError, EnergyMeter, PowerMeter, Reading, measure_idle


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Sensor:
    """A value that a test sets; an exception in its place is raised."""

    def __init__(self, value: float | Exception) -> None:
        self.value = value

    def __call__(self) -> float:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def counter_meter(*sensors: Sensor, clock: Clock, range_j: float | None = None) -> CounterMeter:
    counters = [Counter(read_j=sensor, range_j=range_j) for sensor in sensors]
    return CounterMeter("test:counter", "a test", counters, resolution_s=1.0, clock=clock)


def power_meter(sensor: Sensor, clock: Clock, is_threaded: bool = False, period_s: float = 0.5) -> PowerMeter:
    return PowerMeter(
        "test:power", "a rail", sensor, period_s=period_s, resolution_s=1.0, clock=clock, is_threaded=is_threaded
    )


def is_sampling() -> bool:
    return any(thread.name == "iret test:power" for thread in threading.enumerate())


def reading(joules: float = 10.0, time_s: float = 2.0, kind: energy.Kind = "measured") -> Reading:
    return Reading(joules=joules, time_s=time_s, source="test", scope="a test", kind=kind)


# ---- the window


def test_a_window_reads_what_the_counters_grew_by_and_says_where_it_comes_from():
    clock, first, second = Clock(), Sensor(100.0), Sensor(7.0)
    with counter_meter(first, second, clock=clock).window() as window:
        clock.now, first.value, second.value = 4.0, 110.0, 9.0
    expected = Reading(joules=12.0, time_s=4.0, source="test:counter", scope="a test", kind="measured")
    assert window.reading == expected
    assert window.reading.power_w == 3.0


def test_a_window_has_no_reading_before_it_is_over():
    clock, sensor = Clock(), Sensor(0.0)
    with counter_meter(sensor, clock=clock).window() as window:
        with pytest.raises(EnergyError, match="read it after the `with` block"):
            _ = window.reading
        clock.now, sensor.value = 2.0, 1.0
    assert window.reading.joules == 1.0


def test_an_exception_in_the_window_passes_and_leaves_the_meter_usable():
    clock, sensor = Clock(), Sensor(0.0)
    meter = counter_meter(sensor, clock=clock)
    with pytest.raises(KeyError), meter.window() as window:
        raise KeyError
    with pytest.raises(EnergyError, match="has no reading"):
        _ = window.reading
    meter.start()
    clock.now, sensor.value = 2.0, 5.0
    assert meter.stop().joules == 5.0


def test_windows_neither_nest_nor_close_twice():
    meter = counter_meter(Sensor(0.0), clock=Clock())
    with pytest.raises(EnergyError, match="has no window open; call start"):
        meter.stop()
    meter.start()
    with pytest.raises(EnergyError, match="has a window open; stop it before the next"):
        meter.start()


def test_a_window_below_the_resolution_says_how_long_is_needed():
    clock, sensor = Clock(), Sensor(0.0)
    meter = counter_meter(sensor, clock=clock)
    meter.start()
    clock.now, sensor.value = 0.999, 5.0
    with pytest.raises(EnergyError, match="0.999 s is too short for test:counter; .* until it lasts 1 s"):
        meter.stop()
    meter.start()  # the refused window is closed
    clock.now += 1.0
    sensor.value = 6.0
    assert meter.stop().joules == 1.0


def test_a_sensor_that_stands_still_is_no_zero():
    clock = Clock()
    meter = counter_meter(Sensor(3.0), clock=clock)
    meter.start()
    clock.now = 2.0
    with pytest.raises(EnergyError, match="read 0 J over 2 s, .* stuck, not connected, or slower than this window"):
        meter.stop()


def test_an_energy_error_is_a_value_error():
    assert issubclass(EnergyError, ValueError)


# ---- counters


def test_a_counter_that_starts_again_is_put_right():
    clock, sensor = Clock(), Sensor(990.0)
    meter = counter_meter(sensor, clock=clock, range_j=1000.0)
    meter.start()
    clock.now, sensor.value = 1.5, 15.0
    assert meter.stop().joules == 25.0


def test_a_window_in_which_it_could_start_again_twice_is_refused():
    """At 25 J or 1025 J in t seconds: the second is possible from 1025 / 500 W = 2.05 s on."""
    clock, sensor = Clock(), Sensor(990.0)
    meter = counter_meter(sensor, clock=clock, range_j=1000.0)
    for time_s, is_refused in ((2.04, False), (2.06, True)):
        sensor.value = 990.0
        meter.start()
        clock.now, sensor.value = clock.now + time_s, 15.0
        if is_refused:
            with pytest.raises(EnergyError, match="in 2 s .* started again more than once; take windows under 2 s"):
                meter.stop()
        else:
            assert meter.stop().joules == 25.0


@pytest.mark.parametrize("range_j", [None, 50.0])
def test_a_counter_that_goes_back_was_reset(range_j):
    clock, sensor = Clock(), Sensor(100.0)
    meter = counter_meter(sensor, clock=clock, range_j=range_j)
    meter.start()
    clock.now, sensor.value = 2.0, 1.0
    with pytest.raises(EnergyError, match="counted backwards, so it was reset"):
        meter.stop()


def test_a_counter_that_vanishes_ends_the_window():
    clock, sensor = Clock(), Sensor(100.0)
    meter = counter_meter(sensor, clock=clock)
    meter.start()
    sensor.value = EnergyError("it is gone")
    with pytest.raises(EnergyError, match="it is gone"):
        meter.stop()
    sensor.value = 0.0
    meter.start()  # nothing is left open


# ---- sampled power


def test_power_is_integrated_by_the_trapezoid_rule():
    """10 W at 0 s, 20 W at 1 s, 20 W at 3 s: 15 + 40 J."""
    clock, sensor = Clock(), Sensor(10.0)
    meter = power_meter(sensor, clock)
    meter.start()
    clock.now, sensor.value = 1.0, 20.0
    meter.sample()
    clock.now = 3.0
    found = meter.stop()
    assert (found.joules, found.time_s) == (55.0, 3.0)
    assert meter.samples.tolist() == [[0.0, 10.0], [1.0, 20.0], [3.0, 20.0]]


def test_a_sample_counts_at_the_middle_of_its_reading():
    clock = Clock()

    def slow() -> float:
        clock.now += 0.5
        return 4.0

    meter = power_meter(slow, clock)
    meter.start()  # read from 0 to 0.5 s
    clock.now = 2.0
    assert meter.stop().time_s == 2.0  # 2.25 - 0.25
    assert meter.samples[:, 0].tolist() == [0.25, 2.25]


def test_power_that_was_not_read_for_long_is_refused():
    clock, sensor = Clock(), Sensor(10.0)
    meter = power_meter(sensor, clock, period_s=0.1)
    for gap_s, is_refused in ((0.99, False), (1.01, True)):  # 10 periods are 1 s
        meter.start()
        clock.now += gap_s
        meter.sample()
        clock.now += 0.5
        if is_refused:
            with pytest.raises(EnergyError, match="was not read for 1.01 s .* at a period of 0.1 s"):
                meter.stop()
        else:
            assert meter.stop().joules == pytest.approx(14.9)


def test_a_sensor_that_vanishes_between_the_ends_is_an_error_even_if_it_comes_back():
    clock, sensor = Clock(), Sensor(10.0)
    meter = power_meter(sensor, clock)
    meter.start()
    clock.now, sensor.value = 1.0, EnergyError("in1_input is gone")
    meter.sample()
    clock.now, sensor.value = 2.0, 10.0
    with pytest.raises(EnergyError, match="in1_input is gone"):
        meter.stop()


def test_a_sensor_that_cannot_be_read_opens_no_window():
    sensor = Sensor(EnergyError("closed to this user"))
    meter = power_meter(sensor, Clock(), is_threaded=True)
    with pytest.raises(EnergyError, match="closed to this user"):
        meter.start()
    assert not is_sampling()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_power_that_is_no_number_is_refused(value):
    with pytest.raises(EnergyError, match="which is no power"):
        power_meter(Sensor(value), Clock()).start()


def test_negative_noise_on_an_idle_rail_is_averaged_and_a_negative_sum_refused():
    clock, sensor = Clock(), Sensor(-1.0)
    meter = power_meter(sensor, clock)
    meter.start()
    clock.now, sensor.value = 2.0, 3.0
    assert meter.stop().joules == 2.0
    meter.start()
    clock.now, sensor.value = 4.0, -5.0
    with pytest.raises(EnergyError, match="read -2 J"):
        meter.stop()


def test_the_thread_samples_by_itself_and_ends_with_the_window():
    clock, enough = Clock(), threading.Event()

    def read_w() -> float:
        clock.now += 0.005  # time passes only by reading, so that the result is exact whoever reads
        if clock.now > 0.03:
            enough.set()
        return 6.0

    meter = PowerMeter("test:power", "a rail", read_w, period_s=0.001, resolution_s=0.02, clock=clock)
    meter.start()
    assert enough.wait(timeout=10)
    found = meter.stop()
    assert len(meter.samples) >= 7
    assert found.joules == pytest.approx(6 * found.time_s)
    assert not is_sampling()


def test_a_window_left_by_an_exception_ends_the_thread():
    with pytest.raises(KeyError), power_meter(Sensor(1.0), Clock(), is_threaded=True).window():
        assert is_sampling()
        raise KeyError
    assert not is_sampling()


# ---- idle


def test_idle_is_the_mean_power_of_a_sleep_just_above_the_resolution():
    clock, sensor = Clock(), Sensor(0.0)

    def sleep(time_s: float) -> None:
        clock.now += time_s
        sensor.value += 4 * time_s

    meter = counter_meter(sensor, clock=clock)
    assert measure_idle(meter, sleep=sleep) == pytest.approx(4.0)
    assert clock.now == pytest.approx(1.1)
    assert measure_idle(meter, time_s=3.0, sleep=sleep) == pytest.approx(4.0)
    assert clock.now == pytest.approx(4.1)


def test_idle_power_is_taken_off_and_said():
    left = reading(joules=10.0, time_s=2.0).minus_idle(3.0)
    assert (left.joules, left.idle_w, left.time_s) == (4.0, 3.0, 2.0)
    assert reading().idle_w is None


def test_idle_power_that_leaves_nothing_of_the_reading_is_never_a_silent_negative():
    for idle_w in (5.0, 5.1):
        sentence = f"{idle_w:g} W idle over 2 s is all of the 10 J .* or more; measure the idle baseline again"
        with pytest.raises(EnergyError, match=sentence):
            reading(joules=10.0, time_s=2.0).minus_idle(idle_w)


def test_idle_power_comes_off_once_and_never_off_an_estimate():
    for whole in (reading().minus_idle(1.0), reading(kind="estimated")):
        with pytest.raises(EnergyError, match="holds no idle power"):
            whole.minus_idle(1.0)


@pytest.mark.parametrize("idle_w", [-1.0, math.nan])
def test_an_impossible_idle_power_is_refused(idle_w):
    with pytest.raises(EnergyError, match="is no idle power"):
        reading().minus_idle(idle_w)


def test_an_estimate_has_no_idle_power_to_measure():
    class Estimate(EnergyMeter):
        def _begin(self) -> None: ...

        def _end(self) -> tuple[float, float]:
            return 1.0, 1.0

    with pytest.raises(EnergyError, match="is an estimate of work done"):
        measure_idle(Estimate("e", "s", resolution_s=0.0, kind="estimated"), sleep=lambda time_s: None)
