"""Builds s2ft. pyproject.toml contains the fixed metadata; this file compiles the kernels.

S2FT_BUILD selects the kernels:
  auto  (default) C++ kernels if they compile, and CUDA kernels if PyTorch is a CUDA build and there is an nvcc whose
        major version is not newer. Kernels that do not compile are left out with a warning, and the PyTorch
        implementations are used instead.
  cuda  C++ and CUDA kernels, also with a CPU-only PyTorch; an error if they do not compile
  cpu   C++ kernels only; an error if they do not compile
  none  no compiled kernels
The build also reads CUDA_HOME, MAX_JOBS, CXX, CXXFLAGS, LDFLAGS and TORCH_CUDA_ARCH_LIST; nvcc reads NVCC_APPEND_FLAGS.
Without CUDA_HOME, nvcc is taken from PATH, from this Python's packages (nvidia-cuda-nvcc) or from /usr/local/cuda. By
default the architectures are those among 7.5;8.0;9.0;10.0+PTX;12.0 that nvcc knows, those of this machine's GPUs, and
PTX of the highest one. TORCH_CUDA_ARCH_LIST may have PyTorch's names, such as Hopper; what is older than 7.5, as in the
lists of many containers, is left out.

The module uses Python's limited API, so that one build serves every supported Python: a wheel has the tag
cp310-abi3. Free-threaded Python has no limited API, and gets a build for its own version.
"""

import copy
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cuda", "cpu", "none")
DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0", "12.0")  # code for 8.0 runs on 8.0 and all later 8.x
OLDEST_ARCH = 7.5  # the kernels use instructions of its tensor cores
# PyTorch's names in TORCH_CUDA_ARCH_LIST, as in torch.utils.cpp_extension
NAMED_ARCHS = {
    "Kepler": "3.5",
    "Maxwell": "5.2",
    "Pascal": "6.0;6.1",
    "Volta": "7.0",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
PYTHON_FLOOR = "cp310"
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
TORCH_FLOOR = (2, 11)
TORCH_TARGET = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"


def requested_mode():
    mode = os.environ.get("S2FT_BUILD", "auto") or "auto"
    if mode not in MODES:
        raise SystemExit(f"S2FT_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def relative(pattern):
    """Sources in the form that setuptools requires: relative to this file, with forward slashes."""
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob(pattern))


def warn(text):
    line = "*" * 78
    print(f"{line}\nWARNING: {text}\n{line}", file=sys.stderr, flush=True)


# --- what can be built here -----------------------------------------------------------------------


def import_torch():
    """Return (torch, None), or (None, the reason why the build can't use PyTorch)."""
    try:
        import torch
    except ImportError as error:
        return None, f"PyTorch cannot be imported by the build ({error}); install with --no-build-isolation"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_FLOOR:
        return None, f"PyTorch {torch.__version__} is older than {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}"
    return torch, None


def cuda_home():
    """The CUDA toolkit's folder, or None. If CUDA_HOME or CUDA_PATH is set, no other folder is tried."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return toolkit_among([named])
    on_path = shutil.which("nvcc")
    return toolkit_among([on_path and Path(on_path).resolve().parent.parent, *packaged_toolkits(), "/usr/local/cuda"])


def packaged_toolkits():
    """Toolkits among the packages of this Python, the newest first. The package nvidia-cuda-nvcc is in nvidia/cu13."""
    found = importlib.util.find_spec("nvidia")  # a namespace package: it has a folder in each place with a part of it
    folders = [Path(folder) for folder in (found and found.submodule_search_locations) or []]
    homes = [home for folder in folders for home in folder.glob("cu[0-9]*") if home.name[2:].isdigit()]
    return sorted(homes, key=lambda home: int(home.name[2:]), reverse=True)


def toolkit_among(candidates):
    """The first folder with nvcc and the static runtime, or else the first one with nvcc.

    nvcc on PATH may be a script that starts the nvcc of a toolkit elsewhere.
    """
    homes = [Path(home) for home in candidates if home and (Path(home) / "bin" / "nvcc").exists()]
    return next((home for home in homes if static_runtime_folders(home)), next(iter(homes), None))


def static_runtime_folders(home):
    """Folders of this toolkit that contain the static runtime."""
    folders = [home / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    return [folder for folder in folders if (folder / "libcudart_static.a").exists()]


def nvcc_output(home, argument):
    """What nvcc prints with this argument, or an empty string if it fails."""
    try:
        return subprocess.run([str(home / "bin" / "nvcc"), argument], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def why_not_nvcc(torch, home):
    """The reason why kernels of this toolkit could not run together with this PyTorch, or an empty string.

    A CUDA runtime of a newer major version needs a newer driver than PyTorch does. A CPU-only PyTorch has no CUDA
    version, so it works with every toolkit.
    """
    found = re.search(r"release (\d+)\.", nvcc_output(home, "--version"))
    if torch.version.cuda is None or found is None or int(found[1]) <= int(torch.version.cuda.split(".")[0]):
        return ""
    return (
        f"nvcc in {home} is of CUDA {found[1]} and PyTorch {torch.__version__} of CUDA {torch.version.cuda}: set "
        "CUDA_HOME to a toolkit whose major version is not newer, or install a PyTorch for the newer CUDA"
    )


def visible_archs():
    """The compute capabilities of this machine's GPUs, such as ["8.9"]."""
    import torch

    try:
        return ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]
    except Exception:  # the kernels can be built even if no GPU can be queried
        return []


