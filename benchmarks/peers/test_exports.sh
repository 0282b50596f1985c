#!/bin/sh
# The tests of exporters whose tools are too heavy for the normal session, each with the real tool in an environment of its own:
# benchmarks/peers/test_exports.sh [TOOL...]. Environments are built once, with PYTHON, and kept in benchmarks/cache/peers/.
# A tool that declares another PyTorch stands in no-deps.txt, what it needs beside PyTorch in requirements.txt.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
for tool in ${*:-gptqmodel autoround modelopt nncf quanto bitsandbytes executorch aimet mct llmcompressor}; do
    venv=benchmarks/cache/peers/$tool
    if [ ! -e "$venv/tests-ready" ]; then
        [ -e "$venv/bin/python" ] || "$here/build.sh" "$tool"
        "$venv/bin/python" -m pip install --quiet pytest numpy setuptools
        if [ -e "$here/$tool/no-deps.txt" ]; then
            "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --requirement "$here/$tool/no-deps.txt"
        fi
        touch "$venv/tests-ready"
    fi
    settings=
    case $tool in
        gptqmodel)
            tests=tests/export/tools/test_gptqmodel.py
            settings="GPTQMODEL_CPU_WORKERS=3 TORCHDYNAMO_DISABLE=1"  # on two cores it asks for a third worker
            ;;
        llmcompressor) tests=tests/export/tools/test_llm_compressor.py ;;
        autoround) tests=tests/export/tools/test_auto_round.py ;;
        modelopt) tests="tests/export/tools/test_modelopt.py tests/imports/test_modelopt.py" ;;
        *) tests=tests/export/tools/test_$tool.py ;;
    esac
    echo "$tool"
    report=$(env $settings "$venv/bin/python" -m pytest -q -rs -p no:cacheprovider $tests) || { echo "$report"; exit 1; }
    echo "$report" | tail -1
    case $report in *skipped*) echo "$report"; echo "$tool: nothing may be skipped here"; exit 1 ;; esac
done
