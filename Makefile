# make demo        the whole pipeline on a laptop: data, concept model, SAE, NTP, CoCoMix, table, plot,
#                  concept report, steering
# make ablations   every baseline and ablation of the paper at the demo's size: about an hour
#                  and a half on 2 cores; run it again to resume
# make books       the comparison on books (BOOKS=their folder; SIZE=cpu: hours, cpu-long: half a day,
#                  gpu: minutes); run it again to resume
# make test        ruff and the tests: about 3 minutes after the install
# make test-all    also the slow tests (kills, soaks, comparisons with other libraries)
PYTHON ?= python3
PY := .venv/bin/python

demo: .venv/installed
	$(PY) demo.py

ablations: .venv/installed
	$(PY) results/run.py results/stdlib-ablations

books: .venv/installed
	$(PY) results/run.py results/books-$(if $(filter gpu,$(SIZE)),h200,$(or $(SIZE),cpu))

test: .venv/ruff
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests -m "not slow"

test-all: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/ruff: .venv/installed
	$(PY) -m pip install -q ruff
	touch $@

.venv/installed-test: .venv/ruff requirements-test.txt
	$(PY) -m pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf out/stdlib data/stdlib/*.bin data/stdlib/meta.json

.PHONY: demo ablations books test test-all clean
