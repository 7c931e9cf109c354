# make demo          mirror real data between two sites on this machine, and show it (no root)
# make test          the whole suite; a test that lacks something is skipped and names it
# make lint          ruff and mypy
# make fuzz          the parsers under coverage-guided fuzzing (FUZZ='--seconds 600 nbd_requests')
# make sim           the simulation: seeds, crash states, broken builds (SIM='7' runs seed 7 again)
# make completion    make the completion for bash and zsh anew from the parsers
# make man           draw qdsmirror-modes(7) anew from the state machine's tables
# make soak          the simulation with fresh seeds, until it is stopped
# make bench         qdsmirror beside its peers (see bench/README.md)
# make clean         remove what the others made
# make install-deps  Debian packages for the integration tests and bench (as root)

PYTHON ?= python3
VENV   ?= .venv
# More trial processes: make test JOBS=-j2.  One part of the suite: make test TESTS=tests.core
JOBS   ?=
TESTS  ?= tests

BIN := $(VENV)/bin

# What the integration tests and the bench use as real peers; the product needs none of it.
DEBIAN := make python3 python3-venv git \
          nbdkit libnbd-bin nbdfuse python3-libnbd qemu-utils qemu-system-common fio \
          fuse3 e2fsprogs xfsprogs btrfs-progs dosfstools ntfs-3g fdisk util-linux mount kmod iproute2 procps socat openssl \
          sqlite3 logrotate mandoc man-db zsh \
          qemu-system-x86 linux-image-amd64 busybox-static prometheus
# Packages of the list above under the names that this release of Debian knows.
KNOWN = $$(for p in $(DEBIAN); do apt-cache show $$p >/dev/null 2>&1 && echo $$p; done)

.PHONY: demo test lint fuzz sim soak man completion bench clean install-deps venv

demo: $(VENV)/installed
	$(BIN)/python -m qdsmirror.tools.demo

test: $(VENV)/installed-dev
	$(BIN)/trial $(JOBS) $(TESTS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(FUZZ)

sim: $(VENV)/installed-dev
	$(if $(SIM),$(BIN)/python -m tests.sim $(SIM),$(BIN)/trial tests.sim)

soak: $(VENV)/installed-dev
	$(BIN)/python -m tests.sim --soak

man: $(VENV)/installed
	$(BIN)/python man/modes.py

completion: $(VENV)/installed
	$(BIN)/python completion/make.py

bench: $(VENV)/installed
	$(BIN)/python bench/peers.py $(BENCH)

venv: $(VENV)/installed-dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: setup.cfg pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,lint]'
	touch $@ $(VENV)/installed

# Of prometheus promtool alone is wanted: unless it is here already, its service must not run, neither
# now (policy-rc.d(8)) nor after a boot (the link is what "systemctl mask" makes).
install-deps:
	apt-get update -q
	policy=/usr/sbin/policy-rc.d; unit=/etc/systemd/system/prometheus.service; \
	if ! dpkg -s prometheus >/dev/null 2>&1; then \
	    test -e $$unit || { mkdir -p $${unit%/*} && ln -s /dev/null $$unit; }; \
	    test -e $$policy || { printf '#!/bin/sh\nexit 101\n' >$$policy && chmod 755 $$policy && \
	        trap "rm -f $$policy" EXIT; }; \
	fi; \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(KNOWN)

clean:
	rm -rf $(VENV) build dist *.egg-info _trial_temp* .mypy_cache .ruff_cache .hypothesis
	find qdsmirror twisted tests bench -name __pycache__ -prune -exec rm -rf {} +
	rm -f twisted/plugins/dropin.cache
