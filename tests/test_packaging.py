"""The package as it is installed: its parts, its names, and what it must not shadow.

A Hugging Face distribution is named `kernels` and Transformers imports it. The folders `kernels/`
and `converters/` here only contain packages; were they packages themselves, a Python started in
the root would take ours for theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import qplug_converters.version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python_at_root(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter with the root as working directory; return its stdout."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


WHERE = """
import importlib.util
spec = importlib.util.find_spec({name!r})
print("" if spec is None else spec.origin or "namespace")
"""


@pytest.mark.parametrize("name", ["kernels", "converters"])
def test_root_shadows_nothing_on_the_safe_path(name: str) -> None:
    found = python_at_root(WHERE.format(name=name), PYTHONSAFEPATH="1")
    assert found == "" or "site-packages" in found


@pytest.mark.parametrize("name", ["kernels", "converters"])
def test_an_installed_namesake_wins_even_on_the_unsafe_path(name: str, tmp_path: Path) -> None:
    """Without PYTHONSAFEPATH the root comes first, but a namespace folder yields to a package."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    found = python_at_root(WHERE.format(name=name), PYTHONPATH=str(tmp_path))
    assert Path(found) == tmp_path / name / "__init__.py"


@pytest.mark.parametrize("folder", ["kernels", "converters"])
def test_folders_contain_packages_and_are_none(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder / f"qplug_{folder}" / "__init__.py").exists()


def test_no_conftest_in_the_root() -> None:
    """One there would put the root on sys.path."""
    assert not (ROOT / "conftest.py").exists()


def test_versions_agree() -> None:
    assert PROJECT["version"] == qplug_converters.version.__version__
    assert PROJECT["version"] == metadata.version("qplug")


def test_entry_points_can_be_loaded() -> None:
    """Torch turns a failing `torch.backends` entry point into a failing `import torch`."""
    for group in ("console_scripts", "vllm.general_plugins", "torch.backends"):
        (entry,) = metadata.entry_points(group=group, name="qplug")
        assert callable(entry.load())


def test_vllm_is_an_extra_and_never_required() -> None:
    required = metadata.requires("qplug") or []
    vllm = [line for line in required if line.replace("-", "").startswith("vllm")]
    assert vllm
    assert all("extra ==" in line for line in vllm)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy of the sources, which lies beside it, so that the tree is left as it is."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", "qplug", "converters", "kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the sources cannot be told from build products")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in [*listed.stdout.splitlines(), "pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--wheel-dir", str(folder), str(source)],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_three_packages(wheel: Path) -> None:
    source = wheel.parent / "source"
    assert wheel.name == f"qplug-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    packages = {"qplug": ".", "qplug_converters": "converters", "qplug_kernels": "kernels"}
    info = f"qplug-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {*packages, info}
    assert f"{info}/licenses/LICENSE" in names
    for package, folder in packages.items():
        assert f"{package}/py.typed" in names
        sources = (source / folder / package).rglob("*.py")
        expected = {str(f.relative_to(source / folder)) for f in sources}
        assert expected == {n for n in names if n.startswith(f"{package}/") and n.endswith(".py")}


IMPORTED = """
import sys
import qplug, qplug_converters, qplug_kernels
for package in (qplug, qplug_converters, qplug_kernels):
    print(package.__file__)
print(*sys.path, sep="\\n")
"""


def test_an_installed_wheel_starts(wheel: Path, tmp_path: Path) -> None:
    """Installed elsewhere, with the checkout out of reach.

    `-S` leaves `.pth` files alone, and with them the finder of an editable installation; what
    qplug depends on is found through PYTHONPATH.
    """
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--target", str(target), str(wheel)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    search = os.pathsep.join([str(target), *libraries])

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-S", "-P", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": search},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = [Path(line) for line in run("-c", IMPORTED).splitlines()]
    packages = ("qplug", "qplug_converters", "qplug_kernels")
    assert lines[:3] == [target / package / "__init__.py" for package in packages]
    assert not {ROOT, ROOT / "converters", ROOT / "kernels"} & set(lines[3:])
    assert run(target / "bin" / "qplug", "--version").split()[-1] == PROJECT["version"]
    assert "gptq" in run(target / "bin" / "qplug", "formats")
