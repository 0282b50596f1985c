#!/bin/sh
# The suite with other versions than those of requirements.txt: tests/versions.sh KIND [PYTEST ARGUMENTS]
#
#   alone     the wheel and nothing else: every public module is imported, and a small search run
#   newest    the newest versions that pyproject.toml allows, all extras included
#   lowest    the lowest versions that it declares
#   torchless whatever needs no PyTorch, for a PYTHON that it has no build for
#
# PYTHON is the interpreter, TORCH the version of PyTorch. On Linux only some versions have a build without CUDA on the default
# index; name another index in PIP_EXTRA_INDEX_URL to go down to the lowest that is declared.
set -eu
cd "$(dirname "$0")/.."
kind=$1
shift
folder=${TMPDIR:-/var/tmp}/mpsearch-$kind
rm -rf "$folder" build
"${PYTHON:-python3}" -m venv "$folder"
bin=$folder/bin
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
"$bin/python" -m pip install --quiet build
"$bin/python" -m build --wheel --outdir "$folder" . >/dev/null
wheel=$(echo "$folder"/*.whl)
requirements() { "$bin/python" tests/requirements.py "$@"; }
if [ "$kind" = torchless ]; then
    requirements newest | grep -v '^torch' >"$folder/wanted.txt"
    "$bin/python" -m pip install --quiet --requirement "$folder/wanted.txt" pytest
    "$bin/python" -m pip install --quiet --no-deps "$wheel"
    cp -r tests "$folder/tests"
    cd "$folder"
    exec bin/python -m pytest -q --import-mode=importlib --confcutdir=tests/solvers tests/solvers -m "not slow" "$@"
fi
"$bin/python" -m pip install --quiet "torch==${TORCH:-2.13.0}"
case $kind in
    alone)
        "$bin/python" -m pip install --quiet "$wheel"
        cd "$folder"
        exec bin/python "$OLDPWD/tests/alone.py"
        ;;
    newest) "$bin/python" -m pip install --quiet "$wheel[all,test]" ;;
    lowest)
        requirements lowest all test | grep -v '^torch==' >"$folder/lowest.txt"
        "$bin/python" -m pip install --quiet --constraint "$folder/lowest.txt" "$wheel[all,test]"
        ;;
    *)
        sed -n 's/^# \{0,1\}//; 2,10p' "$0"
        exit 2
        ;;
esac
"$bin/python" -m pip list | grep -iE "^(torch|numpy|scipy|pandas|matplotlib|pulp|highspy|optuna|transformers|onnxruntime) "
cp -r tests "$folder/tests"
cd "$folder"
bin/python -m pytest -q --import-mode=importlib -n 2 --dist worksteal -m "not slow" tests "$@"
