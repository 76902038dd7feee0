"""A session answering a micro-batch: each image at its own budget, each mistake its own."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pretend import FULL, POINTS, SHAPE, PretendSession, photo

from iret.runtime.points import DeviceTable, Plan
from iret.runtime.timing import estimate_point, estimate_work
from iret.serve.asks import Ask
from iret.serve.computer import FORMATS, Computer, Job, Result, Supply, read_photo
from iret.serve.refusal import Refusal

OVERFLOW = "the model's numbers overflow on this image; send normalised pixels, or a photo."


def job(image=None, deadline_s=None, **ask) -> Job:
    return Job(np.zeros((3, 16, 16), np.float32) if image is None else image, Ask(**ask), deadline_s)


def measured() -> PretendSession:
    session = PretendSession()
    columns = dict(ms_mean=(8.0, 4.0, 2.0), ms_p50=(8.0, 4.0, 2.0), ms_p95=(9.0, 5.0, 3.0), joules=(4.0, 2.0, 1.0))
    table = DeviceTable(
        device=session.device, **columns, energy_source="made up", energy_scope="all", energy_kind="estimated", rounds=1
    )
    session.points = POINTS.with_device(table)
    return session


def test_images_of_different_budgets_share_one_call():
    session = PretendSession()
    results = Computer(session, max_pixels=10_000)([job(budget=0.25), job(photo()), job(budget=0.5)])
    assert [call["budget"].tolist() for call in session.calls] == [[0.25, 1.0, 0.5]]
    assert [result.macs for result in results] == [FULL // 4, FULL, FULL // 2]
    assert [result.tokens for result in results] == [(16, 4, 4), (16, 16, 16), (16, 8, 8)]
    assert [(result.batch, result.exit_stage, result.kept) for result in results] == [(3, 2, None)] * 3
    assert results[0].joules < results[2].joules < results[1].joules
    for result, scored in zip(results, (True, False, True), strict=True):
        joules = estimate_work(SHAPE, "float32", result.macs, result.tokens, (0, *result.tokens[1:]), scored=scored)
        assert result.joules == pytest.approx(joules)


def test_an_image_with_a_deadline_goes_first_and_alone_with_what_is_left_of_it():
    session = PretendSession()
    computer = Computer(session, max_pixels=10_000, clock=lambda: 100.0)
    late, soon = job(deadline_s=100.5), job(deadline_s=100.2, budget=0.5)
    computer([job(), late, soon, job(deadline_s=99.0)])
    assert [call["batch"] for call in session.calls] == [1, 1, 1, 1]
    assert [call["deadline_ms"] for call in session.calls] == [pytest.approx(ms) for ms in (1e-3, 200, 500)] + [None]
    assert [call["budget"] for call in session.calls[:3]] == [None, 0.5, None]


def test_an_exit_confidence_is_one_image_s_and_the_others_keep_the_table_s():
    session = PretendSession()
    computer = Computer(session, max_pixels=10_000)
    computer([job(budget=0.25), job(budget=0.5, exit_confidence=0.6), job()])
    assert session.calls[0]["exits"].tolist() == [0.9, 0.6, np.inf]
    computer([job(budget=0.25), job()])
    assert session.calls[1]["exits"] is None


@pytest.mark.parametrize("bad", [float("nan"), 1000.0], ids=["overflows", "failed"])
def test_one_bad_image_does_not_cost_its_mates_their_answers(bad, caplog):
    images = [np.full((3, 16, 16), value, np.float32) for value in (0, bad, 1)]
    first, middle, last = Computer(PretendSession(), max_pixels=10_000)([job(image) for image in images])
    assert isinstance(first, Result) and isinstance(last, Result)
    assert isinstance(middle, Refusal)
    if bad == 1000.0:
        assert (middle.status, "secret" in str(middle)) == (500, False)
        assert "/secret/path" in caplog.text
        assert str(middle).split()[-1].rstrip(".") in caplog.text  # the id
    else:
        assert (middle.status, str(middle)) == (422, OVERFLOW)


def test_a_trace_says_what_was_looked_at():
    [result] = Computer(PretendSession(), max_pixels=10_000)([job(budget=0.25, trace=True)])
    assert result.kept.reshape(3, 16).sum(1).tolist() == [16, 4, 4]
    assert result.refined.reshape(3, 16).sum(1).tolist() == [0, 4, 4]
    assert result.stage_logits.shape == (3, 3)


@pytest.mark.parametrize(("ask", "budget"), [({"ms": 4.0}, 0.5), ({"ms": 6.0}, 0.75), ({"joules": 1.0}, 0.25)])
def test_milliseconds_and_joules_become_a_budget_by_this_machine_s_clock(ask, budget):
    [result] = Computer(measured(), max_pixels=10_000)([job(**ask)])
    assert result.budget == pytest.approx(budget)


def test_a_battery_turns_the_dial_by_the_controller():
    computer = Computer(measured(), max_pixels=10_000)
    hints = [(100.0, 24.0), (50.0, 24.0), (50.0, 12.0), (1.0, 24.0), (0.0, 1.0)]
    budgets = [result.budget for result in computer([job(battery_percent=p, hours_left=h) for p, h in hints])]
    assert budgets == [1.0, pytest.approx(0.5, abs=0.01), 1.0, 0.25, 0.25]
    [result] = computer([job(battery_percent=50.0)])
    assert result.budget == budgets[1]  # 24 hours, where nothing is said


def test_a_battery_of_known_size_pays_for_the_stated_rate():
    supply = Supply(battery_wh=24.0, images_per_second=0.5)  # 2 J an image over 24 hours
    [result] = Computer(measured(), max_pixels=10_000, supply=supply)([job(battery_percent=100.0)])
    assert result.budget == pytest.approx(0.5, abs=0.01)


def test_without_a_clock_a_battery_goes_by_estimated_joules():
    [full, half] = Computer(PretendSession(), max_pixels=10_000)(
        [job(battery_percent=100.0), job(battery_percent=80.0)]
    )  # fmt: skip
    assert full.budget == 1.0
    assert 0.25 <= half.budget < 1.0


def test_without_a_clock_joules_are_those_of_what_images_did_as_a_clock_would_estimate_them():
    """Images that leave early read no weights of later stages: the mean image hides that."""
    plans = (Plan((16,), (0,)), Plan((16, 8, 4), (0, 8, 4)))
    points = replace(POINTS, points=tuple(replace(point, plans=plans) for point in POINTS.points))
    session = PretendSession(points)
    told = Computer(session, max_pixels=10_000).describe()
    expected = estimate_point(session.shape, "float32", points.points[0])
    assert told["points"][0]["joules"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("session", "ask", "sentence"),
    [
        (PretendSession(), {"budget": 0.1}, "below what this model can do, 0.250; ask for more"),
        (PretendSession(), {"ms": 3.0}, "start `iret serve` with --measure"),
        (
            PretendSession(None),
            {"budget": 0.5},
            "budget=0.5 needs operating points, and this bundle has none; run `iret calibrate MODEL` and export",
        ),
        (PretendSession(None), {"joules": 3.0}, "the clock of this machine was not measured"),
        (PretendSession(None), {"battery_percent": 3.0}, "needs operating points"),
        (PretendSession(is_single=True), {"exit_confidence": 0.5}, "a single graph"),
        (PretendSession(is_single=True), {"deadline_ms": 5.0}, "a single graph"),
        (measured(), {"ms": 1.0}, "below the cheapest operating point on this machine, 2; ask for more"),
    ],
    ids=lambda value: "" if isinstance(value, PretendSession) else str(value),  # no address: workers collect alike
)
def test_what_the_bundle_cannot_do_is_refused_in_a_sentence(session, ask, sentence):
    [found] = Computer(session, max_pixels=10_000)([job(**ask)])
    assert isinstance(found, Refusal)
    assert found.status == 422
    assert sentence in str(found)


def test_the_model_is_described_with_its_trade_off():
    told = Computer(PretendSession(), max_pixels=10_000).describe()
    assert (told["name"], told["grid"], told["stages"], told["full_macs"]) == ("pretend", [4, 4], 3, FULL)
    assert [each["share"] for each in told["points"]] == [1.0, 0.5, 0.25]
    assert [each["ms"] for each in told["points"]] == [None] * 3
    assert told["joules_source"] == "estimate:fp32"
    told = Computer(measured(), max_pixels=10_000).describe()
    assert [(each["ms"], each["joules"]) for each in told["points"]] == [(8, 4), (4, 2), (2, 1)]
    assert Computer(PretendSession(None), max_pixels=10_000).describe()["points"] is None


# ---- photos


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_named_is_read(kind):
    assert read_photo(photo(kind=kind), 256).size == (16, 16)


def test_pixels_are_counted_before_they_are_decoded():
    header = photo(side=1000)[:60]  # cut short: decoding would fail
    with pytest.raises(Refusal, match="1000 x 1000 pixels, more than the limit of 999999") as caught:
        read_photo(header, 999_999)
    assert caught.value.status == 413
    with pytest.raises(Refusal, match="damaged") as caught:
        read_photo(header, 1_000_000)
    assert caught.value.status == 400


@pytest.mark.parametrize("content", [b"hello", b"", photo(kind="PPM"), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_photo_is_refused(content):
    with pytest.raises(Refusal) as caught:
        read_photo(content, 10_000)
    assert caught.value.status == 400


def test_a_photo_for_which_there_is_no_memory_is_not_called_damaged(monkeypatch):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr("iret.serve.computer.open_image", fail)
    with pytest.raises(Refusal, match="no memory left") as caught:
        read_photo(photo(), 10_000)
    assert caught.value.status == 503
