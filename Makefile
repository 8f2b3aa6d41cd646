# make demo and make test need python3 (>= 3.10), venv and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A folder of local wheels that pip is configured with serves uv too.
export UV_FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
ifeq ($(strip $(UV_FIND_LINKS)),)
unexport UV_FIND_LINKS
endif

# One process for the tests that share a local Ray, one for all others.
SPREAD := --numprocesses 2 --dist loadgroup

.PHONY: install demo demo-t2i test test-all walk check benchmark benchmark-ddil docs soak secrets sbom bandit clean

# Compiled at once: a run on Ray starts a dozen processes, each of which would compile what it imports wherever
# PYTHONDONTWRITEBYTECODE is set, and at its first start elsewhere.
INTO_VENV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt

# What runs need, without the tools of development: for the nodes of a cluster. WITH names further packages.
install: | $(BIN)/uv
	$(INTO_VENV) ".[s3,transformers,lora,serve]" $(WITH)

demo: $(VENV)/.ok
	$(BIN)/ddil-ray demo

demo-t2i: $(VENV)/.ok
	$(BIN)/ddil-ray demo-t2i

test: $(VENV)/.ok
	$(BIN)/pytest $(SPREAD)

test-all: $(VENV)/.ok
	$(BIN)/pytest $(SPREAD) -m ""

# The pages for readers with a CPU, by copying what stands there.
walk: $(VENV)/.ok
	$(BIN)/pytest tests/docs/test_walk.py -m slow

check: $(VENV)/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Into site/, with warnings as errors.
docs: $(VENV)/.ok
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file docs/site/mkdocs.yml

benchmark: $(VENV)/.ok
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/suite.py
	$(BIN)/python benchmarks/tables.py

soak: $(VENV)/.ok
	$(BIN)/python tests/soak/soak.py

benchmark-ddil: $(VENV)/.ok
	$(BIN)/python benchmarks/ddil.py --out benchmarks/results/ddil.json

# No secret in what git knows; a false alarm's line says `pragma: allowlist secret`.
secrets: $(VENV)/.ok
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --disable-plugin Base64HighEntropyString --disable-plugin HexHighEntropyString

# Everything that is installed, as a CycloneDX bill of materials. The tool lives apart: with what it brings, jsonschema,
# and so Ray, parses a grammar of URIs in every process that starts.
sbom: $(VENV)/.ok
	$(BIN)/uv tool run --quiet --constraints constraints.txt --from cyclonedx-bom cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --output-file sbom.json

# Pickles (B301, B403) and loading of models (B615) have stricter rules of our own, in tests/security.
bandit: $(VENV)/.ok
	$(BIN)/bandit --quiet --recursive --severity-level medium --skip B301,B403,B615 ddil_ray cluster pipelines

$(BIN)/uv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(VENV)/.ok: pyproject.toml constraints.txt | $(BIN)/uv
	$(INTO_VENV) --editable ".[dev,s3]"
	touch $@

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
