"""Measures fastorgan, or any program with its output files, by the rules of the FLARE challenges."""
