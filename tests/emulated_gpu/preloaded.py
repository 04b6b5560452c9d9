"""What the process on the emulated machine imports from which ranks are forked. Its environment has made it one already."""

import tests.preloaded  # noqa: F401
