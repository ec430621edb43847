"""Every name that the package promises is there, and no import is paid for before it is used."""

import importlib
import subprocess
import sys

import pytest

processes = importlib.import_module("ppl_models.processes")


@pytest.mark.parametrize("name", processes.__all__)
def test_every_public_name_resolves(name):
    assert getattr(processes, name).__name__ == name
    assert name in dir(processes)


def test_the_table_and_the_public_names_agree():
    assert set(processes._HOMES) == set(processes.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'ppl_models.processes' has no attribute 'Wiener'"):
        processes.Wiener  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, ppl_models.processes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
