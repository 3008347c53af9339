#!/bin/sh
# Make .venv-bench: the packages of .venv, and beside them what the extra
# `bench` of pyproject.toml asks for. They are kept apart because TVM, where it
# finds PyTorch, loads it too. If that cannot be done here, say so in one
# sentence; the benchmarks run with what there is.
set -eu

folder=.venv-bench
stop() {
    rm -rf "$folder"
    echo "warning: $1; the benchmarks run without the engines of" \
        "benchmarks/requirements.txt" >&2
    exit 0
}
pip() {
    "$folder/bin/python" -m pip --disable-pip-version-check --quiet install \
        --only-binary :all: "$@"
}

.venv/bin/python -m venv --clear "$folder" 2>/dev/null ||
    stop "a second virtual environment cannot be made here"
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
.venv/bin/python -c "$packages" > "$("$folder/bin/python" -c \
    "$packages")/those_of_the_book.pth"
echo "Installing the engines to compare with into $folder (some minutes) ..."
pip --no-deps --require-hashes -r benchmarks/requirements.txt ||
    stop "its packages could not be installed (see above)"
# PyTorch has no hash: pip takes the build for a CPU or for CUDA, as it is
# configured here, with the libraries that this build needs
pip "$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)" ||
    echo "warning: PyTorch could not be installed (see above)" >&2
cp benchmarks/requirements.txt "$folder/.ready"
