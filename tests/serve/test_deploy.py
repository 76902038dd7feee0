"""The example manifests, as a cluster would judge them, and against the command that they run."""

import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from iret.arguments import build_parser
from iret.serve.guard import KEY

DEPLOY = Path(__file__).parents[2] / "deploy"
KSERVE = json.loads((Path(__file__).parent / "kserve_inferenceservice.json").read_text())
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
SERVICE = yaml.safe_load((DEPLOY / "kserve.yaml").read_text())


@pytest.mark.parametrize("document", KUBERNETES, ids=lambda document: document["kind"])
def test_kubernetes_takes_each_document(document):
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_validator_refuses_a_field_that_does_not_exist():
    deployment = json.loads(json.dumps(KUBERNETES[0]))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def test_kserve_takes_its_document_and_refuses_a_misspelt_one():
    Draft202012Validator(KSERVE).validate(SERVICE)
    wrong = json.loads(json.dumps(SERVICE))
    wrong["spec"]["predictor"]["maxReplica"] = 4
    assert not Draft202012Validator(KSERVE).is_valid(wrong)


@pytest.mark.parametrize(
    ("container", "ports"),
    [
        (KUBERNETES[0]["spec"]["template"]["spec"]["containers"][0], "http"),
        (SERVICE["spec"]["predictor"]["containers"][0], 8080),
    ],
    ids=["kubernetes", "kserve"],
)
def test_they_run_a_command_that_there_is_and_ask_the_port_it_listens_on(container, ports):
    words = [*container["command"], *container["args"]]
    assert words[0] == "iret"
    args = build_parser().parse_args(words[1:])
    assert (args.verb, args.host) == ("serve", "0.0.0.0")
    assert [port["containerPort"] for port in container["ports"]] == [args.port]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == ports


def test_a_pod_has_longer_to_end_than_a_request_may_take():
    pod = KUBERNETES[0]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    args = build_parser().parse_args([*container["command"][1:], *container["args"]])
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + args.timeout_s


@pytest.mark.parametrize(
    "container",
    [KUBERNETES[0]["spec"]["template"]["spec"]["containers"][0], SERVICE["spec"]["predictor"]["containers"][0]],
    ids=["kubernetes", "kserve"],
)
def test_what_a_full_house_may_take_fits_into_the_pod_and_a_key_is_asked_for(container):
    args = build_parser().parse_args([*container["command"][1:], *container["args"]])
    bodies = 3 * args.queue * 1e6 * args.max_body_mb
    photos = args.workers * 16 * args.max_pixels
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    assert bodies + photos < 0.6 * limit  # the rest: Python, the engine and the model, three times
    assert args.api_key == "env"
    assert [each["name"] for each in container["env"]] == [KEY]


def test_kserve_waits_longer_than_the_service_does():
    container = SERVICE["spec"]["predictor"]["containers"][0]
    args = build_parser().parse_args([*container["command"][1:], *container["args"]])
    assert SERVICE["spec"]["predictor"]["timeout"] > args.timeout_s
