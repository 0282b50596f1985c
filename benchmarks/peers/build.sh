#!/bin/sh
# Builds environments of other tools in benchmarks/cache/peers/: benchmarks/peers/build.sh TOOL...
# PYTHON is the interpreter that runs benchmarks/plans.py. What would replace PyTorch by another build stands in first.txt, and is
# installed without its dependencies.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
for tool in "$@"; do
    venv=$here/../cache/peers/$tool
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet torch==2.13.0
    if [ -e "$here/$tool/first.txt" ]; then
        "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$here/$tool/first.txt"
    fi
    "$venv/bin/python" -m pip install --quiet --requirement "$here/$tool/requirements.txt"
done
