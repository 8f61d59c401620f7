"""The demonstration: a cluster, 24 streaming requests in three prefix families, and what came of them."""
