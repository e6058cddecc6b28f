# make demo: the whole method on the toy world.   make test: the tests.   make voc V=...: the method
# on VOC 2012, for a GPU.   All set up .venv first, and continue where they were interrupted.
PYTHON ?= python3
OUT ?= runs/toy
SEED ?= 0

.PHONY: demo voc test

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

# also OFFICIAL= (WeakTr's CAM checkpoint), CLIP=, VIT= (names or files), STEPS=, BATCH=
voc: OUT = runs/voc
voc: .venv/ready
	.venv/bin/python experiments/demo.py --voc $(or $(V),$(error pass V=PATH/VOCdevkit/VOC2012)) --out $(OUT) --seed $(SEED) \
	    $(if $(OFFICIAL),--official $(OFFICIAL)) $(if $(CLIP),--clip $(CLIP)) \
	    $(if $(VIT),--vit $(VIT)) $(if $(STEPS),--steps $(STEPS)) $(if $(BATCH),--batch $(BATCH))

test: .venv/ready-tests
	.venv/bin/python -m pytest tests
