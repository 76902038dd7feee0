"""Writes losses.json: ten training steps of `iret_pico` at seed 0 on CPU. Run it when the loss is meant to change, and say why.

PYTHONPATH=tests/train python tests/golden/make_losses.py
"""

import json
import tempfile
from pathlib import Path

from test_loop import golden_losses

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = golden_losses(Path(folder))
    Path(__file__).with_name("losses.json").write_text(json.dumps(found, indent=1) + "\n")
