"""Joins the rooms to Megatron: the only room that imports megatron.training."""