def default_archs(home):
    """The default architectures, without those that this nvcc does not know."""
    known = {
        f"{code[:-1]}.{code[-1]}" for code in re.findall(r"^sm_(\d+)$", nvcc_output(home, "--list-gpu-code"), re.M)
    }
    archs = sorted({*DEFAULT_ARCHS, *visible_archs()}, key=lambda arch: tuple(map(int, arch.split("."))))
    archs = [arch for arch in archs if float(arch) >= OLDEST_ARCH and (arch in known or not known)]
    with_ptx = ("10.0", archs[-1])  # the driver makes code for 11.0 of that for 10.0, and for later GPUs of the highest
    return [f"{arch}+PTX" if arch in with_ptx else arch for arch in archs]


def cuda_archs(home):
    """The architectures in TORCH_CUDA_ARCH_LIST, or the default ones, such as ["8.0", "9.0", "10.0+PTX"].

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST has an entry that is no compute capability and no name of PyTorch, or only
            GPUs that are too old.
    """
    listed = re.split("[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    if listed in ([""], ["native"]):
        return default_archs(home)
    archs = [arch for entry in listed for arch in NAMED_ARCHS.get(entry, entry).split(";")]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            names = ", ".join(NAMED_ARCHS)
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: {arch!r} is no compute capability such as 9.0 or 10.0+PTX, and none of {names}"
            )
    too_old = [arch for arch in archs if float(re.match(r"\d+\.\d", arch)[0]) < OLDEST_ARCH]
    if len(too_old) == len(archs):
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST has {', '.join(archs)}, and the CUDA kernels need {OLDEST_ARCH} or later"
        )
    if too_old:
        print(
            f"TORCH_CUDA_ARCH_LIST: {', '.join(too_old)} left out, the kernels need {OLDEST_ARCH} or later", flush=True
        )
    return list(dict.fromkeys(arch for arch in archs if arch not in too_old))


def gencode(arch):
    number = arch.replace("+PTX", "").replace(".", "")
    flags = ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    if arch.endswith("+PTX"):
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


class Plan:
    """What this run compiles.

    `cpp` and `cuda` are whether C++ and CUDA kernels are compiled. `reason` is why there are no kernels at all, and
    `cuda_reason` is why there are no CUDA kernels.
    """

    def __init__(self):
        self.mode = requested_mode()
        self.cpp = self.cuda = False
        self.reason = self.cuda_reason = ""
        self.home = None
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
        self.cuda_reason = self.why_no_cuda(torch)
        if self.cuda_reason and self.mode == "cuda":
            raise SystemExit(f"S2FT_BUILD=cuda: {self.cuda_reason}")
        self.cuda = not self.cuda_reason
        if self.cuda_reason and self.home and torch.version.cuda and self.mode == "auto":
            warn(f"s2ft is installed without CUDA kernels: {self.cuda_reason}")

    def why_no_cuda(self, torch):
        """The reason why no CUDA kernels are compiled, or an empty string if they are."""
        if self.mode == "cpu":
            return "S2FT_BUILD=cpu: installed without CUDA kernels"
        if self.mode == "auto" and torch.version.cuda is None:
            return "s2ft was built with a PyTorch without CUDA"
        if self.home is None:
            return "CUDA kernels need nvcc to be built: set CUDA_HOME to a CUDA toolkit, or put nvcc on PATH"
        return why_not_nvcc(torch, self.home)


# --- the record that s2ft/ops/_build.py reads ---------------------------------------------------------


def write_record(package, compiled, cuda, reason, cuda_reason=""):
    """Write what was built into the package.

    Args:
        package: The package's folder.
        compiled: Whether there are compiled kernels.
        cuda: Whether there are CUDA kernels among them.
        reason: Why there are no kernels, or why only a part of them was built.
        cuda_reason: Why there are no CUDA kernels.
    """
    package.mkdir(parents=True, exist_ok=True)
    record = {"mode": PLAN.mode, "compiled": compiled, "cuda": cuda, "reason": reason, "cuda_reason": cuda_reason}
    (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def delete_modules(package, keep=None):
    """Delete compiled modules of earlier builds.

    Their names may differ from the new one, and Python prefers _C.cpython-311-x86_64-linux-gnu.so to _C.abi3.so.

    Args:
        package: The package's folder.
        keep: Name of the file to keep.
    """
    for stale in package.glob("_C.*"):
        if stale.suffix in (".so", ".pyd") and stale.name != keep:
            stale.unlink()


class BuildPy(build_py):
    """Without kernels there is no build_ext, so the record is written here."""

    def record_file(self):
        return Path(self.build_lib) / "s2ft" / "_build.json"

    def run(self):
        super().run()
        if not PLAN.cpp:
            package = ROOT / "s2ft" if self.editable_mode else self.record_file().parent
            delete_modules(package)
            write_record(package, False, False, PLAN.reason)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self.record_file())]


