"""Reads and tokenizes demonstrations, and packs sequences into micro-batches.

reading.py parses rows and reports those that cannot be used. tokenizing.py turns rows into demonstrations.
tokenized_rows.py keeps these in memory-mapped files, which row_cache.py finds again in later runs. packing.py assigns
sequences to data-parallel ranks. sample_arrays.py holds the samples of training steps.
"""
