"""The numbers of the cost models, as JSON: `preble_jax.sim.cost.catalogue` reads them."""
