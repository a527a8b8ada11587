"""Damaged and hostile inputs, made from a seed, against every reader of files."""
