# shellcheck shell=bash disable=SC2034
# Qwen3-30B-A3B, a mixture of 128 experts over 8 GPUs: two nodes train, two serve.
TRAINER_NODES=2 SERVER_NODES=2
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=8 SERVER_TP=1
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(--config examples/recipes/qwen3-30b-a3b.toml)  # of pretrain_rasft.py, from the checkout
