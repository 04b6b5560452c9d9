"""Libraries behind the commands in ``tools/``. A run imports none of them."""
