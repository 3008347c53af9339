#!/bin/sh
# Make .venv with everything that requirements.txt pins, or say in one
# sentence why that cannot be done here. A second run finds nothing to do.
set -eu

stop() {
    echo "error: $1" >&2
    exit 1
}

# Python 3.11: $PYTHON if given, else the first one found
python=
for candidate in "${PYTHON:-}" python3.11 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c \
        'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
    then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || stop "Python 3.11 is needed (MXNet 1.9.1 and NumPy 1.23 \
run on no newer one); install it, or name it: make PYTHON=/path/to/python3.11"

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

# Keep an environment that is whole, of this Python and made in this folder
[ "$(cat .venv/.ready 2>/dev/null || pwd)" = "$(pwd)" ] &&
    .venv/bin/python -c 'import pip, sys
sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
    "$python" -m venv --clear .venv 2>/dev/null || {
    rm -rf .venv
    stop "$python cannot make a virtual environment here; on Debian and \
Ubuntu it needs the package python3.11-venv"
}

echo "Installing the pinned packages into .venv (a minute or two) ..."
pip() {
    .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"
}
pip install --require-hashes --only-binary :all: -r requirements.txt ||
    stop "the packages of requirements.txt could not be installed (see above)"
pip install --no-deps --no-build-isolation --editable . && pip check ||
    stop "the package d2ltvm could not be installed (see above)"
pwd > .venv/.ready
