"""The estimates under the controller, each by hand: what is learned, when, and what is said of a reading not believed."""

import math

import numpy as np
import pytest

from iret.runtime.estimates import (
    COST_IMAGES,
    DEMAND_IMAGES,
    HASTE,
    SETTLE_IMAGES,
    SMOOTHING,
    Battery,
    Deadline,
    Demand,
    Factor,
    Thermometer,
    read_number,
)


@pytest.mark.parametrize(("value", "number"), [(0, 0.0), (2.5, 2.5), ("3", 3.0), (True, 1.0)])
def test_a_finite_number_of_zero_or_more_is_read(value, number):
    assert read_number(value) == number


@pytest.mark.parametrize("value", [None, -1.0, math.nan, math.inf, "full", [], {}])
def test_anything_else_is_no_number(value):
    assert read_number(value) is None


# ---- costs


def test_costs_are_at_first_a_mean_in_which_the_table_counts_as_ten_images():
    factor, doubts = Factor(), []
    assert factor.take(6.0, 4.0, 1, doubts) == 6.0
    assert factor.value == pytest.approx((COST_IMAGES + 1.5) / (COST_IMAGES + 1))
    factor.take(4.0, 4.0, 9, doubts)
    assert factor.value == pytest.approx((COST_IMAGES + 1.5 + 9) / (COST_IMAGES + 10))
    assert doubts == []


def test_to_be_careful_is_to_believe_the_measurements_alone_where_they_are_dearer():
    factor, spread = Factor(), 0.25
    assert factor.careful(spread) == 1.0
    factor.take(2.4, 2.0, 1, [])
    factor.take(2.1, 2.0, 4, [])
    assert factor.careful(spread) == pytest.approx((1.2 + 4 * 1.05) / 5)  # so few may well be by chance
    assert 1.0 < factor.value < 1.05
    factor.rescale(5.0)
    assert factor.careful(spread) == factor.value


def test_a_standard_error_is_added_where_the_table_is_off():
    factor, spread = Factor(), 0.25
    for _ in range(16):
        factor.take(3.0, 2.0, 1, [])
    assert factor.careful(spread) == pytest.approx(1.5 * (1 + spread / 4))
    assert factor.careful(0.0) == pytest.approx(1.5)
    together = Factor()
    together.take(16 * 3.0, 16 * 2.0, 16, [])
    assert together.careful(spread) == pytest.approx(1.5 * (1 + spread / 4))
    for _ in range(2000):
        factor.take(3.0, 2.0, 1, [])
    assert factor.careful(spread) == pytest.approx(
        1.5 * (1 + spread * math.sqrt(SMOOTHING / (2 - SMOOTHING))), rel=1e-4
    )
    factor.rescale(1.0)
    factor.take(0.5 * factor.value, 1.0, 1, [])
    assert factor.careful(spread) == factor.value  # what was believed counts where it is dearer


def test_costs_are_learned_and_one_odd_measurement_weighs_little():
    factor = Factor()
    for _ in range(1000):
        factor.take(3.0, 2.0, 1, [])
    assert factor.value == pytest.approx(1.5, rel=0.01)
    factor.take(7.9, 2.0, 1, [])
    assert factor.value == pytest.approx(1.5 + SMOOTHING * 1.5, rel=0.01)  # 3.95 times, heard as twice 1.5


@pytest.mark.parametrize(("measured", "believed"), [(100.0, 8.0), (0.001, 0.5)])
def test_a_measurement_far_off_the_table_is_clipped_and_named(measured, believed):
    factor, doubts = Factor(), []
    assert factor.take(measured, 2.0, 1, doubts) == believed
    assert doubts == [f"joules measured at {measured / 2:.3g} times the table's"]


