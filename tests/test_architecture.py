"""The walls of the house: which way imports go, what importing costs, and what each top-level name is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("ppl_models/**/*.py"), *ROOT.glob("inference/**/*.py")]
TAKEN_FOLDERS = {"core", "models", "enterprise", "usage_tracking"}  # another distribution's `inference` has these


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file's import statements name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def layer(module: str) -> int | None:
    """Place in networks <- ppl_models <- inference <- cli; None for foreign modules, and -1 for what checks numbers."""
    if module == "ppl_models.arguments":
        return -1
    if module.startswith("ppl_models.networks"):
        return 0
    if module == "ppl_models" or module.startswith("ppl_models."):
        return 1
    if module == "inference.cli" or module.startswith(("inference.cli.", "inference.commands")):
        return 3
    if module == "inference" or module.startswith("inference."):
        return 2
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = layer(module)
    for name in imported_modules(path):
        other = layer(name)
        assert other is None or other <= own, f"{module} imports {name}, which is above it"


def test_the_direction_test_would_see_a_violation():
    assert layer("inference.bounds") > layer("ppl_models.vae") > layer("ppl_models.networks.mlp")
    assert layer("inference.cli") > layer("inference.training.loop")


def test_networks_know_neither_pyro_nor_probability():
    for path in ROOT.glob("ppl_models/networks/*.py"):
        assert not {n for n in imported_modules(path) if n.split(".")[0] == "pyro" or "distributions" in n}, path


def test_few_files_import_arviz():
    users = {p.name for p in SOURCES if any(n.split("_")[0].split(".")[0] == "arviz" for n in imported_modules(p))}
    assert users <= {"chains.py", "pareto.py", "posterior.py"}


def test_inference_has_no_folder_that_another_distribution_owns():
    assert not TAKEN_FOLDERS & {p.name for p in (ROOT / "inference").iterdir()}


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_changes_no_global_state():
    code = """
import numpy as np, pyro, torch
before = (torch.get_rng_state().sum(), torch.get_default_dtype(), dict(pyro.get_param_store()), pyro.settings.get())
state = np.random.get_state()[1].sum()
import inference, ppl_models
for package in (ppl_models, inference):
    for name in package.__all__:
        getattr(package, name)
after = (torch.get_rng_state().sum(), torch.get_default_dtype(), dict(pyro.get_param_store()), pyro.settings.get())
assert before == after
assert state == np.random.get_state()[1].sum()
"""
    assert _run(code) == ""


def test_importing_the_packages_is_cheap():
    assert _run("import sys, inference, ppl_models; print('torch' in sys.modules)") == "False"


def test_every_public_name_resolves():
    import inference
    import ppl_models

    for package in (ppl_models, inference):
        assert set(package._HOMES) == set(package.__all__)
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="another distribution"):
        inference.core  # noqa: B018
