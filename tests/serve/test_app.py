"""The routes, without a socket: what each answers, and how each refuses."""

import asyncio
import base64
import sys
import time
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pretend import FULL, make_computer, photo

from iret.serve.app import build_app
from iret.serve.computer import Computer
from iret.serve.metrics import Metrics
from iret.serve.refusal import Refusal
from iret.serve.service import Limits, Service

PHOTO = photo()
PNG = {"Content-Type": "image/png"}
FORM = {"Content-Type": "multipart/form-data; boundary=B"}
FIELD = b'--B\r\nContent-Disposition: form-data; name="image"\r\n\r\n%s\r\n--B--\r\n' % (b"x" * 1_100_000)  # no file
LIMITS = Limits(queue=4, body_bytes=20_000, max_pixels=10_000, timeout_s=5.0)


def make_service(computer: Computer | None = None, limits: Limits = LIMITS, submit=None) -> Service:
    computer = computer or make_computer()

    async def compute(job, arrived_s: float, before_s: float):
        [found] = computer([job])
        if isinstance(found, Refusal):
            raise found
        return found

    return Service(submit or compute, computer.describe(), limits, Metrics())


LARGE = make_service(limits=Limits())


def talk(scene, service: Service | None = None, **options):
    """`await scene(client)` with a client of the app."""

    async def run():
        app = build_app(service or make_service(), **options)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await asyncio.wait_for(scene(client), 20)

    return asyncio.run(run())


def ask(method: str, path: str, service: Service | None = None, key: str | None = None, **what) -> httpx.Response:
    return talk(lambda client: client.request(method, path, **what), service, api_key=key)


def predict(query: str = "", **what) -> httpx.Response:
    given = what if "files" in what else {"content": PHOTO, "headers": PNG} | what
    return ask("POST", f"/v1/predict?{query}", **given)


# ---- predictions


