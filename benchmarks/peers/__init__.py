"""Superpipeline beside the tools that do the same: one model, one process for each."""
