# shellcheck shell=bash disable=SC2034
# Qwen2.5-Math-7B: one node trains, one serves. SERVER_NODES=0: one node does both.
TRAINER_NODES=1 SERVER_NODES=${SERVER_NODES:-1}
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=8 SERVER_TP=1
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(--config examples/recipes/qwen2.5-math-7b.toml)  # of pretrain_rasft.py, from the checkout
