"""Settings of all unit tests.

torch keeps to one thread: the test processes of one machine share its cores, and threads that wait for each other spin. hypothesis
tries the same examples in every run, and gives them as much time as a busy machine needs. Its defaults are 0.2 s and other examples
in every run.
"""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.load_profile("ci")
