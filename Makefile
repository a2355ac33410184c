# make align   align the embedded tiny model to a reward and look at it (no GPU, a few minutes)
# make test    run every test
# make lab     open the notebooks in JupyterLab
# make app     the playground as a page of controls, without code
# make notebooks  run the notebooks and store what they show
# make html    render the notebooks into runs/html, to read in a browser
# make zoo     train the tiny models again (hours on two cores)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NAME ?= tiny-$(shell date +%Y%m%d-%H%M%S)
export TOKENIZERS_PARALLELISM := false

.PHONY: align test test-package test-notebooks lab app notebooks html zoo lint clean

align: $(VENV)/installed
	$(BIN)/vader-nb align --name $(NAME)

# The browser that presses the controls: Debian's, installed where it is missing and may be.
CHROMIUM := /usr/bin/chromium

$(CHROMIUM):
	apt-get update -q && apt-get install -y -q --no-install-recommends chromium

test: $(VENV)/installed-test | $(CHROMIUM)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 test-package test-notebooks

# Side by side on two cores, with one thread each: much of both is waiting for imports.
test-package:
	$(BIN)/python -m pytest --ignore tests/test_browser.py

test-notebooks:
	$(BIN)/python -m pytest -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout 300 notebooks tests/test_browser.py

lab: $(VENV)/installed-lab
	$(BIN)/jupyter lab notebooks $(if $(filter 0,$(shell id -u)),--allow-root)  # in a container one is often root

app: $(VENV)/installed-lab
	$(BIN)/pip install -q -e '.[app]'
	$(BIN)/python notebooks/build.py --app runs/app/playground.ipynb
	$(BIN)/voila runs/app/playground.ipynb

notebooks: $(VENV)/installed-test
	$(BIN)/python notebooks/build.py

html: $(VENV)/installed-test
	$(BIN)/jupyter nbconvert --to html --output-dir runs/html notebooks/*.ipynb
	$(BIN)/python notebooks/build.py --contents runs/html

zoo: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m vader_nb.zoo.train_vae
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m vader_nb.zoo.train_generator
	$(BIN)/python -m vader_nb.zoo.train_clip
	$(BIN)/python -m vader_nb.zoo.train_videomae
	$(BIN)/python -m vader_nb.zoo.cards

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
