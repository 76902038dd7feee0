"""`import iret` is cheap and lazy, and says what is missing where something is."""

import subprocess
import sys
from pathlib import Path

import pytest

import iret

SOURCE = str(Path(iret.__file__).parents[1])


def run_python(code: str) -> str:
    """Stdout of a fresh process that sees this package first."""
    code = f"import sys; sys.path.insert(0, {SOURCE!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_takes_under_a_third_of_a_second():
    code = "from time import perf_counter as now; start = now(); import iret; print(now() - start)"
    assert min(float(run_python(code)) for _ in range(5)) < 0.3


def test_importing_loads_neither_torch_nor_numpy():
    loaded = run_python("import iret; print(*sys.modules)").split()
    assert "iret" in loaded
    assert not {"torch", "numpy", "PIL", "iret.model"}.intersection(loaded)


def test_the_device_side_loads_without_torch():
    code = "import iret; iret.Shape, iret.OperatingPoints; import iret.runtime.keep; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_models_are_there_on_first_use():
    code = "import iret; print(type(iret.create_model('iret_pico')).__module__, iret.list_models()[0])"
    assert run_python(code) == "iret.model iret_pico"


def test_every_public_name_exists_and_is_listed():
    for name in iret.__all__:
        assert getattr(iret, name) is not None
    assert dir(iret) == sorted(iret.__all__)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'iret' has no attribute 'create_modle'"):
        _ = iret.create_modle
    assert not hasattr(iret, "nothing")


def test_a_base_install_names_the_extra_that_models_need():
    code = """
sys.modules["torch"] = None  # as if it were not installed
import iret
try:
    iret.create_model
except ImportError as error:
    print(error)
"""
    assert run_python(code) == "iret.create_model needs torch; install it with: pip install 'iret[torch]'"
