# make book | test | test-browser | clean      The virtual environment is made on first use.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
READY  := $(VENV)/.ready
RUN    := $(VENV)/bin/python -m rsparse

.PHONY: book test test-browser clean

book: $(READY)
	$(RUN) run --preset tiny
	$(RUN) build --run _runs/tiny

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# HTML=folder checks a book that is already built; otherwise the published pages are built first.
test-browser: $(READY)
	@command -v chromium >/dev/null || $(if $(filter 0,$(shell id -u)),,sudo) sh -c \
	  'apt-get update -q && apt-get install -y -q --no-install-recommends chromium'
	BOOK_HTML=$(HTML) $(VENV)/bin/python -m pytest -m browser tests/test_browser.py

$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	$(VENV)/bin/python -m pip install -q --no-deps -e .
	touch $(READY)

clean:
	rm -rf $(VENV) _build _runs book/_build *.egg-info
