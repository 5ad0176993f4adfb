# SPDX-License-Identifier: GPL-2.0-or-later
# make run        trace this machine if it is a KVM host, else an emulated one; HOST=trixie: that emulated one
# make test       everything that must hold, on the emulated bookworm and trixie hosts of both vendors
# make test-all   that, and the hosts of suites that move (sid, backports) or are about to leave the archive (filter-only)
# make test-faults  faults made to happen, for an hour at most once the hosts are built, and docs/reliability.md made from the results
# make soak       hours of an emulated host's life, SOAK_HOURS (24) of them, each in two minutes; 3 are part of make test-faults
# make test-dashboard  the dashboard by what Grafana itself uses (npm, Chromium); pictures of made-up hosts go to
#                 build/dashboard/ and build/dashboard-500/, of emulated ones (the whole chain: probes, exporter, Prometheus, panels) to build/chain/
# make check      linter, formatter, types and unit tests: no root, no emulator, no network once installed; it says
#                 what was left out
# make check-versions  the unit tests alone, with the lowest versions of Python and libraries that pyproject.toml
#                 permits, and with the newest (venvs in build/versions/); part of make check and make test
# make dist       build/dist/: the sdist, and the wheel with the compiled BPF programs; fails where they cannot be compiled
# make wheel      the same
# make deb       build/deb/SUITE/*.deb for the suites of Debian in SUITES (bookworm, trixie and sid), in clean chroots
# make lint       linter, formatter and types alone
# make operators-hour  what a new operator does, on fresh emulated Debian 12 and 13 hosts: install, scrape, upgrade, reboot, remove
# make compare-demo  the kernel without the patch against the one with it, on an emulated host; leaves build/compare/.
#                 HOST=trixie-amd: on that host; leaves build/compare-trixie-amd/
# make saving     what the patch saves, in calls and instructions, with no tracer attached
# make scrape-cost  what a scrape costs here, by the number of series
# make start-cost  what a start costs here, by step
# make state-cost  what a read of the states of 1,000 vCPUs costs: instructions on an emulated host, ms here
# make bench      what tracing costs, in instructions: msrtrace, its peers and empty probes, on the emulated hosts
# make bench-exits  what --exits adds to an exit there, beside its peers and empty probes
# make bench-parts  what each thing that a BPF program may do costs there
SHELL := /bin/bash
VENV := build/venv
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 -qq
PORT := 9753
ALL_HOSTS := bookworm,trixie,sid,backports,filter-only,bookworm-amd,trixie-amd,sid-amd,backports-amd,filter-only-amd,bookworm-2-cpus,trixie-2-cpus,container,ansible,operators-hour
FAULT_HOSTS := bookworm-amd trixie-amd
SOAK_HOURS := 24
COMMA := ,
# An emulated host of docs/hosts.md; what the environment has of that name is another thing.
HOST :=
# This machine's KVM module, if its CPU has VMX or SVM and no emulated host is asked for.
KVM := $(if $(HOST),,$(shell sed -n '/^flags/{s/.*\b\(vmx\|svm\)\b.*/\1/p;q}' /proc/cpuinfo | sed 's/vmx/kvm_intel/; s/svm/kvm_amd/'))

.PHONY: run operators-hour dist wheel deb check check-versions test test-all test-faults soak lint format clean compare-demo saving scrape-cost start-cost state-cost bench bench-parts bench-exits test-dashboard

# What a checkout needs of Debian. BCC is nowhere else: PyPI's `bcc` is another package.
build/packages: Makefile
	@mkdir -p build
	for try in 1 2 3 4; do $(APT) update && break; sleep $$((10 * try)); done
	$(APT) install -y --no-install-recommends python3-venv python3-bpfcc
	@touch $@

# What the tests need beside that: promtool, a server of each dialect, pahole to check the reading of BTF, a browser to look at pages with,
# the shells that complete, mandoc and groff to check man pages with, pipx to install the wheel, Podman, which builds the image.
build/test-packages: Makefile build/packages
	$(APT) install -y --no-install-recommends prometheus victoria-metrics dwarves build-essential zstd openssl kmod chromium fonts-dejavu-core bash-completion zsh fish mandoc groff-base pipx podman
	@touch $@

$(VENV)/ready: pyproject.toml build/packages $(VENV)/run
	for try in 1 2 3 4; do $(VENV)/bin/pip install --disable-pip-version-check -q -e '.[test]' && break; sleep $$((10 * try)); done
	@$(VENV)/bin/msrtrace --version && touch $@

# To trace this machine takes msrtrace alone; to boot an emulated one, what tests/kvmhost/run itself installs.
$(VENV)/run: pyproject.toml build/packages
	/usr/bin/python3 -m venv --system-site-packages $(VENV)
	for try in 1 2 3 4; do $(VENV)/bin/pip install --disable-pip-version-check -q -e . && break; sleep $$((10 * try)); done
	@$(VENV)/bin/msrtrace --version && touch $@

