"""Builds the native core: every .pyx below sim/, broker/ and client/ becomes one extension module beside it."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).parent
HEADERS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("sim/**/*.h"))]
# Memory views need a lot of code. Here it is compiled once, and not in each module that has one.
SHARED_UTILITY = "sim.cxl._cyutility"
# The bootstrap builds in place first, and then only makes the package known to pip.
BUILT_ALREADY = os.environ.get("CXLMQ_NATIVE") == "built"

# -g1 with Cython's line directives lets a return address be resolved to the .pyx line that made an access.
COMPILE_ARGS = ["-g1", "-fno-strict-aliasing", "-Wno-unused-function", "-Wno-unused-variable",
                "-Wno-address-of-packed-member", "-Wno-sign-compare"]
# Modules that run once, when something starts: their compile time is all that one notices of them.
COLD = ("broker.layout", "broker.planted", "broker.crash", "sim.cxl.litmus", SHARED_UTILITY)
# Cython's shared code does not know views of structs (as of 3.3).
VIEWS_STRUCTS = ("broker.layout",)


def extension(name: str, source: str) -> Extension:
    return Extension(
        name,
        [source],
        include_dirs=["sim/cxl"],
        depends=HEADERS,
        extra_compile_args=["-O1" if name in COLD else "-O3", *COMPILE_ARGS],
        libraries=["pthread", "rt"],
    )


def native(names_apart: bool) -> list[Extension]:
    """The extensions in C: those that keep their own copy of Cython's shared code, or all others."""
    sources = sorted(path.relative_to(ROOT) for folder in ("sim", "broker", "client")
                     for path in ROOT.glob(f"{folder}/**/*.pyx"))
    wanted = [extension(name, str(source)) for source in sources
              if ((name := ".".join(source.with_suffix("").parts)) in VIEWS_STRUCTS) == names_apart]
    if not names_apart:
        wanted.append(extension(SHARED_UTILITY, SHARED_UTILITY.replace(".", "/") + ".c"))
    return cythonize(
        wanted,
        nthreads=os.cpu_count() or 1,
        emit_linenums=True,
        shared_utility_qualified_name=None if names_apart else SHARED_UTILITY,
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
        },
    )


setup(
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
    ext_modules=[] if BUILT_ALREADY else [*native(names_apart=True), *native(names_apart=False)],
)