@pytest.mark.parametrize(
    ("measured", "said"), [(None, []), (0.0, ["joules measured as 0.0"]), (math.nan, ["joules measured as nan"])]
)
def test_a_meter_that_says_nothing_is_stood_in_for_by_what_was_learned(measured, said):
    factor, doubts = Factor(), []
    factor.value = 1.5
    assert factor.take(measured, 2.0, 3, doubts) == 3.0
    assert (factor.value, doubts) == (1.5, said)


def test_a_deadline_goes_by_what_one_image_in_twenty_exceeds():
    deadline, doubts, random = Deadline(10.0), [], np.random.default_rng(0)
    assert (deadline.value, deadline.limit) == (HASTE, 10.0 / HASTE)
    for ratio in random.uniform(0.5, 1.5, 2000):
        deadline.take(4.0 * ratio, 4.0, 1, doubts)
    assert deadline.value == pytest.approx(1.45, abs=0.05)
    for ratio in random.uniform(0.25, 0.75, 600):
        deadline.take(4.0 * ratio, 4.0, 1, doubts)
    assert deadline.value == pytest.approx(0.725, abs=0.03)
    assert doubts == []


def test_a_late_image_counts_at_first_and_one_in_a_hundred_does_not():
    deadline = Deadline(10.0)
    for _ in range(9):
        deadline.take(4.0, 5.0, 1, [])
    assert (deadline.value, deadline.heard) == (HASTE, 1.0)  # so few images tell nothing of one in twenty
    for _ in range(3):
        deadline.take(4.0, 5.0, 1, [])
    assert deadline.value == deadline.heard == 0.8
    early = Deadline(10.0)
    early.take(10.0, 5.0, 1, [])
    assert early.value == early.heard == 2.0
    for _ in range(100):
        deadline.take(4.0, 5.0, 1, [])
    deadline.take(10.0, 5.0, 1, [])
    assert deadline.value == 0.8
    deadline.take(10.0, 5.0, 10, [])  # the mean of ten stands for each
    assert deadline.value == 2.0


def test_a_fall_of_a_few_percent_does_not_move_a_deadline():
    deadline = Deadline(10.0)
    for ratio in (1.0, 0.96, 0.94):
        for _ in range(700):
            deadline.take(5.0 * ratio, 5.0, 1, [])
        assert deadline.heard == pytest.approx(ratio)
        assert deadline.value == pytest.approx(0.94 if ratio < 0.95 else 1.0)


def test_a_deadline_forgets_what_no_longer_weighs():
    deadline = Deadline(10.0)
    for _ in range(2000):
        deadline.take(4.0, 5.0, 1, [])
    assert len(deadline._ratios) < 500


@pytest.mark.parametrize(
    ("measured", "heard", "said"),
    [
        (None, 1.0, []),
        (0.0, 1.0, ["ms measured as 0.0"]),
        (math.nan, 1.0, ["ms measured as nan"]),
        (100.0, 20.0, ["ms measured at 20 times the table's 95th percentile"]),
        (0.5, 1.0, []),  # an easy image that left at once
    ],
)
def test_a_clock_that_says_nothing_believable_is_named(measured, heard, said):
    deadline, doubts = Deadline(10.0), []
    deadline.take(measured, 5.0, 1, doubts)
    assert (deadline.heard, doubts) == (heard, said)


def test_a_table_found_to_be_off_moves_what_is_believable():
    factor, doubts = Factor(), []
    factor.rescale(1000.0)
    assert factor.value == 1000.0
    assert factor.take(3000.0, 1.0, 1, doubts) == 3000.0 and doubts == []
    assert factor.take(1.0, 1.0, 1, doubts) == 250.0
    assert doubts == ["joules measured at 1 times the table's"]
    for _ in range(20):
        factor.rescale(0.25)
    assert factor.value == 1.0  # never below the table


# ---- heat


def test_heat_is_the_median_of_three_readings():
    heat, found = Thermometer(70.0), []
    for second, celsius in enumerate((50.0, 90.0, 52.0, 51.0, 20.0)):
        heat.take(celsius, float(second), [])
        found.append(heat.celsius)
    assert found == [50.0, 90.0, 52.0, 52.0, 51.0]