run: $(if $(KVM),$(VENV)/run)
	@if [ -n "$(KVM)" ] && { [ -d /sys/module/$(KVM) ] || $(SUDO) modprobe -q $(KVM); }; then \
	  echo "make run: this machine has $(KVM): tracing it"; \
	  [ -e /lib/modules/$$(uname -r)/build ] || $(APT) install -y linux-headers-$$(uname -r); \
	  set -o pipefail; $(SUDO) $(VENV)/bin/msrtrace run --web.listen-address 127.0.0.1:$(PORT) 2>&1 | \
	    { trap '' INT; sed -u '/: serving /a make run: in another terminal, live: $(SUDO:%=% )$(VENV)/bin/msrtrace top'; }; \
	else \
	  echo "make run: tracing an emulated host, with VMs under filter updates"; \
	  command -v python3 >/dev/null || { $(APT) update && $(APT) install -y --no-install-recommends python3; }; \
	  $(SUDO) tests/kvmhost/demo $(PORT) $(HOST) || [ $$? -eq 130 ]; \
	fi

# Some kernel's headers, which BCC needs to compile; those of any will do.
build/headers: build/packages
	ls -d /usr/src/linux-headers-*-common /usr/src/kernels/* /lib/modules/$$(uname -r)/build 2>/dev/null | grep -q . || $(APT) install -y --no-install-recommends linux-headers-amd64
	@touch $@

dist wheel: $(VENV)/ready build/headers
	rm -rf build/dist
	$(SUDO) packaging/dist $(VENV)/bin/python build/dist
	@ls build/dist/*

deb: build/packages
	command -v mmdebstrap >/dev/null || $(APT) install -y --no-install-recommends mmdebstrap xz-utils
	$(SUDO) packaging/deb.py $(SUITES)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

check: lint
	$(VENV)/bin/pytest --check -n 2 --dist loadfile -q -rfE
	$(VENV)/bin/python tests/versions.py

check-versions: $(VENV)/ready
	$(VENV)/bin/python tests/versions.py

test: lint build/test-packages build/headers
	$(SUDO) $(VENV)/bin/pytest
	$(VENV)/bin/python tests/versions.py

test-all: lint build/test-packages build/headers
	$(SUDO) $(VENV)/bin/pytest --hosts $(ALL_HOSTS)
	$(VENV)/bin/python tests/versions.py

# Faults are counted in minutes: what a host does in them is not to be cut short by what builds it.
test-faults: lint build/test-packages
	for host in $(FAULT_HOSTS); do $(SUDO) tests/kvmhost/run --host $$host --build || exit; done
	$(SUDO) rm -f build/faults.json
	$(SUDO) timeout --foreground 3600 $(VENV)/bin/pytest -m fault --faults --hosts $(subst $() $(),$(COMMA),$(FAULT_HOSTS))
	$(VENV)/bin/python tests/reliability.py

soak: $(VENV)/ready
	for host in $(FAULT_HOSTS); do $(SUDO) tests/kvmhost/run --host $$host --build || exit; done
	$(SUDO) env SOAK_HOURS=$(SOAK_HOURS) timeout --foreground 7200 $(VENV)/bin/pytest tests/kvmhost/test_soak.py --faults --hosts $(subst $() $(),$(COMMA),$(FAULT_HOSTS))

operators-hour: $(VENV)/ready
	@$(SUDO) $(VENV)/bin/python tests/kvmhost/operators_hour.py

compare-demo: $(VENV)/ready
	$(SUDO) tests/kvmhost/compare-demo build/compare$(HOST:%=-%) $(HOST)

saving: $(VENV)/ready
	@$(SUDO) $(VENV)/bin/python tests/kvmhost/saving.py

scrape-cost: $(VENV)/ready
	@$(VENV)/bin/python tests/scrape_cost.py

start-cost: $(VENV)/ready
	@$(SUDO) $(VENV)/bin/python tests/start_cost.py

state-cost: $(VENV)/ready
	@$(SUDO) $(VENV)/bin/python tests/kvmhost/state_cost.py

bench: $(VENV)/ready
	@$(SUDO) $(VENV)/bin/python tests/kvmhost/bench.py

bench-exits: $(VENV)/ready
	@$(SUDO) $(VENV)/bin/python tests/kvmhost/exits_cost.py

bench-parts: $(VENV)/ready
	@$(SUDO) $(VENV)/bin/python tests/kvmhost/bench.py --parts

build/npm: Makefile build/packages
	command -v npm >/dev/null || $(APT) install -y --no-install-recommends npm
	@touch $@

test-dashboard: $(VENV)/ready build/test-packages build/npm
	tests/dashboard/check
	tests/dashboard/check --hosts 500 --out build/dashboard-500
	$(SUDO) $(VENV)/bin/python tests/kvmhost/chain_pictures.py build/chain

clean:
	$(SUDO) rm -rf build
