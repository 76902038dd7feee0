"""The Ray deployment as it is described, without a cluster; on a local Ray: tests/serve/test_serve_soak.py."""

import pytest

from iret.serve.server import Options
from iret.serve.service import Limits

pytestmark = pytest.mark.graph  # Ray pickles the class as it is defined, which the hook's wrappers do not survive


@pytest.fixture
def deployment():
    pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'iret[ray]'")
    from iret.serve import ray

    return ray


def read(application) -> tuple:
    """The deployment and what its replicas are made with."""
    bound = application._bound_deployment
    return bound, bound.init_args


def test_one_replica_takes_its_cores_and_all_that_its_house_holds(deployment):
    bound, words = read(deployment.app("/models/pico", threads=2, options=Options(limits=Limits(queue=10))))
    assert words[:3] == ("/models/pico", None, 2)
    assert bound.num_replicas == 1
    assert bound.ray_actor_options["num_cpus"] == 2
    assert bound.max_ongoing_requests == 20  # more than the house, so that the house says 429


def test_more_replicas_come_when_there_is_more_to_do(deployment):
    bound, _ = read(deployment.builder({"bundle": "/models/pico", "max_replicas": "4", "max_batch": "8"}))
    scale = bound._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.get_target_ongoing_requests()) == (1, 4, 8)


def test_the_command_line_can_set_limits_and_a_key(deployment, monkeypatch):
    monkeypatch.setenv("IRET_API_KEY", "hidden")
    words = {"queue": "9", "timeout_s": "3", "max_pixels": "1000", "max_body_mb": "0.5", "api_key": "env"}
    _, made_with = read(deployment.builder({"bundle": "/models/pico", **words}))
    options = made_with[3]
    assert options.limits == Limits(queue=9, timeout_s=3.0, max_pixels=1000, body_bytes=500_000)
    assert options.api_key == "hidden"
    assert read(deployment.builder({"bundle": "/models/pico"}))[1][3].api_key is None


def test_words_and_replicas_that_do_not_fit_are_refused(deployment):
    with pytest.raises(ValueError, match="size: the words are bundle, engine"):
        deployment.builder({"bundle": "/models/pico", "size": "4"})
    with pytest.raises(ValueError, match="no bundle"):
        deployment.builder({})
    with pytest.raises(ValueError, match="queue=many is no whole number"):
        deployment.builder({"bundle": "/models/pico", "queue": "many"})
    with pytest.raises(ValueError, match="must be 1 or more"):
        deployment.app("/models/pico", replicas=(2, 1))
