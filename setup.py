"""Build the compiled core, without torch: C++ where a compiler is found, CUDA where a suitable nvcc is found.

Environment variables: CNEXT_CUDA=0 skips the CUDA part, 1 requires it; CXX and CUDA_HOME choose the compilers;
MAX_JOBS limits the compilers that run at once; CNEXT_WERROR=1 turns warnings into errors; CNEXT_SANITIZE=1 builds the
C++ part with ASan and UBSan.

cnext/_build.json says what was built, and why the rest was not: pip hides the output of a build that succeeds.
"""

import json
import os
import platform
import re
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
from setuptools.errors import CompileError

CSRC = Path("csrc")
# pip builds with pybind11 in a folder of another name each time, and ninja compiles again when a command changes: the
# folder is in the environment, and the version among the flags.
INCLUDES = f"-DCNEXT_PYBIND11={pybind11.__version__} -I{sysconfig.get_paths()['include']}"
SEARCHED = os.pathsep.join(filter(None, [pybind11.get_include(), os.environ.get("CPLUS_INCLUDE_PATH")]))
HEADERS = sorted(str(path) for path in CSRC.rglob("*.[hi]*"))

# Kernel sources are compiled once per instruction set; cnext._cpu chooses at import time by what the machine has.
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {
        "avx2": "-mavx2 -mf16c -mfma",
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    }
# Machine code for the A100 and the H100/H200, and PTX for later GPUs.
GENCODE = " ".join(
    f"-gencode=arch=compute_{virtual},code={real}"
    for virtual, real in (("80", "sm_80"), ("90a", "sm_90a"), ("90", "compute_90"))
)

OLDEST_CUDA = (12, 1)  # the first whose kernels take arguments of more than 4 KB; csrc/cuda/averaging.cu passes 32


class Missing(Exception):
    """There is no compiler for a part, or it is switched off."""


def find_cxx() -> str | None:
    """The C++ compiler: CXX where it is set, else the first of the usual names."""
    chosen = os.environ.get("CXX")
    found = [name for name in ([chosen] if chosen else ["g++", "clang++", "c++"]) if shutil.which(shlex.split(name)[0])]
    if chosen and not found:
        sys.exit(f"CXX is {chosen!r}; expected a C++17 compiler, and none of this name was found")
    return found[0] if found else None


def find_nvcc() -> str | None:
    """nvcc from CUDA_HOME, CUDA_PATH or PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def toolkit(nvcc: str) -> str:
    """The version of an nvcc's toolkit, as "13.0". Raises CompileError for one that cannot build the CUDA part."""
    try:
        run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{nvcc} cannot be run: {error}") from error
    if run.returncode:
        said = (run.stderr or run.stdout).strip().splitlines()
        raise CompileError(f"`{nvcc} --version` ends with status {run.returncode}: {said[-1] if said else 'no output'}")
    version = re.search(r"release (\d+)\.(\d+)", run.stdout)
    if not version:
        raise CompileError(f"`{nvcc} --version` prints no release")
    if (int(version[1]), int(version[2])) < OLDEST_CUDA:
        needed = ".".join(map(str, OLDEST_CUDA))
        raise CompileError(f"{nvcc} belongs to CUDA {version[1]}.{version[2]}; the CUDA part needs {needed} or newer")
    return f"{version[1]}.{version[2]}"


