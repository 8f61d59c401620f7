"""Config files, one a deployment. Each has a get_config() and is read by `preble_jax.config_files`, never imported."""
