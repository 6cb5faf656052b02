"""The build, with and without compilers, and what the compiled kernels are like where they cannot be run."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from adam_ghost import doctor, extension

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which(os.environ.get("CXX", "c++").split()[0])
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def run(*command, **environment):
    """A finished process, in an environment of its own: the given variables replace those of this one; None removes."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([str(x) for x in command], cwd=ROOT, env=env, capture_output=True, text=True)


# ---- the kernels ----


@pytest.fixture(scope="module")
def kernels_program(tmp_path_factory):
    """The CPU kernels, the CUDA kernels compiled for the CPU, and their comparison; without contraction: equal to the bit."""
    program = tmp_path_factory.mktemp("kernels") / "kernels"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
    includes = [f"-I{p}" for p in (ROOT / "tests/csrc/cuda_on_cpu", ROOT / "csrc", include_paths()[0])]
    sources = ["-x", "c++", "csrc/cuda.cu", "csrc/cpu.cpp", "tests/csrc/cuda_on_cpu/main.cpp"]
    made = run(CXX, *flags, "-Wno-unknown-pragmas", *includes, *sources, "-o", program)
    assert made.returncode == 0, made.stderr
    return program


@needs_compiler
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_cuda_kernels_equal_the_cpu_kernels_to_the_bit(kernels_program, capability):
    found = run(kernels_program, ADAM_GHOST_CPU_CAPABILITY=capability)
    assert found.returncode == 0, found.stdout
    if not found.stdout.endswith(f"on {capability}\n"):
        pytest.skip(f"this processor has no {capability}; its best was equal")


def cuobjdump():
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (bundled and shutil.which("cuobjdump", path=bundled))


