# make demo: the whole method on the toy world.   make test: the tests.   Both set up .venv first.
PYTHON ?= python3
OUT ?= runs/toy
SEED ?= 0

.PHONY: demo test clean

.venv/ready: requirements.txt experiments/requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --upgrade pip
	.venv/bin/python -m pip install -r requirements.txt -r experiments/requirements.txt
	touch $@

.venv/ready-tests: .venv/ready tests/requirements.txt
	.venv/bin/python -m pip install -r tests/requirements.txt
	touch $@

demo: .venv/ready
	.venv/bin/python experiments/demo.py --out $(OUT) --seed $(SEED)

test: .venv/ready-tests
	.venv/bin/python -m pytest tests

clean:
	rm -rf .venv runs
