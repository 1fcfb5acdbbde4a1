#!/usr/bin/env bash
# Makes the checkout ready to run: .venv, dependencies, native build. Quiet and quick when nothing has changed.
# Call it, or source it: it leaves the shell's options alone, and sets CXLMQ_ROOT and CXLMQ_PYTHON.
#
#   CXLMQ_BOOTSTRAP_PYTHON   the Python to make .venv with (default: the first of at least 3.11 on the PATH)
#   CC                       the C compiler (default: cc, gcc or clang)
#   CXLMQ_EXTRAS             what is installed beside the product (default: plots; the scripts of tests and lint add dev)

CXLMQ_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CXLMQ_PYTHON="$CXLMQ_ROOT/.venv/bin/python"
# What was asked for once stays: the scripts ask for different extras, and share one environment.
CXLMQ_EXTRAS="$({ echo "${CXLMQ_EXTRAS:-plots}"; cat "$CXLMQ_ROOT/.venv/cxlmq-extras" 2>/dev/null || true; } |
    tr , '\n' | LC_ALL=C sort -u | paste -sd ,)"

CXLMQ_PYTHON_CHECK='
import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'

cxlmq_find_python() {
    local candidate path
    for candidate in "${CXLMQ_BOOTSTRAP_PYTHON:-python3}" python3 python3.14 python3.13 python3.12 python3.11; do
        path="$(command -v "$candidate")" || continue
        if "$path" -c "$CXLMQ_PYTHON_CHECK" 2>/dev/null; then
            echo "$path"
            return 0
        fi
    done
    echo "cxlmq: no Python >= 3.11 with venv and its headers found." \
         "Install python3.11 (or newer), python3-venv and python3-dev, or set CXLMQ_BOOTSTRAP_PYTHON to one." >&2
    return 1
}

cxlmq_find_compiler() {
    local candidate
    # CC may hold arguments ("ccache gcc"): the first word must be a command.
    for candidate in "${CC:-cc}" gcc clang; do
        if command -v "${candidate%% *}" >/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "cxlmq: no C compiler found. Install gcc or clang (on Debian and Ubuntu: apt-get install gcc libc6-dev)," \
         "or set CC to one." >&2
    return 1
}

# The names of what pyproject.toml wants, with the extras that were asked for.
CXLMQ_REQUIREMENTS='
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join([*project["dependencies"], *(each for name in sys.argv[1].split(",") for each in extras[name])]))'

# Everything that an installed checkout depends on, in one hash.
cxlmq_stamp() {
    (
        cd "$CXLMQ_ROOT" || exit 1
        {
            echo "$CXLMQ_ROOT"      # a checkout that was moved has an environment that points elsewhere
            echo "$CXLMQ_EXTRAS"
            find pyproject.toml setup.py sim broker client -type f \
                \( -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name setup.py -o -name pyproject.toml \) -print0 |
                LC_ALL=C sort -z | xargs -0 sha256sum
        } | sha256sum | cut -d' ' -f1
    )
}

cxlmq_is_ready() {
    [ -x "$CXLMQ_PYTHON" ] && [ "$(cat "$CXLMQ_ROOT/.venv/cxlmq-stamp" 2>/dev/null)" = "$1" ] && cxlmq_has_modules
}

# A checkout can lose its built modules (git clean) while .venv stays.
cxlmq_has_modules() {
    local source
    while IFS= read -r -d '' source; do
        compgen -G "${source%.pyx}.*.so" >/dev/null || return 1
    done < <(find "$CXLMQ_ROOT/sim" "$CXLMQ_ROOT/broker" "$CXLMQ_ROOT/client" -name '*.pyx' -print0)
}

# Runs a command silently; shows what it said only when it fails.
cxlmq_quietly() {
    local output status
    output="$("$@" 2>&1)" && return 0
    status=$?
    printf '\n%s\n' "$output" | tail -n 40 >&2
    echo "cxlmq: set-up failed at: $*" >&2
    return "$status"
}