@pytest.mark.parametrize("celsius", [None, math.nan, 255.0, -274.0])
def test_what_is_no_temperature_is_passed_over_until_the_last_one_is_stale(celsius):
    heat, doubts = Thermometer(70.0), []
    heat.take(50.0, 0.0, doubts)
    heat.take(celsius, 60.0, doubts)
    assert (heat.celsius, heat.is_stale, heat.limit(1.0, 5.0)) == (50.0, False, 5.0)
    silent = "the temperature sensor is silent; after 60 s the cap counts as reached"
    assert doubts == [silent if celsius is None else f"temperature read as {celsius}"]
    heat.take(celsius, 61.0, doubts)
    assert (heat.is_stale, heat.is_over, heat.limit(1.0, 5.0)) == (True, False, 1.0)
    assert heat.reason == "temperature: no reading, so the cap is assumed to be reached"


def test_without_a_sensor_one_sentence_says_so_and_what_is_served():
    heat, doubts = Thermometer(70.0), []
    heat.take(None, 0.0, doubts)
    assert doubts == ["no temperature sensor was found, so the cheapest point is served"]
    assert heat.is_stale and heat.limit(1.0, 5.0) == 1.0


def test_the_cost_allowed_falls_over_five_kelvin_and_comes_back_in_steps():
    limits = []
    for celsius in (60.0, 67.5, 67.2, 66.9, 66.4, 70.0, 71.0, 69.5, 69.0, 65.0):
        heat = Thermometer(70.0) if not limits else heat
        for _ in range(3):
            heat.take(celsius, 0.0, [])
        limits.append(round(heat.limit(1.0, 5.0), 2))
    assert limits == [5.0, 3.0, 3.0, 3.0, 3.88, 1.0, 1.0, 1.0, 1.8, 5.0]
    assert not heat.is_over and heat.reason == "temperature: 65.0 C, 70 C allowed"


# ---- the battery


def drain(battery: Battery, real: list[float], *, step: float = 0.0, idle: float = 0.0, start: float = 1000.0) -> list:
    """What reading it gives after each image of so many joules, all reckoned as 1 J; `step` is the gauge's."""
    found, left = [], start
    battery.read(start, None, [])
    for joules in real:
        left -= joules + idle
        battery.spend(1.0, 1, idle)
        found.append(battery.read(math.floor(left / step) * step if step else left, None, []))
    return found


def test_nobody_knows_what_is_left_until_the_gauge_or_the_goal_says():
    battery = Battery(None)
    battery.spend(1.0, 1)
    assert battery.left is None
    assert battery.read(None, 0.5, doubts := []) is None and battery.left is None
    assert doubts == ["the battery's gauge says 50% and no energy; give the full one's (--battery-wh, battery_joules)"]
    battery.read(50.0, None, [])
    assert battery.left == 50.0
    battery = Battery(200.0)
    battery.spend(1.0, 1, 2.0)
    assert battery.left == 197.0
    battery.read(None, 0.5, [])
    assert battery.left == 100.0


@pytest.mark.parametrize(("joules", "share"), [(math.nan, None), (-1.0, None), (None, 1.5), (None, math.nan)])
def test_a_gauge_that_says_nothing_possible_is_named_and_energy_is_reckoned(joules, share):
    battery, doubts = Battery(100.0), []
    battery.spend(3.0, 1)
    assert battery.read(joules, share, doubts) is None
    assert battery.left == 97.0
    assert doubts == [f"battery read as a share of {share}" if joules is None else f"battery read as {joules} J"]