CXX, NVCC = find_cxx(), find_nvcc()
CUDA = os.environ.get("CNEXT_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    sys.exit(f"CNEXT_CUDA is {CUDA!r}; expected 0, 1 or auto")


def compiler(part: str) -> str:
    """The compiler of a part ("cpp", "cuda"), as text. Raises Missing, and CompileError for an nvcc that is too old."""
    if CXX is None:
        raise Missing("there was no C++ compiler (CXX, g++, clang++ or c++)")
    if part == "cpp":
        return f"{CXX}, for {', '.join(ISAS)}"
    if CUDA == "0":
        raise Missing("CNEXT_CUDA=0 skipped it")
    if NVCC is None:
        raise Missing("there was no nvcc in CUDA_HOME, CUDA_PATH or PATH")
    return f"{NVCC} of CUDA {toolkit(NVCC)}"


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


def compression() -> str:
    """Flags for small device code: zstd at its strongest where nvcc has it, whose drivers read it."""
    new = NVCC is not None and int(toolkit(NVCC).partition(".")[0]) >= 13
    return "-compress-mode=size" if new else "-Xfatbin=-compress-all"


def ninja_file(name: str, sources: list[str], target: Path, objects: Path) -> str:
    """The build of one extension: every source in parallel, rebuilt only when it or a header has changed."""
    cuda = any(source.endswith(".cu") for source in sources)
    nvcc_flags = (
        f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -fmad=false {GENCODE} {compression() if cuda else ''}"
    )
    if os.environ.get("CNEXT_WERROR"):
        nvcc_flags += " -Werror all-warnings"
    sanitize = " -fsanitize=address,undefined" if os.environ.get("CNEXT_SANITIZE") else ""
    strip = "" if sanitize else " -Wl,-x" if sys.platform == "darwin" else " -s"  # symbols are a tenth of a module
    linux = f"-shared -fopenmp{sanitize}"
    shared = ("-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else linux) + strip
    rules = {
        "cxx": f"{CXX} {cxx_flags()} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        "nvcc": f"{NVCC} {nvcc_flags} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        "link": f"{NVCC} -shared -cudart static -Xlinker -s $in -o $out" if cuda else f"{CXX} {shared} $in -o $out",
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
    """Builds each extension with ninja, and records what was built and why the rest was left out."""

    def run(self) -> None:
        self.built: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        super().run()
        record = json.dumps({"built": self.built, "left_out": self.left_out}, indent=2) + "\n"
        in_tree = [self.get_finalized_command("build_py").get_package_dir("cnext")] if self.inplace else []
        for folder in (Path(self.build_lib, "cnext"), *map(Path, in_tree)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build.json").write_text(record)
            for part in self.left_out:  # one that an earlier build has left would be installed
                (folder / Path(self.get_ext_filename(f"cnext.{MODULES[part]}")).name).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        for part, ext in zip(MODULES, self.extensions, strict=True):
            try:
                used = compiler(part)
                self.build_extension(ext)
                self.built[part] = used
            except (Missing, CompileError) as error:
                self.left_out[part] = self.reason(part, error)
        # Not in place: the distribution has the same list, and stays one of extensions whatever is left out.
        self.extensions = [ext for part, ext in zip(MODULES, self.extensions, strict=True) if part in self.built]

    def reason(self, part: str, error: Exception) -> str:
        """Why a part is skipped. Ends the build where the part is required, warns where skipping it is unexpected."""
        if part == "cuda" and CUDA == "1":
            sys.exit(f"CNEXT_CUDA=1 requires the CUDA part, which cannot be built: {error}")
        if part == "cpp" and isinstance(error, CompileError):
            sys.exit(f"{error}; set CXX to another C++17 compiler")
        if part == "cpp":
            warnings.warn("no C++ compiler found: cnext will run on plain torch, without its kernels", stacklevel=2)
        elif isinstance(error, CompileError):
            ways = "set CNEXT_CUDA=0 to skip it without this warning, CNEXT_CUDA=1 to require it"
            warnings.warn(f"the CUDA part of cnext is skipped: {error}. {ways}", stacklevel=2)
        return str(error)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp, ext.name).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(ext.name, ext.sources, target, objects))
        command = [sys.executable, "-m", "ninja", "-C", str(objects)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        run = subprocess.run(
            command,
            env=os.environ | {"CPLUS_INCLUDE_PATH": SEARCHED},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        print(run.stdout, flush=True)
        if run.returncode:
            used = NVCC if ext.name.endswith("_cuda") else CXX
            said = [line.strip() for line in run.stdout.splitlines() if line.strip()] or ["no output"]
            why = next((line for line in said if re.search(r"\b(fatal|error)\b", line, re.IGNORECASE)), said[-1])
            raise CompileError(f"{used} did not compile {ext.name}: {why}")


PACKAGES = find_packages(include=["cnext", "cnext.*"])
DATA = ["*.json", "*.css", "*.js", "*.png", "*.safetensors", "*.md", "*.txt", "*.j2", "*.toml", "py.typed"]
MODULES = {"cpp": "_cpu", "cuda": "_cuda"}
EXTENSIONS = [
    Extension(f"cnext.{module}", sorted(map(str, CSRC.glob(f"{module[1:]}/*.c*"))), depends=HEADERS)
    for module in MODULES.values()
]
if __name__ == "__main__":  # as build backends run it; the tests import it
    setup(
        packages=[*PACKAGES, "cnext.kernels"],
        package_dir={"cnext": "cnext", "cnext.kernels": "kernels/triton"},
        package_data={package: DATA + [f"**/{pattern}" for pattern in DATA] for package in PACKAGES},
        ext_modules=EXTENSIONS,
        cmdclass={"build_ext": NinjaBuild},
    )
