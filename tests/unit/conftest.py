"""Keeps torch to one thread: the test processes of one machine share its cores, and threads that wait for each other spin."""

import torch

torch.set_num_threads(1)