def test_a_gauge_below_the_reckoning_is_believed_at_once_and_one_above_after_sixteen_images():
    battery = Battery(None)
    found = drain(battery, [0.5] * SETTLE_IMAGES)
    assert found == [None] * (SETTLE_IMAGES - 1) + [(0.5, SETTLE_IMAGES)]
    assert battery.left == 1000 - 0.5 * SETTLE_IMAGES
    assert battery.is_confirmed and not battery.has_overruled
    battery.read(900.0, None, [])
    assert battery.left == 900.0


def test_a_gauge_that_rises_is_not_believed_and_named():
    battery, doubts = Battery(None), []
    battery.read(100.0, None, doubts)
    battery.spend(1.0, 1)
    battery.read(150.0, None, doubts)
    assert battery.left == 99.0
    assert doubts == ["the battery gauge rose; it is believed once it falls again as it should"]


def test_a_gauge_that_crawls_is_not_believed():
    battery = Battery(None)
    assert set(drain(battery, [0.2] * 100)) == {None}
    assert battery.left == 900.0


def test_a_gauge_that_stands_is_named_once_three_percent_should_be_gone():
    battery, doubts = Battery(None), []
    for _ in range(33):
        battery.read(1000.0, None, doubts)
        battery.spend(1.0, 1)
    assert doubts == ["the battery gauge does not move; energy is reckoned instead"] * 2
    assert battery.left == 967.0


@pytest.mark.parametrize(("step", "images", "heard"), [(0.0, 18, 16), (50.0, 26, 20), (200.0, 41, 20)])
def test_a_gauge_that_goes_on_falling_far_faster_overrules_the_reckoning(step, images, heard):
    battery = Battery(None)  # without the first fall and one more
    found = drain(battery, [10.0] * images, step=step)
    assert found[-1] == (10.0, heard)
    assert set(found[:-1]) == {None}
    assert battery.has_overruled and battery.left == (1000 - 10.0 * images) // (step or 1) * (step or 1)


def test_a_gauge_that_falls_a_little_faster_than_is_believable_is_learned_from_too():
    """Neither is it far off within sixteen images, nor does it wait for more."""
    found = drain(Battery(None), [4.03] * SETTLE_IMAGES)
    assert found[-1] == (4.0, SETTLE_IMAGES)


def test_what_an_image_can_believably_take_is_counted_from_the_table():
    factor = Factor()
    assert factor.room == 4.0
    for _ in range(1000):
        factor.take(3.0, 1.0, 1, [])
    assert factor.room == pytest.approx(4 / 3, rel=0.01)
    factor.rescale(5.0)
    assert factor.room == 4.0
    for _ in range(1000):
        factor.take(1e-9, 1.0, 1, [])
    assert factor.room == 4.0  # of what it is believed to take now


def test_a_gauge_that_falls_faster_than_there_is_room_for_overrules():
    battery = Battery(None)
    for image in range(40):
        battery.spend(1.0, 1)
        battery.read(1000 - 2.0 * image, None, [], room=1.2)
    assert battery.has_overruled


def test_falls_that_tell_nothing_yet_do_not_make_steep_ones_forgotten():
    """Idle power that hides sixteen images."""
    battery = Battery(None)
    found = [each for each in drain(battery, [5.0] * 120, start=10_000.0, idle=20.0) if each]
    assert battery.has_overruled
    assert found[0][0] == pytest.approx(5.0)


@pytest.mark.parametrize(("step", "heard"), [(0.0, 1), (150.0, 0)])
def test_a_gauge_that_has_fallen_by_little_is_fine_enough_to_see_images_between_long_pauses(step, heard):
    battery, left, found = Battery(None), 10_000.0, []
    for image in range(2 * SETTLE_IMAGES):
        idle = 100.0 if image % 8 == 4 else 0.0
        left -= 3.0 + idle
        battery.spend(1.0, 1, idle)
        found.append(battery.read(math.floor(left / step) * step if step else left, None, []))
    assert [each for each in found if each] == [(pytest.approx(3.0), SETTLE_IMAGES)] * heard