@pytest.mark.skipif(not extension.built["cuda"], reason=extension.reason("cuda") or "built")
@pytest.mark.skipif(not cuobjdump(), reason="no cuobjdump")
def test_cuda_kernels_have_no_spills():
    listing = run(cuobjdump(), "-res-usage", extension.C.__file__).stdout
    used = re.findall(r"arch = sm_(\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing)
    arch, seen = None, {}
    for new_arch, name, *numbers in used:
        arch = new_arch or arch
        if name:
            registers, stack, _, local = map(int, numbers)
            assert stack == local == 0, f"{name} on sm_{arch} spills: stack {stack}, local {local}"
            assert registers <= (255 if "ELi4E" in name else 128), f"{name} on sm_{arch}: {registers} registers"
            seen.setdefault(arch, set()).add(name)
    assert set(seen) == set(extension.built["cuda"].split())
    # Adam's four rules and the others' one, for one target or several
    assert all(sum("correct" in name for name in names) == 10 for names in seen.values())


# ---- the build ----


def build(tmp_path, **environment):
    made = run(sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "--build-lib", tmp_path / "lib", **environment)
    return made, tmp_path / "lib"


USE = """
import json, sys, warnings
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]  # it would find the checkout's
import torch
from adam_ghost import doctor, extension
from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import StepScalars
warnings.simplefilter("always")
x = [torch.ones(3)]
s = StepScalars(1, 1e-3, 0.9, 0.999, 1e-8)
with warnings.catch_warnings(record=True) as seen:
    for _ in range(3):
        P, sums = adam_op.variance_correction(x, x, x, x, x, x, [s])
kept = [str(w.message) for w in seen if "adam_ghost" in str(w.message)]
print(json.dumps([extension.__file__, kept, [list(f) for f in doctor.examine()], P[0].tolist()]))
"""


def use(package):
    """What a user of this build sees: its warnings, doctor's findings, and a result."""
    found = subprocess.run([sys.executable, "-c", USE], cwd=package, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    where, warned, findings, P = json.loads(found.stdout)
    assert Path(where).is_relative_to(package)
    return warned, {name: (active, why) for name, active, why in findings}, P


def test_no_compiler_builds_and_works_and_says_so_once(tmp_path):
    made, package = build(tmp_path, CXX="no-such-compiler")
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("no C++ compiler (no-such-compiler), C++ part left out") == 1
    assert not list(package.rglob("_C*"))
    kernels = [p.relative_to(package / "adam_ghost/kernels") for p in (package / "adam_ghost/kernels").rglob("*.py")]
    assert sorted(kernels) == sorted(p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels").rglob("*.py"))
    warned, findings, _ = use(package)
    assert len(warned) == 1 and "the extension was not built" in warned[0]
    for part in ("extension, CPU", "extension, CUDA"):
        assert findings[part][0] is False and "the extension was not built" in findings[part][1]


@needs_compiler
def test_without_cuda(tmp_path):
    made, package = build(tmp_path, ADAM_GHOST_CUDA="0", ADAM_GHOST_CXXFLAGS="-O0")
    assert made.returncode == 0, made.stderr
    assert "CUDA part left out: ADAM_GHOST_CUDA=0" in made.stderr
    warned, findings, _ = use(package)
    assert not warned and findings["extension, CPU"][0]
    assert findings["extension, CUDA"][0] is False and findings["extension, CUDA"][1] == "the extension was built without CUDA"


@needs_compiler
def test_cuda_that_was_asked_for_and_is_not_there_fails(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "c++").symlink_to(CXX)
    made, _ = build(tmp_path, ADAM_GHOST_CUDA="1", PATH=str(tools), CXX=str(tools / "c++"), NVCC=None, CUDA_HOME=str(tmp_path))
    assert made.returncode != 0 and "ADAM_GHOST_CUDA=1 but no nvcc was found" in made.stderr


def test_a_broken_extension_is_named(tmp_path):
    _, package = build(tmp_path, CXX="no-such-compiler")
    (package / "adam_ghost" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    warned, findings, _ = use(package)
    assert len(warned) == 1 and "the extension does not load" in warned[0]
    assert "does not load" in findings["extension, CPU"][1]


def test_doctor_agrees_with_this_installation():
    findings = {f.name: f for f in doctor.examine()}
    assert findings["torch"].active and findings["reference code"].active
    assert findings["extension, CPU"].active == (not extension.reason("cpu"))
    assert findings["extension, CUDA"].active == (not extension.reason("cuda") and torch.cuda.is_available())
    assert all(f.why for f in findings.values())


def test_one_oldest_torch():
    """What doctor needs is what an installation asks for, which has no upper end: pip would go down to it."""
    asked = re.findall(r'"torch([^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert asked == [">=" + ".".join(map(str, doctor.TORCH[0]))]


@pytest.mark.parametrize(
    ("version", "active", "said"),
    [("2.10.2", False, "needed: >=2.11"), ("2.14.1", True, "2.14.1"), ("2.99.0", True, "newer than 2.15"), ("3.0", True, "newer")],
)
def test_doctor_says_what_is_too_old_and_what_is_untested(monkeypatch, version, active, said):
    monkeypatch.setattr(doctor.torch, "__version__", version)
    found = doctor.examine()[0]
    assert found.active == active and said in found.why and ("newer" in found.why) == ("newer" in said)


TORCHES = {"2.10.2": True, "2.11.0": False, "2.13.1+cpu": False, "2.99.0": False, None: False}


@pytest.mark.parametrize("version", TORCHES)
def test_an_installation_replaces_no_torch(tmp_path, version):
    """pip would put one in range in its place, for which torchvision and others were not built."""
    if version:
        there = tmp_path / f"torch-{version}.dist-info"
        there.mkdir()
        (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (tmp_path / "setuptools.py").write_text("find_packages = lambda **_: []\nsetup = lambda **_: None\n")
    (tmp_path / "torch.py").write_text("raise ImportError")
    only = "sys.path = [sys.argv.pop(1)] + [p for p in sys.path if not p.endswith('site-packages')]"
    done = run(sys.executable, "-S", "-c", f"import sys; {only}; import setup", tmp_path)
    assert (done.returncode == 1) == TORCHES[version], done.stderr
    assert ("pip would replace it" in done.stderr) == TORCHES[version]


def test_an_isolated_build_finds_the_torch_that_is_installed():
    """pip takes what is installed off the path, and would leave the C++ part out."""
    only_setuptools = "import sys, importlib.util, setuptools; setuptools.setup = lambda **_: None"
    hidden = "sys.path[:] = [p for p in sys.path if not p.endswith('site-packages')]"
    found = "print(importlib.util.find_spec('torch') is not None)"
    done = run(sys.executable, "-c", f"{only_setuptools}; {hidden}; {found}; import setup; {found}")
    assert done.stdout.split() == ["False", "True"], done.stderr
