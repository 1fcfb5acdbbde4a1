"""Builds the native core: every .pyx below sim/, broker/ and client/ becomes one extension module beside it."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).parent
HEADERS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("sim/**/*.h"))]

# -g1 with Cython's line directives lets a return address be resolved to the .pyx line that made an access.
COMPILE_ARGS = ["-O3", "-g1", "-fno-strict-aliasing", "-Wno-unused-function", "-Wno-unused-variable",
                "-Wno-address-of-packed-member", "-Wno-sign-compare"]


def extension(path: Path) -> Extension:
    relative = path.relative_to(ROOT)
    return Extension(
        ".".join(relative.with_suffix("").parts),
        [str(relative)],
        include_dirs=["sim/cxl"],
        depends=HEADERS,
        extra_compile_args=COMPILE_ARGS,
        libraries=["pthread", "rt"],
    )


SOURCES = sorted(path for folder in ("sim", "broker", "client") for path in ROOT.glob(f"{folder}/**/*.pyx"))

setup(
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
    ext_modules=cythonize(
        [extension(path) for path in SOURCES],
        nthreads=os.cpu_count() or 1,
        emit_linenums=True,
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
        },
    )
)
