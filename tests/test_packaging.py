"""The built wheel in an empty environment, and the guard against another distribution's ``inference``."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from ppl_models import check_inference, launcher

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, source = (
        tmp_path_factory.mktemp("dist"),
        tmp_path_factory.mktemp("source"),
    )  # a copy: building writes beside it
    for name in ("ppl_models", "inference"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_readme_names_files_and_tests_that_exist():
    """Links, paths in code quotes, and the test of each slip of the notes; in the folders' own READMEs, too."""
    pages = {folder: (ROOT / folder / "README.md").read_text() for folder in (".", "examples", "tests")}
    links = [Path(folder, link) for folder, page in pages.items() for link in re.findall(r"\]\(([\w./-]+)[)#]", page)]
    text = "\n".join(pages.values())
    paths = re.findall(r"`((?:tests|ppl_models|inference|examples)/[\w./-]+)", text)
    assert len(links) > 30
    assert len(paths) > 40
    assert [str(each) for each in {*links, *map(Path, paths)} if not (ROOT / each).exists()] == []
    pictures = {path.name for path in (ROOT / "examples" / "pictures").iterdir()}
    assert pictures == {path.name for path in links if path.suffix == ".png"}  # each is shown somewhere
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert examples == {path.name for path in links if path.parent == Path("examples") and path.suffix == ".py"}
    slips = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(slips) > 15
    missing = [
        f"{file}::{name}"
        for file, name in slips
        if f"def {name}(" not in (ROOT / "tests" / file.removeprefix("tests/")).read_text()
    ]
    assert missing == []


@pytest.mark.xdist_group("wheel")
def test_wheel_holds_both_packages_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"ppl_models", "inference"}
    names = zipfile.ZipFile(wheel).namelist()
    assert "inference/views/report.html" in names
    assert "ppl_models/py.typed" in names


@pytest.mark.xdist_group("wheel")
def test_wheel_installs_into_an_empty_environment_and_works(wheel, tmp_path):
    """Dependencies are lent by a path file, so that nothing is downloaded; the project's own files come from the wheel."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    packages = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (packages / "lent.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    code = (
        "import inference, ppl_models; from inference import decompose_elbo; from ppl_models import LinearGaussian\n"
        "pair = LinearGaussian.random(3, 2); x = pair.model(size=2).detach()\n"
        "print(inference.__file__, ppl_models.__file__, decompose_elbo(pair.model, pair.guide, x, num_particles=10).sites)"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(packages)) == 2
    assert "('z', 'x')" in done.stdout
    ppl = subprocess.run(
        [packages.parents[2] / "bin" / "ppl", "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ppl.returncode == 0, ppl.stderr
    assert "train" in ppl.stdout


def test_another_inference_first_on_the_path_is_named(tmp_path):
    other = tmp_path / "inference"
    other.mkdir()
    (other / "__init__.py").write_text("__version__ = '9.9'\n")
    code = "from ppl_models.launcher import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"found another one at {other}" in done.stderr
    assert "environment of its own" in done.stderr


def test_ours_passes_the_guard(monkeypatch):
    check_inference()

    def missing(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(launcher.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="found none"):
        check_inference()