def test_neither_a_jump_nor_the_rest_of_a_whole_percent_enters_the_slope():
    battery = Battery(None)
    found = drain(battery, [333.0, *[10.0] * 5, 300.0, *[10.0] * 11])
    assert found == [None] * (SETTLE_IMAGES + 1) + [(10.0, SETTLE_IMAGES)]


def test_jumps_that_stand_alone_overrule_nothing():
    battery = Battery(None)
    found = drain(
        battery, [*[1.0] * 40, 200.0, *[1.0] * 40, 200.0, *[1.0] * 40, 200.0, *[1.0] * 40, 200.0, *[1.0] * 17]
    )
    assert not battery.has_overruled
    assert {each[0] for each in found if each} == {1.0}


def test_a_gauge_that_falls_slower_again_takes_back_what_it_overruled():
    battery = Battery(None)
    drain(battery, [10.0] * (SETTLE_IMAGES + 2))
    found = drain(battery, [0.01] * SETTLE_IMAGES, start=820.0)
    assert found[-1] == (0.25, SETTLE_IMAGES)


def test_what_the_idle_device_takes_is_not_put_on_the_images():
    battery = Battery(None)
    found = [each for each in drain(battery, [2.0] * 100, idle=1.0) if each]
    assert found[0] == (pytest.approx(2.0), SETTLE_IMAGES)
    found = [each for each in drain(Battery(None), [10.0] * 40, idle=2.0) if each]
    assert found[0][0] == pytest.approx(10.0)


def test_a_gauge_in_steps_says_nothing_of_images_that_are_lost_in_the_idle_power():
    battery = Battery(None)
    found = drain(battery, [0.01] * 200, step=1e4, idle=100.0, start=1e6)  # a step is 100 readings, give or take one
    assert set(found) == {None}
    assert not battery.has_overruled and not battery.is_confirmed
    assert battery.left == 970_000.0  # its level is believed all the same


def test_a_gauge_that_falls_while_no_image_is_answered_waits_for_one():
    battery = Battery(None)
    for left in range(1000, 900, -1):
        assert battery.read(float(left), None, []) is None
    assert battery.left == 901.0 and not battery.has_overruled


# ---- the demand


def test_a_bucket_fills_at_the_stated_rate_and_what_overflows_is_named():
    demand, doubts = Demand(1.0, 1.0, 10.0, ()), []
    assert (demand.stated, demand.all, demand.most) == (3600.0, 3610.0, 3610.0)
    demand.take(0.0, 10, doubts)
    assert demand.most == 3600.0
    demand.take(4.0, 4, doubts)
    assert demand.most == pytest.approx(3596.0)
    demand.take(104.0, 0, doubts)
    assert demand.most == pytest.approx(3496.0 + 10)  # the bucket holds no more
    assert doubts == []
    demand.take(105.0, 12, doubts)
    assert demand.most == pytest.approx(3495.0)
    assert doubts == ["more images come than the goal states"]


def test_what_is_expected_is_thinned_from_what_is_stated_as_it_was_so_far():
    demand = Demand(1.0, 1.0, 10.0, ())
    assert demand.expected == 3600.0
    for second in range(1, 1801):
        demand.take(float(second), second % 2, [])
    assert demand.expected == pytest.approx(1800 * (900 + DEMAND_IMAGES) / (1800 + DEMAND_IMAGES))


def test_a_profile_says_when_the_images_come():
    demand = Demand(4.0, 1.0, 10.0, (1.0, 0.0, 3.0, 0.0))
    most = []
    for hour in (0.5, 1.0, 2.0, 3.0, 4.0, 9.0):
        demand.take(3600 * hour, 0, [])
        most.append(demand.most)
    assert most == pytest.approx([7 / 8 * 14400 + 10, 3 / 4 * 14400 + 10, 3 / 4 * 14400 + 10, 10.0, 10.0, 10.0])
    assert demand.time_s == demand.end_s == 14400.0
