# make setup: .venv, which all others set up first.   make test: the tests.
# make demo: the whole method on the toy world.   make voc V=...: the method on VOC 2012, for a GPU.
# Both continue where they were interrupted.
PYTHON ?= python3
OUT ?= runs/$(or $(filter voc,$(MAKECMDGOALS)),toy)
SEED ?= 0

# What may be set on the command line; for voc also OFFICIAL= (WeakTr's CAM checkpoint), CLIP=, VIT=
# (names or files) and, for a trial, STEPS=, BATCH=, PHOTOS=
MAY = PYTHON $(if $(filter demo voc,$(MAKECMDGOALS)),OUT SEED STEPS BATCH) \
    $(if $(filter voc,$(MAKECMDGOALS)),V OFFICIAL CLIP VIT PHOTOS)
SET = $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
$(if $(filter-out $(MAY),$(SET)),$(error $(filter-out $(MAY),$(SET))= is no variable of this target, which takes $(strip $(MAY))))

.PHONY: setup demo voc test

setup: .venv/ready

.venv/ready: requirements.txt experiments/requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --upgrade pip
	.venv/bin/python -m pip install -r requirements.txt -r experiments/requirements.txt
	touch $@

.venv/ready-tests: .venv/ready tests/requirements.txt
	.venv/bin/python -m pip install -r tests/requirements.txt
	touch $@

DEMO = .venv/bin/python experiments/demo.py --out $(OUT) --seed $(SEED) \
    $(if $(STEPS),--steps $(STEPS)) $(if $(BATCH),--batch $(BATCH))

demo: .venv/ready
	$(DEMO)

voc: .venv/ready
	$(DEMO) --voc $(or $(V),$(error pass V=PATH/VOCdevkit/VOC2012)) \
	    $(if $(OFFICIAL),--official $(OFFICIAL)) $(if $(CLIP),--clip $(CLIP)) \
	    $(if $(VIT),--vit $(VIT)) $(if $(PHOTOS),--photos $(PHOTOS))

test: .venv/ready-tests
	.venv/bin/python -m pytest tests
