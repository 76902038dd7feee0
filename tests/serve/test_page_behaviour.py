"""What the page does when things fail or come in an unlucky order, in node. In a browser: `test_page_driven`."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "page" / "behaviour.mjs"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@pytest.fixture(scope="module")
def found() -> dict:
    """What every scenario of behaviour.mjs saw."""
    done = subprocess.run(["node", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_newest_setting_is_next_and_a_bug_is_not_the_end(found):
    assert found["newest"] == [1, 5, 9, 10]  # of five in a row the first and the last; 9 throws


def test_a_webcam_that_nobody_waits_for_is_switched_off(found):
    cameras = found["cameras"]  # [is on, cameras that run, what the button says]
    assert cameras["twice"] == [True, 1, "Stop the webcam"]
    assert cameras["newest"]
    for name in ("stopped", "overtaken", "interrupted", "silent"):
        assert cameras[name] == [False, 0, "Webcam"], name
    assert cameras["unplugged"] == [False, "Webcam"]
    assert cameras["refused"].startswith("The webcam was not allowed; ")
    assert cameras["refusedToPlay"].startswith("No webcam could be opened; ")


def test_servers_fail_in_one_sentence_with_the_next_step(found):
    servers = found["servers"]
    assert servers["closed"] == "The server does not answer; check that it runs, and load the page again."
    assert servers["later"] == "The server does not answer; check that it runs, and turn the dial again."
    assert "did not answer within 30 s" in servers["stalled"]
    assert "answered 200, but not as iret does" in servers["portal"]
    assert "answered 502, but not as iret does" in servers["gateway"]
    assert servers["quoted"].startswith("This key holds a character that no key can")
    assert servers["key"] == ["key", True]
    assert servers["unreadable"] == "The model's answer could not be read; load the page again."


def test_a_file_is_sent_as_it_is_only_where_the_server_takes_it(found):
    uploads = found["uploads"]
    assert uploads.pop("huge") == [
        "huge.png has 10000 x 10000 pixels, more than 64 million; resize it first.", True,
    ]  # fmt: skip
    assert uploads.pop("unmade") == "x.png could not be made ready to send; resize it first."
    assert uploads.pop("jpeg") == "file"
    assert set(uploads.values()) == {"crop"}, uploads


def test_what_an_engine_throws_becomes_a_sentence(found):
    assert found["engines"]["given"], "the engine gets the weights that graphs share"
    assert found["engines"]["run"] == "The engine failed on this photo (5283016); load the page again."
    assert found["engines"]["open"] == "The engine could not open the model (no such op); load the page again."


def test_a_site_that_does_not_load_says_which_file_and_never_takes_an_older_one(found):
    sites = found["sites"]
    assert sites["offline"] == sites["cut"]
    assert sites["cut"] == "bundle/bundle.json could not be fetched; check the connection and load the page again."
    assert "is missing from this site (404)" in sites["missing"]
    assert sites["html"] == "bundle/bundle.json of this site is another file; copy the whole folder again."
    assert sites["engine"].startswith("ort/ort.wasm.min.js could not be fetched; ")
    assert sites["caches"] == ["no-cache"]


def test_the_newest_photo_is_shown_and_all_others_are_let_go(found):
    photos = found["photos"]
    assert photos["shown"].startswith("second: ") and photos["asked"] == 1
    assert photos["closed"] == [True, False] and photos["before"]
    assert photos["late"] and photos["webcam"] == [1, "the webcam"]  # a photo that decodes when the webcam is on


def test_a_photo_is_not_replaced_by_a_frame_that_comes_late(found):
    assert found["frames"] == {"shown": "dropped", "closed": True, "live": 0, "alert": None}


def test_failures_are_said_while_they_matter_and_again_when_they_come_again(found):
    failures = found["failures"]
    assert failures["overtaken"] is failures["stopped"] is None and failures["shown"] == "new"
    assert failures["once"] == "broken."
    assert failures["again"] != failures["once"] and failures["again"].strip() == "broken."
    assert failures["mended"] == [None, False]


def test_a_full_server_costs_the_webcam_a_frame_and_another_failure_ends_it(found):
    assert found["busy"]["full"] == ["the line is full.", 1, 1]  # alert, cameras that run, questions
    assert found["busy"]["free"] == [None, 1, 2]
    assert found["busy"]["broken"] == ["broken.", 0]


def test_a_new_photo_silences_the_answer_before(found):
    assert found["aloud"]["stale"] == [True, "second, not looked at yet"]
    assert found["aloud"]["status"] == ""


def test_of_a_webcam_only_changes_are_said(found):
    assert found["aloud"]["said"] == ["cat", "dog", "cat", "dog"]
    assert found["aloud"]["clocks"] == 0  # the last three frames said dog: nothing is about to be said


def test_a_photo_that_waited_for_the_model_is_asked_once(found):
    assert found["waiting"] == {"before": 0, "after": 1, "shown": "early", "hints": [True, True]}


def test_examples_of_any_name_are_there_without_a_network(found):
    assert found["examples"]["fetched"] == ["page/photos/dog%20%231%20100%25%3F.jpg", "page/photos/b.jpg"]
    assert found["examples"]["shown"] == "dog" and not found["examples"]["hidden"]


def test_a_key_is_asked_for_until_it_is_right(found):
    keys = found["keys"]  # [form hidden, sentence, focus on the choice of a photo]
    assert keys["asked"] == [False, ""]
    assert keys["wrong"] == [False, "the key is wrong.", True]
    assert keys["right"][0] and keys["right"][2]
    assert keys["heard"] == [None, "wrong", "right"]


def test_what_is_dropped_and_is_no_file_is_answered(found):
    assert found["drops"]["nothing"].startswith("That was not a file; ")
    assert found["drops"]["inside"] and not found["drops"]["outside"]
