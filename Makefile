# make demo   the whole pipeline on a laptop: data, concept model, SAE, NTP, CoCoMix, table, picture, report, steering
# make ablations   every baseline and ablation of the paper at the demo's size: about an hour on 2 cores; a second call goes on
# make books  the comparison on books (BOOKS=folder of them, SIZE=cpu or gpu): hours on a CPU; a second call goes on
# make test   the tests, about 3 minutes after the install
PYTHON ?= python3
PY := .venv/bin/python

demo: .venv/installed
	$(PY) data/stdlib/prepare.py
	$(PY) train.py config/stdlib_gpt.py --resume
	$(PY) sae.py config/stdlib_sae.py --resume
	$(PY) train.py config/stdlib_ntp.py --resume
	$(PY) train.py config/stdlib_cocomix.py --resume
	$(PY) eval.py out/stdlib/ntp out/stdlib/cocomix --plot=out/stdlib/curves.png
	$(PY) concepts.py out/stdlib/cocomix --tokens=200_000 --top=10
	$(PY) sample.py out/stdlib/cocomix --steer --start="    def __init__(self" --max_new_tokens=60

ablations: .venv/installed
	$(PY) results/run.py results/stdlib-ablations

books: .venv/installed
	$(PY) results/run.py results/books-$(if $(filter gpu,$(SIZE)),h200,cpu)

test: .venv/installed
	$(PY) -m pytest -q tests -m "not slow"

test-all: .venv/installed-test
	$(PY) -m pytest -q tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(PY) -m pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf out/stdlib data/stdlib/*.bin data/stdlib/meta.json

.PHONY: demo ablations books test test-all clean
