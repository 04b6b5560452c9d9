"""Demonstrations on disk -> token ids, and token counts -> balanced micro-batches.

reading.py names every row that cannot be used, tokenizing.py makes demonstrations of the others, packing.py
shares sequences out to data-parallel ranks, inspecting.py shows what is trained on.
"""
