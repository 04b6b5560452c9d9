"""One run from start to end. It connects the other packages with each other and with Megatron's training."""

import megatron_rasft.machine  # noqa: F401 # must come before the first import of Megatron
