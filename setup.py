"""Builds pnlac_fast/_C.abi3.so where a C++ compiler is found; all else is in pyproject.toml.

PNLAC_BUILD_NATIVE=1 makes a failing build an error, PNLAC_BUILD_NATIVE=0 leaves the library out.
"""

import os
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


setup(
    ext_modules=[] if NATIVE == "0" else [library],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
