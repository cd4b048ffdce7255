# Each target sets up the virtual environment that it needs; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
# optional dependencies to install with the package, e.g. EXTRAS=scrublet
EXTRAS ?=
WORKERS ?= 2
PYTEST_ARGS ?=
# optional input of the demo: DATA=file.h5ad PERTURBATION=column CONTROL=label LAYER=layer ARTIFACT=column
DATA ?=
PERTURBATION ?=
CONTROL ?=
LAYER ?=
ARTIFACT ?=

export MPLBACKEND = Agg

run = $(VENV)/bin/python
package = -e ".$(if $(EXTRAS),[$(EXTRAS)])"
sources = pyproject.toml constraints.txt constraints-latest.txt
# the pinned set belongs to the interpreter of the environment
install = $(run) -m pip install -qq -c $$($(run) -c \
	'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-latest.txt")')

.PHONY: help demo test test-latest lint docs clean

help:
	@echo "make demo         QC, training, generation and evaluation (DATA=file.h5ad PERTURBATION=column CONTROL=label)"
	@echo "make test         the test suite"
	@echo "make test-latest  the test suite on the newest Python found (3.13 or 3.12)"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the documentation, into docs/_build/html"
	@echo "make clean        remove environments and build products"

demo: $(VENV)/.package
	$(run) -m scvi_cradle.benchmark.demo $(if $(DATA),--data "$(DATA)") \
		$(if $(PERTURBATION),--perturbation-key "$(PERTURBATION)") $(if $(CONTROL),--control "$(CONTROL)") \
		$(if $(LAYER),--layer "$(LAYER)") $(if $(ARTIFACT),--artifact-key "$(ARTIFACT)")

# one thread a worker: more would only compete for the same cores (numba also sets the threads of torch)
test: $(VENV)/.test
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(run) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-latest:
	@python=$$(sh .ci/find_python 3.13 3.12); \
	if [ -z "$$python" ]; then \
		echo "test-latest: skipped, no working Python 3.13 or 3.12 was found"; \
	else \
		echo "test-latest: $$python"; \
		$(MAKE) --no-print-directory test PYTHON="$$python" VENV=.venv-latest; \
	fi

lint: $(VENV)/.lint
	$(run) -m ruff check
	$(run) -m ruff format --check
	$(run) -m mypy

docs:
	@$(MAKE) --no-print-directory docs-html VENV=.venv-docs

.PHONY: docs-html
# from scratch: an unchanged page would not repeat its warnings, and a page of a removed name would stay
docs-html: $(VENV)/.doc
	rm -rf docs/_build docs/api/generated
	$(run) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "the documentation is in docs/_build/html/index.html"

clean:
	rm -rf .venv .venv-latest .venv-docs build dist docs/_build docs/api/generated \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " \
		+ sys.version.split()[0] + ": name another with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(run) -m pip install -qq --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.package: $(sources) | $(VENV)/.created
	@echo "installing scvi_cradle and its dependencies into $(VENV): some minutes the first time"
	$(install) $(package)
	@touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.doc: $(VENV)/.%: $(VENV)/.package
	$(install) --group $*
	@touch $@
