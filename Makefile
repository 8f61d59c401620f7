# Everything starts from a plain Python (>= 3.11); the environment lives in .venv and is rebuilt when the dependencies change.
# make demo | serve | chat | test | aot | lint | format | clean      choose another Python: make demo PYTHON=/path/to/python3.12

PYTHON ?=
STAMP := .venv/.installed
ARGS ?=

.PHONY: help demo serve chat test aot libtpu lint format venv clean

help:
	@echo "make demo    two CPU device groups serve 24 prefix-sharing requests, then stop (ARGS=... is passed on)"
	@echo "make serve   the same cluster, kept up until Ctrl-C"
	@echo "make chat    talk to the cluster that make serve keeps up"
	@echo "make test    the whole test suite            make lint    style and types"
	@echo "make aot     compile the attention kernels for TPUs, here: VMEM and HBM of each (ARGS=... is passed on)"
	@echo "make format  rewrite to the project's style  make venv    only make .venv and install"
	@echo "make clean   remove .venv and caches (the model cache stays)"

demo: $(STAMP)
	.venv/bin/preble-jax demo $(ARGS)

serve: $(STAMP)
	.venv/bin/preble-jax serve $(ARGS)

chat: $(STAMP)
	.venv/bin/preble-jax chat $(ARGS)

test: $(STAMP) libtpu
	scripts/test $(ARGS)

aot: $(STAMP) libtpu
	.venv/bin/python -m kernels_pallas.aot $(ARGS)

# The TPU compiler (200 MB), which needs no TPU. Where pip has none for this platform it says so and goes on.
libtpu: $(STAMP)
	@scripts/setup_libtpu

lint: $(STAMP)
	scripts/check

format: $(STAMP)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" scripts/setup
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
