"""What stands round the routes: every error is a sentence, and who is let in."""

import asyncio
import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_app import PHOTO, PNG, ask, make_service

from iret.serve.app import build_app


def test_a_bug_is_a_500_with_an_id_that_the_log_explains(caplog):
    async def submit(job, arrived_s: float, before_s: float):
        raise KeyError("/secret/path")

    answer = ask("POST", "/v1/predict", make_service(submit=submit), content=PHOTO, headers=PNG)
    assert answer.status_code == 500
    assert "secret" not in answer.text and "Error" not in answer.text
    number = answer.json()["error"].split()[-1].rstrip(".")
    assert number in caplog.text
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/predict", 405)])
def test_other_paths_and_methods_get_a_sentence(method, path, status):
    answer = ask(method, path)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])


@pytest.mark.parametrize("headers", [{"x-api-key": "right"}, {"Authorization": "Bearer right"}])
def test_the_right_key_opens(headers):
    assert ask("GET", "/v1/model", key="right", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"x-api-key": "wrong"}, {"Authorization": "Bearer"}, {"Authorization": "Basic right"}], ids=str
)
def test_any_other_does_not(headers):
    for method, path in (("GET", "/v1/model"), ("GET", "/metrics"), ("POST", "/v1/predict"), ("GET", "/nothing")):
        answer = ask(method, path, key="right", headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert ask("GET", "/health/ready", key="right", headers=headers).status_code == 200


@pytest.mark.parametrize("prefix", ["/pico", "/page"])
def test_where_it_is_mounted_opens_nothing_and_shuts_nothing(prefix):
    async def run():
        transport = httpx.ASGITransport(build_app(make_service(), "right"), root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [
                (await client.get(prefix + path)).status_code for path in ("/v1/model", "/metrics", "/health/ready")
            ]

    assert asyncio.run(run()) == [401, 401, 200]
