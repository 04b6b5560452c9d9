#!/usr/bin/env bash
# tools/install_emulated_gpu.sh
#
# Fetches the Python files of Transformer Engine for the tests of tests/emulated_gpu into .cache/transformer_engine-VERSION; a
# finished folder is left alone. Only the 1 MB wheel with the Python files is needed: the tests put their own kernels in the place
# of the compiled ones. The environment (VENV) is not changed. pip asks whichever index it is configured for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
VERSION=2.20.2
PACKAGES=("transformer_engine==$VERSION" einops==0.8.2)
FOLDER=".cache/transformer_engine-$VERSION"

# The stamp says what was asked for; a folder without it is unfinished and made again.
if [ "$(cat "$FOLDER/.installed" 2>/dev/null)" != "${PACKAGES[*]}" ]; then
    echo "installing ${PACKAGES[*]} into $FOLDER"
    rm -rf "$FOLDER"
    "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$FOLDER" "${PACKAGES[@]}"
    echo "${PACKAGES[*]}" >"$FOLDER/.installed"
fi
