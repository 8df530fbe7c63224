"""Builds pnlac_fast/_C.abi3.so where a C++ compiler is found; all else is in pyproject.toml.

PNLAC_BUILD_NATIVE=1 makes a failing build an error, PNLAC_BUILD_NATIVE=0 leaves the library out.

Where nvcc is found, in CUDA_HOME or on PATH, the kernels for CUDA are compiled too: about ten seconds more. torch needs
no CUDA for that, and the library loads into a torch without. PNLAC_BUILD_CUDA=1 makes it an error if that fails,
PNLAC_BUILD_CUDA=0 leaves the kernels out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "pnlac-fast is built against the torch it will run with. Install that first, then build without isolation:\n"
        "    pip install torch==2.13.0 setuptools ninja\n"
        "    pip install --no-build-isolation ."
    )

NATIVE = os.environ.get("PNLAC_BUILD_NATIVE", "auto")
CUDA = os.environ.get("PNLAC_BUILD_CUDA", "auto")
# Linked in, so that the library asks for no other where there is no CUDA.
RUNTIME = "libcudart_static.a"
# Code for A100 and H100 or H200, and PTX that the driver compiles for what comes later.
ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]

library = CppExtension(
    "pnlac_fast._C",
    sorted(str(path) for room in ("torch", "cpu") for path in Path("csrc", room).glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").rglob("*.[hi]*")),
    extra_compile_args={
        "cxx": [
            "-O3",
            "-g0",
            "-std=c++20",
            "-DTORCH_TARGET_VERSION=0x020A000000000000",  # 2.10
            "-fvisibility=hidden",
            # A contraction in the vector part of a loop only would make the bits depend on how threads divide it.
            "-ffp-contract=off",
            # Nobody reads errno, and a square root that may set it is not vectorised.
            "-fno-math-errno",
        ]
    },
    py_limited_api=True,
)


class BuildNative(BuildExtension):
    """Build the library, or go on without it: the torch engine computes the same."""

    def run(self) -> None:
        # Left over from an earlier build, it would be taken for the result of this one.
        for folder in [self.build_lib, *(["."] if self.inplace else [])]:
            Path(folder, "pnlac_fast", "_C.abi3.so").unlink(missing_ok=True)
        if CUDA != "0":
            self.add_cuda()
        try:
            super().run()
        except Exception as error:
            # The compiler's own messages stand above; which exception ends them depends on the build tool.
            if NATIVE == "1":
                raise
            print(
                f"\nWARNING: the compiled operations of pnlac-fast were not built ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}). The package works without them, "
                "slower. Install a C++20 compiler (on Debian: apt install g++), then install the package again.\n",
                file=sys.stderr,
            )

    def add_cuda(self) -> None:
        """Compile csrc/cuda with nvcc and link it into the library, or go on without it: Triton computes the same."""
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
        if nvcc is None:
            if CUDA == "1":
                sys.exit("PNLAC_BUILD_CUDA=1, but there is no nvcc: put it on PATH, or set CUDA_HOME.")
            return
        objects = []
        try:
            # The nvcc on PATH may be a link or a script; it knows where its toolkit is.
            plan = subprocess.run(
                [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
            )
            top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
            found = [path for room in ("lib64", "lib") for path in Path(top[1] if top else "", room).glob(RUNTIME)]
            if not found:
                raise FileNotFoundError(f"no {RUNTIME} in the toolkit of {nvcc}")
            for source in sorted(Path("csrc/cuda").glob("*.cu")):
                target = Path(self.build_temp, source).with_suffix(".cu.o")
                target.parent.mkdir(parents=True, exist_ok=True)
                options = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden"]
                architectures = [f"-gencode={architecture}" for architecture in ARCHITECTURES]
                subprocess.run([nvcc, *options, *architectures, "-c", str(source), "-o", str(target)], check=True)
                objects.append(str(target))
        except (OSError, subprocess.CalledProcessError) as error:
            if CUDA == "1":
                raise
            print(f"\nWARNING: pnlac-fast is built without its kernels for CUDA: {error}\n", file=sys.stderr)
            return
        for extension in self.extensions:
            extension.extra_objects += objects
            extension.library_dirs.append(str(found[0].parent))
            extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
            extension.extra_compile_args["cxx"].append("-DPNLAC_WITH_CUDA")


setup(
    ext_modules=[] if NATIVE == "0" else [library],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