# --- compiling ------------------------------------------------------------------------------------


def jobs():
    return max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


def compile_cuda(folder, archs):
    """Compile every .cu file with nvcc and return the object files. The sources include no PyTorch header."""
    folder.mkdir(parents=True, exist_ok=True)
    architectures = [flag for arch in archs for flag in gencode(arch)]

    def one(source):
        target = folder / (Path(source).stem + ".cu.o")
        command = [
            str(PLAN.home / "bin" / "nvcc"),
            "-std=c++20",
            "-O3",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *architectures,
            "-c",
            str(ROOT / source),
            "-o",
            str(target),
        ]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, env={**os.environ, "CUDA_HOME": str(PLAN.home)})
        return str(target)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(one, relative("cuda/*.cu")))


def cuda_link_flags():
    """Flags to link the static runtime, so that the module also loads on machines without CUDA libraries."""
    found = [f"-L{folder}" for folder in static_runtime_folders(PLAN.home)[:1]]
    return [*found, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def extension():
    from torch.utils.cpp_extension import CppExtension

    # -ffp-contract=off: alpha * delta is rounded before it is added, as in PyTorch.
    flags = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]
    flags += shlex.split(
        os.environ.get("CXXFLAGS", "")
    )  # last, so that they override ours; setuptools itself reads LDFLAGS
    extension = CppExtension(
        "s2ft._C",
        ["csrc/module.cpp", *relative("cpu/*.cpp")],
        depends=relative("**/*.h"),
        extra_compile_args={"cxx": flags},
        extra_link_args=[],
        py_limited_api=LIMITED_API,
    )
    # c10 is no part of the stable ABI. On Linux libstdc++ comes first: PyTorch 2.15 has some of its symbols without
    # their versions, and those of the module would be taken from there.
    first = ["stdc++"] if sys.platform == "linux" else []
    extension.libraries = [*first, *(name for name in extension.libraries if name != "c10")]
    return extension


def build_ext_class():
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """With S2FT_BUILD=auto, tries to build with CUDA kernels, then without them, then without any kernels."""

        def run(self):
            # setuptools sets `inplace` to False while it compiles, so it is read before.
            inplace = self.inplace or getattr(self, "editable_mode", False)
            package = ROOT / "s2ft" if inplace else Path(self.build_lib).resolve() / "s2ft"
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if PLAN.mode != "auto":
                    raise
                reason = f"compiling the kernels failed: {' '.join(str(error).split())[:500]}"
                warn(f"s2ft is installed without compiled kernels: {reason}")
                self.extensions = []  # nothing left to copy or install
                delete_modules(package)
                write_record(package, False, False, reason)
                return
            delete_modules(package, keep=Path(self.get_ext_filename("s2ft._C")).name)
            note = f"the CPU kernels are loaded; {self.cuda_reason}" if self.cuda_failed else ""
            write_record(package, True, self.with_cuda, note, self.cuda_reason)

        def build_extension(self, ext):
            self.cuda_failed, self.cuda_reason = False, PLAN.cuda_reason
            self.with_cuda = PLAN.cuda and self.build_with_cuda(copy.deepcopy(ext))
            if not self.with_cuda:
                super().build_extension(ext)

        def build_with_cuda(self, ext):
            """Build with CUDA kernels. Returns False if that fails with S2FT_BUILD=auto, and raises with cuda."""
            try:
                archs = cuda_archs(PLAN.home)
                ext.extra_objects = [*ext.extra_objects, *compile_cuda(Path(self.build_temp).resolve() / "cuda", archs)]
                ext.sources += relative("cuda/*.cpp")
                ext.extra_compile_args["cxx"] += ["-DS2FT_WITH_CUDA", f'-DS2FT_CUDA_ARCHS="{";".join(archs)}"']
                ext.extra_link_args += cuda_link_flags()
                super().build_extension(ext)
                return True
            except (Exception, SystemExit) as error:
                if PLAN.mode == "cuda":
                    raise SystemExit(f"S2FT_BUILD=cuda: {error}") from error
                text = " ".join(str(error).split())[:500]
                self.cuda_failed, self.cuda_reason = True, f"compiling the CUDA kernels failed: {text}"
                warn(f"s2ft is installed without CUDA kernels: {text}")
                return False

    return BuildExt


if __name__ == "__main__":  # bench/gpu/kernel_driver.py asks the functions for the toolkit
    PLAN = Plan()
    commands, options = {"build_py": BuildPy}, {}
    if PLAN.cpp:
        commands["build_ext"] = build_ext_class()
        if LIMITED_API:
            options["bdist_wheel"] = {"py_limited_api": PYTHON_FLOOR}
    setup(cmdclass=commands, ext_modules=[extension()] if PLAN.cpp else [], options=options)
