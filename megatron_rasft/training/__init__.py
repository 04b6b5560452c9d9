"""One run from start to end: joins the other packages to each other and to Megatron's training."""

import megatron_rasft.machine  # noqa: F401 # must come before the first import of Megatron
