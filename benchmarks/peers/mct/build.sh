#!/bin/sh
# Builds the environment of the runner beside this file; PYTHON is the interpreter that runs benchmarks/plans.py.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/../../cache/peers/$(basename "$here")
"${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0
"$venv/bin/python" -m pip install --quiet --no-deps torchvision==0.28.0  # its dependencies would replace torch
"$venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
