#!/usr/bin/env bash
# tools/install_servers.sh [VERSION...]
#
# Makes environments in which the real SGLang server runs without a GPU, one for each version: .venv-sglang-VERSION.
# What the versions have in common (torch, triton, the web server) is installed once, in .venv-sglang-base, and found from
# the others through a .pth file. With a Python 3.11 (PYTHON311 names it where it is not found) the servers have the torch
# they were tried with most; without one they run on the trainer's Python and torch. pip is the trainer's (VENV) and asks
# whichever index it is configured for. About 1 GB, and with Python 3.11 a torch more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
BASE=.venv-sglang-base
VERSIONS=("$@")
[ $# -gt 0 ] || VERSIONS=(0.5.17 0.5.23)

# What sglang's CPU path imports, found by adding what an import asked for: its own requirements would bring a CUDA
# torch and a gigabyte of kernels.
SHARED=(torch==2.13.0 triton transformers==5.12.1 xgrammar==0.2.1 requests orjson psutil pybase64 pillow IPython aiohttp
    msgspec 'pyzmq>=25.1.2' dill openai==2.6.1 partial_json_parser sentencepiece uvicorn uvloop fastapi einops
    compressed-tensors gguf setproctitle jsonschema soundfile==0.13.1 python-multipart)
declare -A OWN=(
    [0.5.17]=""
    [0.5.21]="xgrammar==0.2.7"
    [0.5.23]="xgrammar==0.2.7 transformers==5.19.0 tokenizers==0.23.2"
)

python311() {
    local candidate
    for candidate in "${PYTHON311:-}" python3.11 "${HOME:-}"/.pyenv/versions/3.11.*/bin/python3.11 /usr/bin/python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install() { # environment, pip's arguments. A server imports few of the files, and compiles those itself.
    local venv="$1"
    shift
    "$VENV/bin/python" -m pip --disable-pip-version-check --python "$venv/bin/python" install --quiet --no-compile "$@"
}

site_packages() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# An environment is finished when it holds this file, which says what was asked for; an unfinished one is made again.
is_finished() { [ "$(cat "$1/.installed" 2>/dev/null)" = "$2" ]; }

for version in "${VERSIONS[@]}"; do
    if [ -z "${OWN[$version]+known}" ]; then
        echo "install_servers: SGLang $version is not known here (known: ${!OWN[*]}): add what it needs to $0" >&2
        exit 2
    fi
done

TORCH=() # where it lies, if it is the trainer's
if ! PYTHON="$(python311)"; then
    echo "no Python 3.11 here: the servers run on the trainer's Python and torch"
    PYTHON="$VENV/bin/python"
    TORCH=("$(realpath "$(site_packages "$VENV")")")
    SHARED=("${SHARED[@]:2}") # all but torch and triton
fi
if ! is_finished "$BASE" "${SHARED[*]}"; then
    echo "installing what the servers share into $BASE"
    rm -rf "$BASE"
    "$PYTHON" -m venv --without-pip "$BASE"
    [ ${#TORCH[@]} = 0 ] || echo "${TORCH[0]}" >"$(site_packages "$BASE")/trainer.pth"
    install "$BASE" "${SHARED[@]}"
    install "$BASE" --no-deps torchvision==0.28.0
    echo "${SHARED[*]}" >"$BASE/.installed"
fi
for version in "${VERSIONS[@]}"; do
    venv=".venv-sglang-$version"
    wanted="${SHARED[*]} / ${OWN[$version]}"
    if ! is_finished "$venv" "$wanted"; then
        echo "installing SGLang $version into $venv"
        rm -rf "$venv"
        "$PYTHON" -m venv --without-pip "$venv"
        printf '%s\n' "$(realpath "$(site_packages "$BASE")")" "${TORCH[@]}" >"$(site_packages "$venv")/base.pth"
        # shellcheck disable=SC2086  # several requirements in one string
        install "$venv" --no-deps "sglang==$version" ${OWN[$version]}
        echo "$wanted" >"$venv/.installed"
    fi
done
