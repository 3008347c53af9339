# `make book` and `make test` do all the set-up themselves.
ready = .venv/.ready
python = .venv/bin/python

.PHONY: book test package notebooks lab bench clean
.DELETE_ON_ERROR:

book: package
	.venv/bin/jupyter-book build . -W -n --keep-going
	@echo "Open file://$(CURDIR)/_build/html/index.html"

test: $(ready)
	.venv/bin/ruff check .
	$(python) tools/cut.py --check
	$(python) -m pytest
	D2LTVM_SHORT=1 $(python) -m pytest --nbval --nbval-current-env \
	    --nbval-cell-timeout=600 -p no:cacheprovider chapters/*.ipynb
	.venv/bin/jupyter-book build . --all -W -n --keep-going -q

package: $(ready)
	$(python) tools/cut.py

notebooks: package
	env -u D2LTVM_SHORT $(python) tools/execute.py

lab: package
	.venv/bin/jupyter lab chapters

bench: package
	$(python) benchmarks/run.py

$(ready): requirements.txt pyproject.toml tools/environment.sh
	@sh tools/environment.sh

clean:
	rm -rf .venv _build d2ltvm.egg-info .pytest_cache .ruff_cache
