#!/usr/bin/env bash
# From a fresh checkout to a trained model on a CPU; flags go to quickstart.py (see README.md beside this file).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

make --no-print-directory venv
python="${VENV:-.venv}/bin/python"
"$python" tools/fetch_smollm2.py --output .cache/smollm2-135m-instruct
exec "$python" -m examples.quickstart.quickstart --hf-model .cache/smollm2-135m-instruct "$@"
