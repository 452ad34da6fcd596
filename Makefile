PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test bench lint clean

# Make .venv, install what is pinned, tell a story with every model.
run: .venv/run
	$(BIN)/python -m decoders generate checkpoints/tiny-gpt-neo "Once upon a time"
	$(BIN)/python -m decoders generate checkpoints/tiny-openai-gpt "Once upon a time"
	$(BIN)/python -m decoders generate checkpoints/tiny-phi --chat "Tell me a story about Nora and an owl."

# Everything: parity with Transformers, properties, broken folders, the command line.
test: .venv/test
	$(BIN)/python -m pytest -n auto

# Ours against Transformers on this machine; the table goes into README.md.
bench: .venv/test
	$(BIN)/python -m bench --write

# Style.
lint: .venv/test
	$(BIN)/ruff check .

# Forget the environment and the caches.
clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements.txt requirements-test.txt pyproject.toml .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt -e '.[test]'
	touch $@
