PYTHON ?= python3
BIN := .venv/bin
PICTURE := checkpoints/tiny-fuyu/shapes.png
MINUTES := 1
SEED := 0
CAPTION := Generate a coco-style caption.

.PHONY: run test proof pairs ecosystem versions fuzz bench kits notebooks docs slides lint clean findings

# Make .venv, install what is pinned and the `decoders` command, tell a story with every model.
run: .venv/run
	$(BIN)/decoders generate checkpoints/tiny-gpt-neo "Once upon a time"
	$(BIN)/decoders generate checkpoints/tiny-openai-gpt "Once upon a time"
	$(BIN)/decoders generate checkpoints/tiny-phi --chat "Tell me a story about Nora and an owl."
	printf '%s\n' "Tell me a story about Tom and a fox." "What did Tom take everywhere?" | $(BIN)/decoders chat checkpoints/tiny-phi3
	$(BIN)/decoders generate checkpoints/tiny-persimmon --chat "Tell me a story about Zoe and a bear."
	$(BIN)/decoders generate checkpoints/tiny-fuyu "$(CAPTION)" --image $(PICTURE)
	$(BIN)/decoders generate checkpoints/tiny-fuyu "where is the red circle?" --image $(PICTURE) --draw answer.png

# Parity with Transformers, properties, broken folders, the command line.
test: .venv/test
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=10 -m "not ecosystem and not proof and not pairs"

# Every mistake that compare knows, planted into our files and named by it; and what draws thousands of texts.
proof: .venv/test
	$(BIN)/python -m pytest -n auto --dist worksteal -m proof

# Every fifth pair of mistakes, and every number of a mistake, drawn three times: more than an hour.
pairs: .venv/test
	$(BIN)/python -m pytest -n auto --dist worksteal -m pairs

# Compilers, ONNX, torchao, Trainer, accelerate, peft, several processes: heavy to install, or long.
ecosystem: .venv/ecosystem
	$(BIN)/python -m pytest -n auto --dist worksteal -m ecosystem

# Strings, damaged folders and killed writers for as long as you like: make fuzz MINUTES=60 SEED=3
fuzz: .venv/test
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

# Ours against Transformers on this machine; the table goes into README.md.
bench: .venv/test
	$(BIN)/python -m bench --write

# The kits of kits/ anew, one for each family: for porters who have no Python.
kits: .venv/run
	$(BIN)/python -m examples.kits

# The notebooks of notebooks/ anew, out of the .py beside each, with their outputs.
notebooks: .venv/ecosystem
	$(BIN)/python -m notebooks

# The pages of docs/ and a reference from docstrings as a site: out/site/index.html, with search, without network.
docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -q -d out/.doctrees -c docs/site docs out/site

# The reading guide as slides: out/slides.html.
slides: .venv/docs
	$(BIN)/python -m examples.slides

# Surprises of other libraries: every script of findings/, each in an environment of its own; half an hour.
findings: .venv/run
	$(BIN)/python -m findings

# The tests of whoever else's versions matter, with each of them; the table goes into docs/versions.md.
versions: .venv/ecosystem
	$(BIN)/python -m tests.matrix --write

# Style, and types of what users read and call: pyproject.toml lists the files.
lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Forget the environment and the caches.
clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/run: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

.venv/docs: requirements-docs.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

.venv/test: requirements.txt requirements-test.txt pyproject.toml .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt -e '.[test]'
	touch $@

.venv/ecosystem: requirements-ecosystem.txt requirements-docs.txt .venv/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-ecosystem.txt -e '.[ecosystem]'
	touch $@
