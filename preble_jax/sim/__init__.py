"""Discrete-event simulation of a cluster, over the production schedulers and page bookkeeping."""
