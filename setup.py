"""Builds the compiled core without torch: C++ where a compiler is found, CUDA where nvcc is found.

Environment: CNEXT_CUDA=0/1 leaves the CUDA part out or insists on it; CXX and CUDA_HOME choose the compilers;
CNEXT_WERROR=1 turns warnings into errors; CNEXT_SANITIZE=1 builds the C++ part with ASan and UBSan.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
INCLUDES = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
HEADERS = sorted(str(path) for path in CSRC.rglob("*.[hi]*"))

# Kernel sources are compiled once per instruction set; cnext._cpu chooses at import time by what the machine has.
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {
        "avx2": "-mavx2 -mf16c",
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    }
# Real code for the A100 and the H100/H200, and PTX for what comes later.
GENCODE = " ".join(
    f"-gencode=arch=compute_{virtual},code={real}"
    for virtual, real in (("80", "sm_80"), ("90a", "sm_90a"), ("90", "compute_90"))
)


def find_cxx() -> str | None:
    """The C++ compiler: CXX where it is set, else the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def find_nvcc() -> str | None:
    """nvcc from CUDA_HOME, CUDA_PATH or PATH; None where there is none or CNEXT_CUDA=0."""
    wanted = os.environ.get("CNEXT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"CNEXT_CUDA is {wanted!r}; expected 0, 1 or auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if wanted == "1" and not nvcc:
        sys.exit("CNEXT_CUDA=1, but there is no nvcc in CUDA_HOME or PATH")
    return nvcc


CXX, NVCC = find_cxx(), find_nvcc()


def cxx_flags() -> str:
    """Flags of every C++ source. No contraction: each instruction set then rounds the same way."""
    flags = (
        "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math"
    )
    flags += " -Wno-unknown-pragmas" if sys.platform == "darwin" else " -fopenmp"
    if os.environ.get("CNEXT_WERROR"):
        flags += " -Werror"
    if os.environ.get("CNEXT_SANITIZE"):
        flags += " -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    return f"{flags} {INCLUDES}"


def ninja_file(name: str, sources: list[str], target: Path, objects: Path) -> str:
    """The build of one extension: every source in parallel, rebuilt only when it or a header has changed."""
    cuda = any(source.endswith(".cu") for source in sources)
    nvcc_flags = f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -fmad=false {GENCODE}"
    if os.environ.get("CNEXT_WERROR"):
        nvcc_flags += " -Werror all-warnings"
    sanitize = " -fsanitize=address,undefined" if os.environ.get("CNEXT_SANITIZE") else ""
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else f"-shared -fopenmp{sanitize}"
    rules = {
        "cxx": f"{CXX} {cxx_flags()} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        "nvcc": f"{NVCC} {nvcc_flags} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        "link": f"{NVCC} -shared -cudart static $in -o $out" if cuda else f"{CXX} {shared} $in -o $out",
    }
    lines = [f"rule {rule}\n  command = {command}" for rule, command in rules.items()]
    built: list[str] = []

    def compile_source(source: str, rule: str, suffix: str, flags: str) -> None:
        built.append(str(objects / f"{source.replace(os.sep, '_')}{suffix}.o"))
        lines.append(f"build {built[-1]}: {rule} {Path(source).resolve()}\n  flags = {flags}")

    for source in sources:
        if source.endswith(".cu"):
            compile_source(source, "nvcc", "", "")
        elif name.endswith("_cpu") and not source.endswith("module.cpp"):
            for isa, flags in ISAS.items():
                compile_source(source, "cxx", f".{isa}", f"-DCNEXT_ISA={isa} {flags}")
        else:
            compile_source(source, "cxx", "", " ".join(f"-DCNEXT_HAVE_{isa}" for isa in ISAS))
    return "\n".join([*lines, f"build {target}: link {' '.join(built)}", ""])


class NinjaBuild(build_ext):
    """Builds each extension with ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp, ext.name).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(ext.name, ext.sources, target, objects))
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(objects)])


def extensions() -> list[Extension]:
    """What this machine can build."""
    if CXX is None:
        if os.environ.get("CNEXT_CUDA") == "1":
            sys.exit("CNEXT_CUDA=1, but there is no C++ compiler (CXX, g++, clang++, c++)")
        warnings.warn("no C++ compiler found: cnext will run on plain torch, without its kernels", stacklevel=2)
        return []
    found = [Extension("cnext._cpu", sorted(map(str, CSRC.glob("cpu/*.cpp"))), depends=HEADERS)]
    cuda = sorted(str(path) for path in CSRC.glob("cuda/*.c*"))
    if NVCC and cuda:
        found.append(Extension("cnext._cuda", cuda, depends=HEADERS))
    return found


PACKAGES = find_packages(include=["cnext", "cnext.*"])
DATA = ["*.json", "*.css", "*.js", "*.safetensors", "*.md", "*.html", "*.txt", "py.typed"]
setup(
    packages=[*PACKAGES, "cnext.kernels"],
    package_dir={"cnext": "cnext", "cnext.kernels": "kernels/triton"},
    package_data={package: DATA + [f"**/{pattern}" for pattern in DATA] for package in PACKAGES},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
