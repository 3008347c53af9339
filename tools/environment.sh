#!/bin/sh
# Make .venv, or the folder $VENV, with everything that requirements.txt pins,
# or say in one sentence why that cannot be done here. A second run finds
# nothing to do.
set -eu
venv=${VENV:-.venv}

stop() {
    echo "error: $1" >&2
    exit 1
}

supported() {
    "$1" -c 'import sys
sys.exit(sys.implementation.name != "cpython"
         or not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# $PYTHON if given, else the newest that is found: on the path, in the folders
# of pyenv, or by uv
if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || stop "PYTHON=$PYTHON is not CPython 3.11, 3.12 or \
3.13; name one of these, or leave PYTHON out"
    python=$PYTHON
else
    python=
    for version in 3.13 3.12 3.11 3; do
        for candidate in "python$version" \
            "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python
        do
            if [ -z "$python" ] && supported "$candidate"; then
                python=$candidate
            fi
        done
    done
    if [ -z "$python" ] && command -v uv >/dev/null; then
        echo "Python 3.13 comes by uv ..."
        uv python install 3.13 && python=$(uv python find 3.13) &&
            supported "$python" ||
            stop "uv could not bring Python 3.13 (see above)"
    fi
    [ -n "$python" ] || stop "Python 3.11, 3.12 or 3.13 is needed; install \
one, or uv, which brings it, or name it: make PYTHON=/path/to/python3.13"
fi

# Keep an environment that is whole, and of this Python if one was named
same='import sys; print(sys.version, sys.base_prefix)'
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$(pwd)" ] &&
    supported "$venv/bin/python" && {
        [ -z "${PYTHON:-}" ] || [ "$("$python" -c "$same")" = \
            "$("$venv/bin/python" -c "$same")" ]
    }
then
    [ -n "$(find requirements.txt pyproject.toml tools/environment.sh \
        -newer "$venv/.ready")" ] || exit 0
else
    # The machines that MXNet 1.9.1 and TVM 0.27 both publish a wheel for
    "$python" -c '
import platform, sys
libc, version = platform.libc_ver()
sys.exit(sys.platform != "linux"
         or platform.machine() not in ("x86_64", "aarch64")
         or libc != "glibc"
         or [int(part) for part in version.split(".")[:2]] < [2, 28])' ||
        stop "MXNet 1.9.1 and TVM 0.27 have no common wheel for this machine \
($(uname -sm)); they need Linux on x86-64 or aarch64 with glibc 2.28 or later"
    "$python" -m venv --clear "$venv" 2>/dev/null || {
        rm -rf "$venv"
        stop "$python cannot make a virtual environment here; on Debian and \
Ubuntu the package python3-venv of its version is missing"
    }
fi

echo "Installing the pinned packages into $venv (a minute or two) ..."
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}
rm -f "$venv/.ready"
# --no-deps: the list is whole, and MXNet's metadata forbids its NumPy
pip install --no-deps --require-hashes --only-binary :all: \
    -r requirements.txt ||
    stop "the packages of requirements.txt could not be installed (see above)"
pip install --no-deps --no-build-isolation --editable . ||
    stop "the package d2ltvm could not be installed (see above)"
# What pip says of MXNet and d2l is known (see mxnet.txt)
complaints=$(pip check | grep -vE '^(mxnet 1\.9\.1|d2l 1\.0\.3) ' || true)
[ "$complaints" = "" ] || [ "$complaints" = "No broken requirements found." ] ||
    stop "the packages do not fit together: $complaints"
pwd > "$venv/.ready"
