"""Words of `calibrate` and `bench` that would be lost without a sentence."""

import re

import pytest

from iret import cli

NANO = "iret_nano-cluttered-digits"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device-only --data d", "--device-only measures the clock alone; leave out --data"),
        ("--device-only --trials 2", "leave out --trials"),
        ("--device-only --max-images 9", "leave out --max-images"),
        ("--data cluttered-digits --precision int8", "searched in float32 .* a clock in int8, .* add --device-only"),
        ("--device-only --battery-wh 50", "--battery-wh 50 with --meter auto: .* with --meter battery"),
        (
            "--device-only --battery-wh 0 --meter battery",
            "--battery-wh 0 with --meter battery: give watt-hours above 0",
        ),
    ],
)
def test_calibrate_refuses_what_it_would_not_use_in_one_sentence(tmp_path, capsys, line, message):
    assert cli.main(["calibrate", NANO, "--out", str(tmp_path / "copy"), *line.split()]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.startswith("iret: ") and said.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
