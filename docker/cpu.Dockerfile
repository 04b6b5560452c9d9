# Tools, evaluation and small trainings on a CPU: docker build -f docker/cpu.Dockerfile -t megatron-rasft:cpu .    (docs/installation.md)
FROM python:3.12.12-slim-bookworm AS wheel
WORKDIR /opt/megatron_rasft
COPY pyproject.toml setup.py README.md LICENSE pretrain_rasft.py ./
COPY megatron_rasft megatron_rasft
COPY tools tools
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /opt/wheels .

FROM python:3.12.12-slim-bookworm
# torch compiles the fused functions of Megatron with a C++ compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /opt/wheels /opt/wheels
# This index has builds of torch without CUDA. PyPI's are 4 GB larger.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "$(echo /opt/wheels/megatron_rasft-*.whl)[convert,report]"
RUN rasft-train --help > /dev/null && rasft-plan --help > /dev/null

WORKDIR /workspace
CMD ["rasft-train", "--help"]
