# make align   align an embedded model to a reward and look at it (no GPU, a few minutes; MODEL=tiny, tiny-wan, tiny-i2v)
# make test    run every test (WORKERS=4: in four processes; default: one for each core)
# make lab     open the notebooks in JupyterLab
# make app     the playground as a page of controls, without code
# make recipes run the recipes of the embedded models again and store what they reached (RECIPES=tiny: one of them)
# make notebooks  run the notebooks and store what they show
# make notebooks REPOSITORY=owner/name  write the name of your repository into badges and install lines, and run nothing
# make html    render the notebooks into runs/html, to read in a browser
# make zoo     train the tiny models again (hours on two cores)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= tiny
NAME ?= $(MODEL)-$(shell date +%Y%m%d-%H%M%S)
WORKERS ?= auto
export TOKENIZERS_PARALLELISM := false

.PHONY: align test lab app recipes notebooks html zoo lint clean

align: $(VENV)/installed
	$(BIN)/vader-nb align $(if $(filter tiny-%,$(MODEL)),config,model)=$(MODEL) name=$(NAME)

# The browser that the tests click in: Debian's, installed where it is missing and that is allowed.
CHROMIUM := /usr/bin/chromium

$(CHROMIUM):
	apt-get update -q && apt-get install -y -q --no-install-recommends chromium

test: $(VENV)/installed-test | $(CHROMIUM)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

lab: $(VENV)/installed-lab
	$(BIN)/jupyter lab notebooks $(if $(filter 0,$(shell id -u)),--allow-root)  # in a container one is often root

app: $(VENV)/installed-lab
	$(BIN)/pip install -q -e '.[app]'
	$(BIN)/python notebooks/build.py --app runs/app/playground.ipynb
	$(BIN)/voila runs/app/playground.ipynb

notebooks: $(VENV)/installed-test
	$(BIN)/python notebooks/build.py $(if $(REPOSITORY),--repository $(REPOSITORY))

recipes: $(VENV)/installed-test
	$(BIN)/python -m tests.recipes $(RECIPES)

html: $(VENV)/installed-test
	$(BIN)/jupyter nbconvert --to html --output-dir runs/html notebooks/*.ipynb
	$(BIN)/python notebooks/build.py --contents runs/html

zoo: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m vader_nb.zoo.scripts.train_vae
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m vader_nb.zoo.scripts.train_generator
	$(BIN)/python -m vader_nb.zoo.scripts.train_clip
	$(BIN)/python -m vader_nb.zoo.scripts.train_videomae
	for stage in data image_encoder vae decoder generator generator_again; do \
		$(BIN)/python -m vader_nb.zoo.scripts.train_i2v $$stage || exit 1; done
	for stage in frames clips generator colors; do \
		OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m vader_nb.zoo.scripts.train_wan $$stage || exit 1; done
	$(BIN)/python -m vader_nb.zoo.scripts.cards
	$(BIN)/python -m vader_nb.zoo.scripts.train_adapters

lint: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/installed-lab: $(VENV)/installed
	$(BIN)/pip install -q -e '.[notebook]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
