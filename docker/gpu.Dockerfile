# A trainer on NVIDIA GPUs: docker build -f docker/gpu.Dockerfile -t megatron-rasft:gpu .    (docs/installation.md)
FROM nvcr.io/nvidia/pytorch:26.06-py3

# The examples and scripts stay beside the installed package, because examples/slurm runs them from a checkout.
WORKDIR /opt/megatron_rasft
COPY pyproject.toml setup.py README.md LICENSE pretrain_rasft.py ./
COPY megatron_rasft megatron_rasft
COPY tools tools
COPY examples examples

# NVIDIA's builds of these packages fit the CUDA and NCCL of the image, so pip must keep them. The image's own constraints are
# replaced: they would keep older versions of all other packages too, such as transformers.
RUN pip list --format=freeze | grep -iE '^(torch|triton|pytorch-triton|numpy|transformer[-_]engine.*)==' > /opt/kept.txt
RUN PIP_CONSTRAINT=/opt/kept.txt pip install --no-cache-dir '.[convert,report,trackers]'
RUN pip list --format=freeze | grep -xFf /opt/kept.txt | cmp - /opt/kept.txt && rasft-plan --help > /dev/null

WORKDIR /workspace
CMD ["rasft-train", "--help"]
