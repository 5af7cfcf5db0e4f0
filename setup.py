"""Builds s2ft. pyproject.toml holds what is fixed; this file holds how the kernels are compiled.

S2FT_BUILD chooses:
  auto  (default) C++ kernels if they compile, CUDA kernels too if PyTorch is a CUDA build and nvcc is
        there; what fails is left out with a warning, and the PyTorch implementations serve instead
  cuda  C++ and CUDA kernels, also with a CPU-only PyTorch; an error if that fails
  cpu   C++ kernels only; an error if that fails
  none  no compiled kernels
Also read: CUDA_HOME, TORCH_CUDA_ARCH_LIST (default 8.0;9.0;10.0+PTX), MAX_JOBS, CXX, CXXFLAGS, LDFLAGS.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cuda", "cpu", "none")
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
TORCH_FLOOR = (2, 11)
TORCH_TARGET = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"


def requested_mode():
    mode = os.environ.get("S2FT_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise SystemExit(f"S2FT_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def relative(pattern):
    """Sources as setuptools wants them: relative to this file, with forward slashes."""
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob(pattern))


def warn(text):
    line = "*" * 78
    print(f"{line}\nWARNING: {text}\n{line}", file=sys.stderr, flush=True)


# --- what can be built here -----------------------------------------------------------------------

def import_torch():
    """(torch, None), or (None, why not)."""
    try:
        import torch
    except ImportError as error:
        return None, f"PyTorch cannot be imported by the build ({error}); install with --no-build-isolation"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_FLOOR:
        return None, f"PyTorch {torch.__version__} is older than {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}"
    return torch, None


def cuda_home():
    """The CUDA toolkit's folder, or None. A CUDA_HOME that was set is not second-guessed."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [named] if named else [on_path and Path(on_path).resolve().parent.parent, "/usr/local/cuda"]
    for home in candidates:
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    return None


def cuda_archs():
    """['8.0', '9.0', '10.0+PTX'] from TORCH_CUDA_ARCH_LIST."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    return [name for name in names.replace(",", ";").replace(" ", ";").split(";") if name]


def gencode(arch):
    number = arch.replace("+PTX", "").replace(".", "")
    if not number.rstrip("af").isdigit():
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is no compute capability such as 9.0 or 10.0+PTX")
    flags = ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    if arch.endswith("+PTX"):
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


class Plan:
    """What this run compiles: `cpp`, `cuda`, and if nothing, `reason`."""

    def __init__(self):
        self.mode = requested_mode()
        self.cpp = self.cuda = False
        self.reason, self.home = "", None
        if self.mode == "none":
            self.reason = "S2FT_BUILD=none: installed without compiled kernels"
            return
        torch, problem = import_torch()
        if problem:
            if self.mode != "auto":
                raise SystemExit(f"S2FT_BUILD={self.mode}: {problem}")
            self.reason = problem
            warn(f"s2ft is installed without compiled kernels: {problem}")
            return
        self.cpp = True
        self.home = cuda_home()
        if self.mode == "cuda" and self.home is None:
            raise SystemExit("S2FT_BUILD=cuda needs nvcc: set CUDA_HOME to a CUDA toolkit, or put nvcc on PATH")
        self.cuda = self.home is not None and (
            self.mode == "cuda" or (self.mode == "auto" and torch.version.cuda is not None))


# --- the record that s2ft/_build.py reads ---------------------------------------------------------

def write_record(package, compiled, cuda, reason):
    """Say in the package what was built. What an earlier build left there goes if nothing was."""
    package.mkdir(parents=True, exist_ok=True)
    if not compiled:
        for stale in package.glob("_C.*"):
            if stale.suffix in (".so", ".pyd"):
                stale.unlink()
    record = {"mode": PLAN.mode, "compiled": compiled, "cuda": cuda, "reason": reason}
    (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


class BuildPy(build_py):
    """Without kernels there is no build_ext, so the record is written here."""

    def record_file(self):
        return Path(self.build_lib) / "s2ft" / "_build.json"

    def run(self):
        super().run()
        if not PLAN.cpp:
            package = ROOT / "s2ft" if self.editable_mode else self.record_file().parent
            write_record(package, False, False, PLAN.reason)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self.record_file())]


# --- compiling ------------------------------------------------------------------------------------

def jobs():
    return max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


def compile_cuda(folder):
    """Compile every .cu with nvcc; their objects. They include no PyTorch header."""
    folder.mkdir(parents=True, exist_ok=True)
    architectures = [flag for arch in cuda_archs() for flag in gencode(arch)]

    def one(source):
        target = folder / (Path(source).stem + ".cu.o")
        command = [str(PLAN.home / "bin" / "nvcc"), "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden",
                   *architectures, "-c", str(ROOT / source), "-o", str(target)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, env={**os.environ, "CUDA_HOME": str(PLAN.home)})
        return str(target)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(one, relative("cuda/*.cu")))


def cuda_link_flags():
    """The static runtime: the module then loads where no CUDA library is."""
    folders = [PLAN.home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    found = [f"-L{f}" for f in folders if (f / "libcudart_static.a").exists()][:1]
    return [*found, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def extension():
    from torch.utils.cpp_extension import CppExtension
    # Without contraction alpha * delta is rounded before it is added, as PyTorch rounds it.
    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))   # last, so that they win; setuptools reads LDFLAGS itself
    return CppExtension("s2ft._C", ["csrc/module.cpp", *relative("cpu/*.cpp")],
                        depends=relative("**/*.h"), extra_compile_args={"cxx": flags}, extra_link_args=[])


def build_ext_class():
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Falls back step by step under auto: with CUDA, without it, without kernels."""

        def run(self):
            # setuptools turns `inplace` off while it compiles, so look first.
            inplace = self.inplace or getattr(self, "editable_mode", False)
            package = ROOT / "s2ft" if inplace else Path(self.build_lib).resolve() / "s2ft"
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if PLAN.mode != "auto":
                    raise
                reason = f"compiling the kernels failed: {' '.join(str(error).split())[:500]}"
                warn(f"s2ft is installed without compiled kernels: {reason}")
                self.extensions = []   # nothing left to copy or install
                write_record(package, False, False, reason)
                return
            write_record(package, True, self.with_cuda, self.note)

        def build_extension(self, ext):
            self.with_cuda, self.note = False, ""
            if PLAN.cuda:
                self.add_cuda(ext)
            super().build_extension(ext)

        def add_cuda(self, ext):
            try:
                objects = compile_cuda(Path(self.build_temp).resolve() / "cuda")
            except (OSError, subprocess.SubprocessError) as error:
                if PLAN.mode == "cuda":
                    raise
                self.note = f"the CPU kernels are loaded; compiling the CUDA kernels failed: {error}"
                warn(f"s2ft is installed without CUDA kernels: {error}")
                return
            self.with_cuda = True
            ext.sources += relative("cuda/*.cpp")
            ext.extra_objects = [*ext.extra_objects, *objects]
            ext.extra_compile_args["cxx"] += ["-DS2FT_WITH_CUDA", f'-DS2FT_CUDA_ARCHS="{";".join(cuda_archs())}"']
            ext.extra_link_args += cuda_link_flags()

    return BuildExt


PLAN = Plan()
commands = {"build_py": BuildPy}
if PLAN.cpp:
    commands["build_ext"] = build_ext_class()
setup(cmdclass=commands, ext_modules=[extension()] if PLAN.cpp else [])
