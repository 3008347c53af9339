#!/bin/sh
# Make .venv-bench with what benchmarks/requirements.txt pins. If that cannot
# be done here, say so in one sentence; the benchmarks run with what there is.
set -eu

folder=.venv-bench
stop() {
    rm -rf "$folder"
    echo "warning: $1; the benchmarks run without the engines of" \
        "benchmarks/requirements.txt" >&2
    exit 0
}

.venv/bin/python -m venv --clear "$folder" 2>/dev/null ||
    stop "a second virtual environment cannot be made here"
echo "Installing the engines to compare with into $folder (some minutes) ..."
"$folder/bin/python" -m pip --disable-pip-version-check --quiet install \
    --only-binary :all: -r benchmarks/requirements.txt ||
    stop "its packages could not be installed (see above)"
cp benchmarks/requirements.txt "$folder/.ready"
