# dsvt_ros without a ROS installation: `make demo` and `make test` set up everything else themselves, in .venv.

PYTHON ?= python3
BIN := .venv/bin

# Test files are dealt out to processes in the order of their names: those of test/parity, which take long, come first.
ON_ALL_CORES := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# A Python that runs on ROS wheels marks its children; those of another environment must not see the mark.
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE

.DEFAULT_GOAL := help
.PHONY: help venv demo test parity lint clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 chooses another Python (3.10 or later)."

venv:  ## Create or update .venv
	@$(PYTHON) resource/environment/bootstrap.py

demo: venv  ## Detect objects in a simulated drive, through ROS where it exists: demo.png and demo_bag/
	@$(BIN)/dsvt demo

test: lint  ## Lint, check the types, run the tests
	$(BIN)/python -m pytest -m "not (ros or alone)" $(ON_ALL_CORES)
	$(BIN)/python -m pytest -m "ros or alone"
	@echo "Lint, types and tests passed."

parity: venv  ## Show how far every stage is from the published modules
	@PYTHONPATH=test $(BIN)/python test/reference.py

lint: venv  ## Lint and check the types
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## Remove .venv and everything generated
	rm -rf .venv build install log *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo.png demo_bag
