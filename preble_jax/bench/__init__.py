"""Measuring one engine: workloads, rounds over them, and the machine they ran on."""
