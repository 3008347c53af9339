# `make book` and `make test` do all the set-up themselves.
venv = $(or $(VENV),.venv)
ready = $(venv)/.ready
python = $(venv)/bin/python
peers = .venv-bench/.ready
# Matplotlib's list of fonts and its settings, apart from the user's own
export MPLCONFIGDIR = $(abspath $(venv))/matplotlib
# A relative folder must mean the same to the notebooks, which run in chapters/
ifdef D2LTVM_DATA
export D2LTVM_DATA := $(shell realpath -ms -- "$$D2LTVM_DATA")
endif
ifdef D2LTVM_PYODIDE
export D2LTVM_PYODIDE := $(shell realpath -ms -- "$$D2LTVM_PYODIDE")
endif
# A clone that was moved makes its environment anew
ifneq ($(shell cat $(ready) 2>/dev/null),$(CURDIR))
.PHONY: $(ready)
endif

.PHONY: book live pdf test short rendered unit digits fonts soak lock check package notebooks lab bench bench-keep shape clean
.DELETE_ON_ERROR:

book: package
	$(venv)/bin/jupyter-book build . --all -W -n --keep-going
	@echo "Open file://$(CURDIR)/_build/html/index.html"

live: book
	$(python) tools/live.py

pdf: package
	$(python) tools/pdf.py

# More processes than cores, since half of the time they wait; threads that
# wait do not spin, because others need the cores, and NumPy has one, for its
# own would. A file stays with one process, as a notebook must.
processes := $(shell echo $$(($$(nproc) * 2)))
pytest = OMP_WAIT_POLICY=passive TVM_THREAD_POOL_SPIN_COUNT=0 \
    OPENBLAS_NUM_THREADS=1 $(python) -m pytest -n $(processes) --maxprocesses 8 \
    --dist loadfile
nbval = --nbval --nbval-current-env --nbval-cell-timeout=800 \
    --nbval-sanitize-with tests/drawings.cfg \
    -p no:cacheprovider
# The book is rendered, on one core, while the tests run that need none
test: check fonts
	@$(MAKE) --no-print-directory --jobs 2 short rendered
	$(pytest) tests/browser

short:
	D2LTVM_SHORT=1 $(pytest) $(nbval) --no-loadscope-reorder chapters tests

rendered:
	$(venv)/bin/jupyter-book build . --all -W -n --keep-going -q

# The notebooks whose digits may come from a folder, a server, or nowhere
digits: $(ready) fonts
	D2LTVM_SHORT=1 $(pytest) $(nbval) $$(grep -lE \
	    '^ +"[^#]*\bload_(mnist|digits|clothes)\(' chapters/*.ipynb)

# Found once, with a word on it that no page shows
fonts: $(ready)
	@$(python) -W ignore -c 'import matplotlib.font_manager' 2>/dev/null

unit: $(ready)
	$(pytest)

# The same tests with far more cases, and those that take long
soak: export D2LTVM_SOAK = 1
soak: check
	$(pytest) --timeout=7200
	@$(MAKE) --no-print-directory rendered
	$(pytest) --timeout=7200 tests/browser

check: $(ready)
	$(venv)/bin/ruff check .
	$(python) tools/opening.py --check
	$(python) tools/cut.py --check
	$(venv)/bin/mypy

package: $(ready)
	$(python) tools/opening.py
	$(python) tools/cut.py

notebooks: package
	env -u D2LTVM_SHORT $(python) tools/execute.py

lab: package
	$(venv)/bin/jupyter lab chapters

# Pin again what pyproject.toml and mxnet.txt ask for; newer versions come by
# `make lock LOCKFLAGS=--upgrade`
lock = $(venv)/bin/uv pip compile --quiet --universal --python-version 3.11 \
    --fork-strategy fewest --generate-hashes --no-annotate \
    --custom-compile-command 'make lock' $(LOCKFLAGS) pyproject.toml
lock: $(ready)
	$(lock) mxnet.txt --extra tvm --extra mxnet --extra onnx --extra mpi \
	    --extra opencl --extra book \
	    --output-file requirements.txt
	$(lock) --extra bench --constraints requirements.txt \
	    --no-emit-package torch --output-file benchmarks/requirements.txt

bench: package $(peers)
	$(python) benchmarks/run.py

# The results of `make bench` become those of the book
bench-keep: package
	$(python) benchmarks/run.py --keep
	env -u D2LTVM_SHORT $(python) tools/execute.py \
	    $(patsubst %,chapters/%.ipynb,measurements cpu_schedule \
	    network_schedule training_operator interactive webassembly)

# A Python that was named is looked at each time
ifdef PYTHON
.PHONY: $(ready)
endif
$(ready): requirements.txt pyproject.toml tools/environment.sh
	@sh tools/environment.sh

$(peers): benchmarks/requirements.txt benchmarks/environment.sh | $(ready)
	@sh benchmarks/environment.sh

shape: $(ready)
	$(python) tools/shape.py

clean:
	rm -rf .venv .venv-bench .venv-oldest _build build d2ltvm.egg-info \
	    .hypothesis .pytest_cache .ruff_cache .mypy_cache
