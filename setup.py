"""What pyproject.toml cannot say: kernels/ is installed inside the package, and csrc/ is compiled where a compiler is found.

C++ takes the headers of the torch that is installed; which version that is does not matter to the result (Python's limited
API, torch's stable one). CUDA sources hold no torch header: plain nvcc compiles them, also beside a CPU torch.
``ADAM_GHOST_CUDA=0`` leaves CUDA out, ``=1`` fails without it; ``ADAM_GHOST_ARCH`` lists its targets (default "80 90a 100", the
last also as PTX).
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import find_packages, setup

CSRC = Path("csrc")
CUDA = os.environ.get("ADAM_GHOST_CUDA", "auto")
ARCHES = os.environ.get("ADAM_GHOST_ARCH", "80 90a 100").split()
# no trapping or errno: lets conditional divisions and roots be vectorised; NaN and infinity keep their meaning
CXX = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra"]


def say(text):
    """Last, where it is read; pip shows it with ``-v``, ``adam-ghost doctor`` at any time."""
    atexit.register(print, f"adam-ghost: {text}", file=sys.stderr)


def find_nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if CUDA == "0":
        return None
    if nvcc is None and CUDA == "1":
        raise RuntimeError("ADAM_GHOST_CUDA=1 but no nvcc was found: set NVCC or CUDA_HOME")
    return nvcc


def gencode():
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHES]
    return [*flags, f"-gencode=arch=compute_{ARCHES[-1]},code=compute_{ARCHES[-1]}"]


def toolkit(nvcc):
    """The toolkit's folder: nvcc itself knows it, also where it is called through a wrapper or a link."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "x.cu"], capture_output=True, text=True).stderr
    return next(line.split("=", 1)[1].strip() for line in dry.splitlines() if "TOP=" in line)


def see_installed():
    """pip builds in an environment of its own, from which what is installed, torch for one, is hidden."""
    plain = subprocess.check_output([sys.executable, "-I", "-c", "import sys; print(*sys.path, sep='\\n')"], text=True)
    sys.path += [folder for folder in plain.splitlines() if folder not in sys.path]


def keep_torch():
    """Stops before pip replaces a torch that is too old, which other packages here were built for."""
    low = re.search(r'"torch>=([\d.]+)"', Path("pyproject.toml").read_text(encoding="utf-8"))[1]
    try:
        there = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return
    if numbers(there)[:2] < numbers(low):
        raise SystemExit(
            f"adam-ghost: needs torch>={low}, but torch {there} is here; pip would replace it and break what needs it"
            " (torchvision): install adam-ghost into another environment, or such a torch first"
        )


def numbers(version):
    return tuple(map(int, re.findall(r"\d+", version)))


def extension():
    """The extension's build command and the extension, or neither, having said why."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        say("no torch is installed, C++ part left out: install torch first, then this again")
        return {}, []
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        say(f"no C++ compiler ({compiler}), C++ part left out: reference code serves")
        return {}, []
    nvcc = find_nvcc()
    if nvcc is None:
        say("CUDA part left out: " + ("ADAM_GHOST_CUDA=0" if CUDA == "0" else "no nvcc"))

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):
        def build_extension(self, ext):
            if nvcc:
                made = Path(self.build_temp, "cuda.o")
                made.parent.mkdir(parents=True, exist_ok=True)
                flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC", f"-I{CSRC}", f'-DADAM_GHOST_TARGETS="{" ".join(ARCHES)}"']
                subprocess.check_call([nvcc, *flags, *gencode(), "-c", str(CSRC / "cuda.cu"), "-o", str(made)])
                ext.extra_objects.append(str(made))
                ext.define_macros.append(("ADAM_GHOST_WITH_CUDA", None))
                ext.library_dirs.append(f"{toolkit(nvcc)}/lib64")
                ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
            super().build_extension(ext)

    ext = CppExtension(
        "adam_ghost._C",
        [str(CSRC / name) for name in ("bind.cpp", "read.cpp", "cpu.cpp")],
        depends=[str(p) for p in CSRC.iterdir()],
        py_limited_api=True,
        extra_compile_args=CXX + os.environ.get("ADAM_GHOST_CXXFLAGS", "").split(),
    )
    return {"build_ext": Build}, [ext]


see_installed()
keep_torch()
commands, extensions = extension()
setup(
    packages=[*find_packages(include=["adam_ghost", "adam_ghost.*"]), "adam_ghost.kernels"],
    package_dir={"adam_ghost.kernels": "kernels"},
    package_data={"adam_ghost": ["py.typed"], "adam_ghost.report": ["page.*"]},
    ext_modules=extensions,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
