"""The module object: errors people can catch and pickle, state of its own in every copy, nothing left behind."""

from __future__ import annotations

import copy
import gc
import importlib.machinery
import importlib.util
import pickle
import subprocess
import sys
import weakref
from importlib import metadata
from types import ModuleType

import numpy as np
import pytest
import torch

import llmprune
from llmprune import _core, errors


def another_core() -> ModuleType:
    """A second, independent module object from the same shared library."""
    spec = importlib.util.spec_from_file_location("llmprune._core", _core.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_errors_form_one_family() -> None:
    names = [name for name in errors.__all__ if name != "LlmpruneError"]
    assert len(names) == 10
    for name in names:
        error = getattr(errors, name)
        assert issubclass(error, errors.LlmpruneError)
        assert error.__doc__
        assert type(pickle.loads(pickle.dumps(error("one sentence")))) is error
    assert issubclass(errors.InputError, ValueError)


def test_each_module_object_has_state_of_its_own() -> None:
    other = another_core()
    assert other is not _core
    assert other.TensorError is not _core.TensorError
    with pytest.raises(other.TensorError):
        other.compact(torch.zeros(3), {0: np.array([5])})
    out = np.ones(2)
    other.dot_columns(torch.ones(3, 2), torch.ones(3, 2), out)
    assert out.tolist() == [4.0, 4.0]


def test_a_module_object_is_collected_with_its_types() -> None:
    other = another_core()
    gone = [weakref.ref(other), weakref.ref(other.TensorError)]
    del other
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_second_interpreter_can_use_the_core() -> None:
    code = """
import sys
# NumPy wants all interpreters of a process to share one GIL, which each version of Python asks for in its own way.
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    shared_gil = lambda: interpreters.create("legacy")
elif sys.version_info >= (3, 12):
    import _xxsubinterpreters as interpreters
    shared_gil = lambda: interpreters.create(isolated=False)
else:
    import _xxsubinterpreters as interpreters
    shared_gil = interpreters.create
inner = '''
from array import array
from llmprune import _core
order = array("q", [0, 0, 0])
_core.rank(array("d", [2.0, 0.5, 1.0]), order)
assert list(order) == [1, 2, 0]
try:
    _core.rank(array("d", [2.0]), array("d", [0.0]))
except _core.TensorError as error:
    assert "order" in str(error)
else:
    raise AssertionError("a float order was accepted")
'''
from llmprune import _core
for _ in range(2):
    name = shared_gil()
    failure = interpreters.run_string(name, inner)
    assert failure is None, failure
    interpreters.destroy(name)
print("ok")
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "ok"), run.stderr


def test_tensors_that_outlive_the_module_do_not_crash_the_exit() -> None:
    code = """
import numpy, torch
from llmprune import _core
class Keep:
    def __del__(self):
        _core.dot_columns(torch.ones(1, 1), torch.ones(1, 1), numpy.zeros(1))
keep = Keep()
keep.cycle = keep
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_loads_no_framework() -> None:
    code = (
        "import sys, llmprune; dir(llmprune); print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_public_names_are_imported_when_they_are_used() -> None:
    for name in llmprune.__all__:
        assert getattr(llmprune, name) is not None
        assert name in dir(llmprune)
        if name.islower() and name not in ("errors", "__version__"):
            function = getattr(llmprune, name)
            assert callable(function)
            assert function.__module__.startswith("llmprune.")
            assert sys.modules[function.__module__].__dict__[name] is function
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        llmprune.prunes  # type: ignore[attr-defined]  # noqa: B018
    assert llmprune.errors is errors


def test_the_doctor_reports_a_working_core(capsys: pytest.CaptureFixture[str]) -> None:
    report = llmprune.doctor()
    assert report["self_test"]["ok"] is True
    assert report["packages"]["torch"] == metadata.version("torch")
    assert report["packages"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert report["simd"] == _core.simd_level()
    assert report["cpus"] >= 1
    printed = capsys.readouterr().out
    assert f"llmprune      {llmprune.__version__}" in printed
    assert "cuda          " in printed
    assert llmprune.doctor(quiet=True)["self_test"] == report["self_test"]
    assert capsys.readouterr().out == ""
    assert copy.deepcopy(report) == report
