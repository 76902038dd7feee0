"""The report of `iret doctor`: true on this machine, and one sentence where a library is broken."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from iret import doctor


def run_python(code: str, *folders: Path) -> str:
    """Stdout of a fresh process that looks into `folders` first."""
    paths = [str(folder) for folder in folders] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths.append(str(Path(doctor.__file__).parents[1]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def broken_library(folder: Path, name: str, code: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    return folder


def test_the_report_is_json_without_paths():
    text = json.dumps(doctor.report())
    assert sys.prefix not in text
    assert os.getcwd() not in text


def test_the_report_states_what_runs_here():
    found = doctor.report()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["threads"]["num_usable"] >= 1
    assert found["devices"]["cpu"]


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC family 25 model 17"),
        (
            "cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon(R) 8481C\n",
            "Xeon(R) 8481C",
        ),
        (
            "cpu family : 25\nmodel : 17\nmodel name : AMD EPYC\n\ncpu family : 26\nmodel : 2\n",
            "AMD EPYC family 25 model 17",
        ),
        ("model name\t: ARMv7 Processor rev 4 (v7l)\n", "ARMv7 Processor rev 4 (v7l)"),
        ("model name\t: Some Processor\n", "Some Processor"),
        ("cpu family: 6\nmodel: 85\nmodel name: Xeon(R) CPU @ 2.20GHz\n", "Xeon(R) CPU @ 2.20GHz family 6 model 85"),
        (
            "cpu family: 15\nmodel: 107\nmodel name: QEMU CPU version 2.5+\n",
            "QEMU CPU version 2.5+ family 15 model 107",
        ),
        ("processor\t: 0\nCPU part\t: 0xd0b\n", platform.processor() or platform.machine()),
    ],
)
def test_a_processor_whose_name_is_a_series_is_told_by_family_and_model(tmp_path, monkeypatch, cpuinfo, name):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    assert doctor.processor_name() == name


def test_without_proc_the_architecture_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "nowhere")
    assert doctor.processor_name() == (platform.processor() or platform.machine())


def test_the_text_shows_every_version_and_note():
    found = {
        "versions": {"python": "3.12.1", "iret": "0.1.0"},
        "system": "Linux x86_64",
        "devices": {"cpu": "Some Processor"},
        "threads": {"num_processors": 2, "GOMP_SPINCOUNT": None},
        "extras": {
            "torch": {
                "for": "models",
                "missing": ["a", "b", "c", "torch"],
                "broken": [],
                "install": "pip install 'iret[torch]'",
            },
            "timm": {"for": "methods", "missing": [], "broken": ["timm"], "install": "pip install 'iret[timm]'"},
            "data": {"for": "data sets", "missing": [], "broken": [], "install": "pip install 'iret[data]'"},
        },
        "meters": {"rapl": "ready: CPU package 0 (measured)"},
        "notes": ["One sentence."],
    }
    assert doctor.describe(found).splitlines() == [
        "python             3.12.1",
        "iret               0.1.0",
        "",
        "system             Linux x86_64",
        "cpu                Some Processor",
        "num_processors     2",
        "GOMP_SPINCOUNT     not set",
        "",
        "iret[torch]        models: missing a, b, c and 1 more; pip install 'iret[torch]'",
        "iret[timm]         methods: installed, but timm cannot be imported, see below",
        "iret[data]         data sets: ready",
        "",
        "rapl               ready: CPU package 0 (measured)",
        "",
        "One sentence.",
    ]


def test_importing_the_doctor_loads_nothing_heavy():
    loaded = run_python("import sys, iret.doctor; print(*sys.modules)").split()
    assert not {"torch", "torchvision", "timm", "numpy"}.intersection(loaded)


# ---- extras


def test_every_extra_of_the_package_has_a_purpose():
    assert set(metadata.metadata("iret").get_all("Provides-Extra")) == set(doctor.PURPOSES)


@pytest.mark.skipif("IRET_ALL_EXTRAS" not in os.environ, reason="`make test` alone promises every extra")
def test_no_test_of_make_test_skips_itself_for_want_of_a_library():
    installed = {each.metadata["Name"].lower().replace("_", "-") for each in metadata.distributions()}
    assert not {name.lower().replace("_", "-") for name in doctor.extras_needed()["all"]} - installed


def test_an_extra_that_includes_another_needs_its_libraries_too(monkeypatch):
    requirements = [
        "numpy>=1.26",
        'torch>=2.10; extra == "torch"',
        "iret[torch] ; extra == 'data'",
        "datasets[audio]>=3; python_version > '3' and extra == 'data'",
        "iret[torch, data]; extra == 'all'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    needed = doctor.extras_needed()
    assert needed["torch"] == {"torch"}
    assert needed["data"] == needed["all"] == {"torch", "datasets"}


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["no-such-library>=1; extra == 'data'"])
    assert doctor.extras_report()["data"] == {
        "for": doctor.PURPOSES["data"],
        "missing": ["no-such-library"],
        "broken": [],
        "install": "pip install 'iret[data]'",
    }


def test_an_extra_whose_library_cannot_be_imported_is_not_ready(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy; extra == 'torch'", "pillow; extra == 'timm'"])
    extras = doctor.extras_report({"pillow"})
    assert (extras["torch"]["broken"], extras["timm"]["broken"]) == ([], ["pillow"])
    monkeypatch.setattr(doctor, "timm_problem", lambda: "timm 1.0 cannot be imported (it broke).")
    monkeypatch.setattr(metadata, "requires", lambda name: ["timm; extra == 'timm'", "iret[timm]; extra == 'all'"])
    found = doctor.report()
    assert found["extras"]["timm"]["broken"] == found["extras"]["all"]["broken"] == ["timm"]
    assert found["notes"][0] == "timm 1.0 cannot be imported (it broke)."


def test_a_source_tree_that_is_not_installed_says_so(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    assert doctor.extras_report() == {}
    assert any("not installed" in note for note in doctor.report()["notes"])


# ---- broken libraries


def test_timm_imports_under_the_tests():
    assert "tests" in os.environ.get("PYTHONPATH", ""), "run the tests as `make test` does: PYTHONPATH=tests"
    assert doctor.timm_problem() is None


def test_a_broken_torchvision_gives_one_sentence(tmp_path):
    broken_library(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    sentence = run_python("from iret import doctor; print(doctor.timm_problem())", tmp_path).strip()
    assert "cannot be imported (RuntimeError: operator torchvision::nms does not exist), so timm" in sentence
    assert "\n" not in sentence
    assert sentence.count(". ") == 0


def test_a_broken_timm_gives_one_sentence(tmp_path):
    broken_library(tmp_path, "timm", "import no_such_library")
    broken_library(tmp_path, "torchvision", "")  # sound, and imported in no time
    sentence = run_python("from iret import doctor; print(doctor.timm_problem())", tmp_path).strip()
    assert "cannot be imported (ModuleNotFoundError: No module named 'no_such_library')" in sentence
    assert "\n" not in sentence


def test_a_broken_torch_leaves_the_rest_of_the_report(tmp_path):
    broken_library(tmp_path, "torch", "raise OSError('libtorch.so: cannot open shared object file')")
    found = json.loads(run_python("import json; from iret import doctor; print(json.dumps(doctor.report()))", tmp_path))
    assert any("libtorch.so" in note for note in found["notes"])
    assert found["threads"]["num_torch_threads"] is None
    assert list(found["devices"]) == ["cpu"]


@pytest.mark.parametrize("name", ["no_such_library", "json"])
def test_an_absent_or_sound_library_is_no_problem(name):
    assert doctor.import_problem(name) is None