# One line that moves until it is stopped; without a terminal, a line every ten seconds.
cxlmq_progress() {
    local began=$SECONDS steps done said=-10
    steps=$((2 * $(find sim broker client -name "*.pyx" | wc -l) + 2))      # each is translated, then compiled
    while kill -0 "$$" 2>/dev/null; do
        done="$(find sim broker client build \( -name '*.c' -o -name '*.o' \) -newer build/began 2>/dev/null | wc -l)"
        if [ -t 2 ]; then
            printf '\rcxlmq: setting up, once: step %d of %d, %d s ' "$done" "$steps" $((SECONDS - began)) >&2
        elif ((SECONDS - said >= 10)); then
            said=$SECONDS
            echo "cxlmq: setting up, once: step $done of $steps, $((SECONDS - began)) s" >&2
        fi
        sleep 0.5
    done
}

# Runs in a subshell of its own. The dependencies come over the network while the compiler has the processors.
cxlmq_install() {
    local python compiler wanted status=0
    progress='' installing=''           # of the whole subshell: its last words need them, when this has returned
    local install=("$CXLMQ_PYTHON" -m pip --disable-pip-version-check -q install --no-compile)
    compiler="$(cxlmq_find_compiler)" || return 1
    cd "$CXLMQ_ROOT" || return 1
    rm -f .venv/cxlmq-stamp
    mkdir -p build && touch build/began
    cxlmq_progress &
    progress=$!
    # Background commands do not hear Ctrl-C.
    trap 'kill $progress $installing 2>/dev/null; [ ! -t 2 ] || printf "\r\033[K" >&2' EXIT
    trap 'exit 130' INT TERM
    if ! "$CXLMQ_PYTHON" -m pip --version >/dev/null 2>&1; then
        python="$(cxlmq_find_python)" || return 1
        cxlmq_quietly "$python" -m venv --clear .venv || return 1
    fi
    wanted="$CXLMQ_EXTRAS $(sha256sum < pyproject.toml)"
    if [ "$(cat .venv/cxlmq-requirements 2>/dev/null)" != "$wanted" ]; then
        "$CXLMQ_PYTHON" -c "$CXLMQ_REQUIREMENTS" "$CXLMQ_EXTRAS" > .venv/cxlmq-wanted.txt || return 1
        cxlmq_quietly "${install[@]}" 'setuptools>=77' wheel 'cython>=3.1,<4' || return 1
        cxlmq_quietly "${install[@]}" -r .venv/cxlmq-wanted.txt &
        installing=$!
    fi
    CC="$compiler" cxlmq_quietly "$CXLMQ_PYTHON" setup.py -q build_ext --inplace || status=1
    [ -z "$installing" ] || wait "$installing" || status=1
    if [ "$status" = 0 ] && [ -n "$installing" ]; then
        # The native core is built: this makes the package and its command known, and compiles nothing.
        CXLMQ_NATIVE=built cxlmq_quietly "${install[@]}" --no-build-isolation --no-deps -e . || return 1
        echo "$CXLMQ_EXTRAS" > .venv/cxlmq-extras
        echo "$wanted" > .venv/cxlmq-requirements
    fi
    return "$status"
}

cxlmq_bootstrap() {
    local stamp
    stamp="$(cxlmq_stamp)" || return 1
    cxlmq_is_ready "$stamp" && return 0
    if [ ! -w "$CXLMQ_ROOT" ]; then
        echo "cxlmq: $CXLMQ_ROOT is not set up, and cannot be written: copy it to a folder of yours and run it there, or let" \
             "its owner run scripts/bootstrap.sh once." >&2
        return 1
    fi
    (
        # Two scripts started at once: the second waits, and then finds everything done.
        if command -v flock >/dev/null; then
            mkdir -p "$CXLMQ_ROOT/build" && exec 9>"$CXLMQ_ROOT/build/bootstrap.lock" || exit 1
            flock 9 || exit 1
        fi
        cxlmq_is_ready "$stamp" && exit 0
        (cxlmq_install 9>&-) && echo "$stamp" > "$CXLMQ_ROOT/.venv/cxlmq-stamp"
    )
}

cxlmq_bootstrap || { [ "${BASH_SOURCE[0]}" != "$0" ] && return 1; exit 1; }