def test_a_photo_is_labelled_in_three_ways_alike():
    as_json = {"image": base64.b64encode(PHOTO).decode(), "budget": 0.5, "top": 2, "trace": True}
    answers = [
        predict("budget=0.5&top=2&trace=true"),
        ask("POST", "/v1/predict?top=2", files={"image": PHOTO}, data={"budget": "0.5", "trace": "true"}),
        ask("POST", "/v1/predict", json=as_json),
        ask("POST", "/v1/predict", json=as_json | {"image": f"data:image/png;base64,{as_json['image']}"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    first, *others = [answer.json() for answer in answers]
    for other in others:
        assert first.keys() == other.keys()
        assert all(first[name] == other[name] for name in first.keys() - {"time_ms"})
    assert [each["label"] for each in first["top"]] == ["c", "a"]
    assert (first["model"], first["budget"], first["macs"], first["macs_share"]) == ("pretend", 0.5, FULL // 2, 0.5)
    assert (first["tokens"], first["exit_stage"], first["batch"]) == ([16, 8, 8], 2, 1)
    assert first["joules"].keys() == {"value", "source", "measured"}
    assert first["joules"]["measured"] is False
    assert first["time_ms"]["total"] >= first["time_ms"]["queue"] >= 0
    trace = first["trace"]
    assert trace["kept"] == [[1] * 16, [1] * 8 + [0] * 8, [1] * 8 + [0] * 8]
    assert trace["refined"][0] == [0] * 16
    assert [stage["label"] for stage in trace["stage_probabilities"]] == ["c"] * 3


def test_a_deadline_may_end_at_an_earlier_stage_and_the_trace_says_so():
    answer = predict("deadline_ms=1&trace=true").json()
    assert answer["exit_stage"] == 0
    assert answer["trace"]["stage_probabilities"][1:] == [None, None]
    assert "trace" not in predict().json()


@pytest.mark.parametrize(
    ("status", "sentence", "what"),
    [
        (400, "cannot be read", {"content": b"hello"}),
        (400, "the body is empty", {"content": b""}),
        (400, "not valid JSON", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
        (400, "not valid JSON", {"content": b"[" * 9000, "headers": {"Content-Type": "application/json"}}),
        (400, "is a JSON list", {"content": b"[]", "headers": {"Content-Type": "application/json"}}),
        (400, "'image' is missing", {"content": b"{}", "headers": {"Content-Type": "application/json"}}),
        (400, "not valid base64", {"content": b'{"image": "!"}', "headers": {"Content-Type": "application/json"}}),
        (400, "not valid multipart", {"content": b"-", "headers": {"Content-Type": "multipart/form-data"}}),
        (400, "no file in its field", {"files": {"picture": b"x"}}),
        (400, "no file in its field", {"content": FIELD, "headers": FORM, "service": LARGE}),
        (400, "Content-Length is no number", {"headers": PNG | {"Content-Length": "x"}}),
        (413, "more than the limit of 20000 bytes", {"content": b"x" * 20_001}),
        (413, "200 x 200 pixels, more than the limit of 10000", {"content": photo(200)}),
        (415, "Content-Type ''", {"headers": {}}),
        (415, "Content-Type 'text/plain'", {"headers": {"Content-Type": "text/plain; charset=x"}}),
        (415, "compressed bodies", {"headers": PNG | {"Content-Encoding": "gzip"}}),
    ],
)
def test_a_body_that_is_no_photo_is_refused(status, sentence, what):
    answer = predict(**what)
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("budget=0", "budget='0'"),
        ("budget=0.1", "budget=0.1 is below"),
        ("budget=.5&budget=.6", "given twice"),
        ("budget=0.5&joules=1", "budget and joules were given"),
        ("ms=5", "--measure"),
        ("speed=5", "'speed' is no setting"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(query, sentence):
    answer = predict(query)
    assert answer.status_code == 422
    assert sentence in answer.json()["error"]


def test_a_setting_in_the_query_and_in_the_body_is_refused():
    answer = ask("POST", "/v1/predict?top=1", json={"image": base64.b64encode(PHOTO).decode(), "top": 2})
    assert (answer.status_code, "top was given in the query" in answer.json()["error"]) == (422, True)


def test_a_setting_that_stands_twice_in_json_is_refused():
    body = b'{"image": "%s", "budget": 0.25, "budget": 1}' % base64.b64encode(PHOTO)
    answer = predict(content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, "given twice" in answer.json()["error"]) == (422, True)


def test_a_body_without_a_length_is_cut_off_at_the_limit():
    sent = []

    async def body():
        for _ in range(100):
            sent.append(1)
            yield b"x" * 1000

    assert predict(content=body()).status_code == 413
    assert len(sent) == 21


def test_a_body_that_does_not_come_is_not_waited_for():
    service = make_service(limits=Limits(timeout_s=0.05))

    async def body():
        yield b"x"
        await asyncio.Event().wait()

    answer = ask("POST", "/v1/predict", service, content=body(), headers=PNG)
    assert answer.status_code == 408
    assert service.num_open == 0


# ---- the house


def make_gated() -> tuple[Service, asyncio.Event]:
    """A service that answers nobody before the event is set."""
    gate, computer = asyncio.Event(), make_computer()

    async def submit(job, arrived_s: float, before_s: float):
        await gate.wait()
        return computer([job])[0]

    return make_service(computer, submit=submit), gate


def test_the_house_is_full_at_its_limit_and_not_before():
    service, gate = make_gated()

    async def scene(client):
        inside = [asyncio.ensure_future(client.post("/v1/predict", content=PHOTO, headers=PNG)) for _ in range(4)]
        while service.num_open < 4:
            await asyncio.sleep(0)
        outside = await client.post("/v1/predict", content=PHOTO, headers=PNG)
        gate.set()
        statuses = [answer.status_code for answer in await asyncio.gather(*inside)]
        after = await client.post("/v1/predict", content=PHOTO, headers=PNG)
        return outside, statuses, after

    outside, statuses, after = talk(scene, service)
    assert outside.status_code == 429
    assert int(outside.headers["Retry-After"]) >= 1
    assert statuses == [200] * 4
    assert after.status_code == 200
    assert service.num_open == 0


def test_a_draining_house_answers_those_inside_and_sends_others_away():
    service, gate = make_gated()

    async def scene(client):
        inside = asyncio.ensure_future(client.post("/v1/predict", content=PHOTO, headers=PNG))
        while not service.num_open:
            await asyncio.sleep(0)
        drain = asyncio.ensure_future(service.drain())
        await asyncio.sleep(0)
        outside = await client.post("/v1/predict", content=PHOTO, headers=PNG)
        health = [
            (await client.get(path)).status_code for path in ("/health/ready", "/v2/health/ready", "/health/live")
        ]
        assert not drain.done()
        gate.set()
        await drain
        return (await inside).status_code, outside, health

    inside, outside, health = talk(scene, service)
    assert (inside, outside.status_code, outside.headers["connection"]) == (200, 503, "close")
    assert health == [503, 503, 200]


def test_an_answer_that_does_not_come_in_time_is_a_504():
    async def submit(job, arrived_s: float, before_s: float):
        await asyncio.Event().wait()

    service = make_service(limits=Limits(timeout_s=0.05), submit=submit)
    answer = ask("POST", "/v1/predict", service, content=PHOTO, headers=PNG)
    assert answer.status_code == 504
    assert service.num_open == 0


def test_an_image_is_due_at_its_deadline_or_at_a_quarter_of_the_time_out():
    seen = []
    computer = make_computer()

    async def submit(job, arrived_s: float, before_s: float):
        seen.append((job.deadline_s and job.deadline_s - arrived_s, before_s - arrived_s))
        return computer([job])[0]

    service = make_service(computer, submit=submit)
    for query in ("", "deadline_ms=200", "deadline_ms=4000"):
        ask("POST", f"/v1/predict?{query}", service, content=PHOTO, headers=PNG)
    assert seen == [
        (None, pytest.approx(1.25)),
        (pytest.approx(0.2), pytest.approx(0.2)),
        (pytest.approx(4.0), pytest.approx(1.25)),
    ]


def test_a_house_without_a_worker_is_not_ready_and_one_that_gets_none_sends_away():
    service = make_service()
    service.is_ready = lambda: False
    assert ask("GET", "/health/ready", service).status_code == 503
    assert ask("GET", "/health/live", service).status_code == 200
    assert ask("POST", "/v1/predict", service, content=PHOTO, headers=PNG).status_code == 200  # one is on its way
    service.is_stuck = lambda: True
    answer = ask("POST", "/v1/predict", service, content=PHOTO, headers=PNG)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_client_that_leaves_while_its_image_waits_gives_its_place_back():
    cancelled, inside, leaves = [], asyncio.Event(), asyncio.Event()

    async def submit(job, arrived_s: float, before_s: float):
        inside.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(job)
            raise

    service = make_service(submit=submit)
    messages = iter([{"type": "http.request", "body": PHOTO, "more_body": False}])

    async def receive():
        for message in messages:
            return message
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    async def run():
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "root_path": ""}
        headers = [(b"content-type", b"image/png")]
        answer = asyncio.ensure_future(build_app(service)(scope | {"headers": headers}, receive, send))
        await inside.wait()
        assert service.num_open == 1
        leaves.set()
        await asyncio.wait_for(answer, 2)

    asyncio.run(run())
    assert (len(cancelled), service.num_open) == (1, 0)


def test_the_page_and_its_files_are_served_and_nothing_beside_them(tmp_path):
    page = tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("<p>page</p>")
    (page / "main.js").write_text("1")
    (tmp_path / "secret").write_text("secret")

    async def scene(client):
        return [await client.get(path) for path in ("/", "/page/main.js", "/page/..%2fsecret", "/page/none.js")]

    index, script, outside, none = talk(scene, page=page, api_key="right")
    assert (index.text, script.status_code) == ("<p>page</p>", 200)
    assert "javascript" in script.headers["content-type"]
    assert index.headers["cache-control"] == script.headers["cache-control"] == "no-cache"
    assert index.headers["content-security-policy"] == "frame-ancestors 'self'"
    assert (outside.status_code, none.status_code, list(none.json())) == (404, 404, ["error"])
    assert talk(lambda client: client.get("/"), page=tmp_path).status_code == 404


def test_the_model_is_told_with_its_limits():
    told = ask("GET", "/v1/model").json()
    assert told["limits"] == {"body_bytes": 20_000, "pixels": 10_000, "queue": 4, "timeout_s": 5.0}
    assert [each["share"] for each in told["points"]] == [1.0, 0.5, 0.25]


def test_metrics_count_requests_images_tokens_macs_and_estimated_joules():
    async def scene(client):
        await client.post("/v1/predict?budget=0.5", content=PHOTO, headers=PNG)
        await client.post("/v1/predict?budget=7", content=PHOTO, headers=PNG)
        return (await client.get("/metrics")).text

    lines = dict(line.rsplit(" ", 1) for line in talk(scene).splitlines() if not line.startswith("#"))
    assert lines['iret_requests_total{route="/v1/predict",status="200"}'] == "1.0"
    assert lines['iret_requests_total{route="/v1/predict",status="422"}'] == "1.0"
    assert lines['iret_request_seconds_count{route="/v1/predict"}'] == "2.0"
    assert lines['iret_images_total{stage="2"}'] == "1.0"
    assert [lines[f'iret_tokens_kept_total{{stage="{stage}"}}'] for stage in range(3)] == ["16.0", "8.0", "8.0"]
    assert float(lines["iret_macs_total"]) == FULL // 2
    assert float(lines["iret_estimated_joules_total"]) > 0
    assert lines["iret_open_images"] == "0.0"


def test_time_is_counted_from_the_arrival_and_not_from_the_queue():
    began = time.monotonic()
    told = predict().json()["time_ms"]
    assert 0 <= told["queue"] <= told["total"] <= 1e3 * (time.monotonic() - began)
