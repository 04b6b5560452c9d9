#!/usr/bin/env bash
# Installs, fetches the model and trains it on a CPU. Flags are passed to quickstart.py; see README.md in this folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

make --no-print-directory venv
python="${VENV:-.venv}/bin/python"
"$python" tools/fetch_smollm2.py --output .cache/smollm2-135m-instruct
exec "$python" -m examples.quickstart.quickstart --hf-model .cache/smollm2-135m-instruct "$@"
