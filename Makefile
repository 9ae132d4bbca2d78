# What README names. Everything goes through cargo; guests come from Debian packages.
.PHONY: vmrun demo test bench fuzz guests lint unit docs c install python python-wheel boot boots boot-soft boot-kvm \
  boot-kvm-kernels boot-kvm-devices soak \
  clean-guests FORCE

export VMCORE_GUESTS ?= $(CURDIR)/target/guests
# The test programs, by their names.
TESTS := target/tests

# Linked statically it starts 0.3 ms sooner, takes 1 MiB less, and runs on any distribution. Wants libc.a:
# Debian has it in libc6-dev, Fedora in glibc-static.
vmrun:
	cargo rustc --release -p vmcore-examples --bin vmrun -- -C target-feature=+crt-static

# Boots a stock Debian kernel to a shell on a disk of Debian packages.
demo: guests vmrun
	examples/guest/demo

# Everything that must hold, fast to slow. What boots guests takes longest, most of it on one processor (the rig
# has no more): two of them at once, each of which shows what it says when it ends. The longest come first.
test: lint unit docs boots
boots: guests $(TESTS)
	@while sleep 60 >/dev/null 2>&1; do echo "boots: still at it"; done & ticker=$$!; \
	$(MAKE) --no-print-directory -j2 -Otarget boot-kvm-kernels c python boot-kvm-devices boot-soft; \
	status=$$?; kill $$ticker; exit $$status

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p vmcore --no-default-features --all-targets -- -D warnings
	@! cargo tree --workspace -d -e normal 2>/dev/null | grep '^vm-memory' || \
	  { echo "two versions of vm-memory: their types do not mix; see 'cargo tree -d'" >&2; exit 1; }

# Each fuzz target of the devices for FUZZ_SECONDS, under AddressSanitizer, from its corpus in the tree.
FUZZ_SECONDS ?= 600
fuzz:
	vmdevices/fuzz/run $(FUZZ_SECONDS)

unit:
	cargo test --workspace

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# libvmcore in C: header, tests under sanitizers and valgrind, a boot, examples built outside the tree.
c: guests
	cargo build -p vmcore-c
	VMCORE_REQUIRE_BOOT=1 bindings-c/tests/run target/debug

# libvmcore.so, libvmcore.a, vmcore.h, and what pkg-config and CMake need to find them.
PREFIX ?= /usr/local
install:
	cargo build --release -p vmcore-c
	bindings-c/install "$(PREFIX)" "$(DESTDIR)" target/release

guests:
	examples/guest/build cloud generic initrd-cloud initrd-generic initrd-rt initrd-i386 initrd-trixie \
	  root disks debian memtest ipxe

# What is booted on the software CPU besides the KVM.
SOFT_BOOTS := cloud_kernel_powers_off four_vcpus_and_six_gib_power_off a_panic_resets \
  files_on_a_disk_are_there_after_a_second_boot linux_finds_the_virtio_devices a_shell_answers \
  a_guest_talks a_booting_kernel_moves_within generic_kernel_powers_off without_acpi cards:: devices:: nat:: pci:: other::

# What is of devices alone, whatever the processor (pci and boot_disks pass on KVM too, by hand), or of the software CPU.
SOFT_ONLY := --skip pci::pins --skip pci::the_ --skip pci::type_1 --skip nat::a_guest_keeps --skip moves_within

boot: boot-soft boot-kvm

$(TESTS): FORCE
	examples/guest/test-binaries $@

# Stock kernels to userland on the software CPU.
boot-soft: guests $(TESTS)
	VMCORE_ACCEL=soft VMCORE_REQUIRE_BOOT=1 $(TESTS)/boot --test-threads=1 $(SOFT_BOOTS)
	VMCORE_ACCEL=soft VMCORE_REQUIRE_BOOT=1 $(TESTS)/boot_disks --test-threads=1
	VMCORE_REQUIRE_BOOT=1 $(TESTS)/deterministic

# The contract on a real kvm_amd or kvm_intel, then stock kernels on it, whose devices are on PCI where a test leaves
# that open. In the rig each of the latter has a machine of its own, which now and then stands still. In two halves,
# as the rig's machine has one processor and a host more.
boot-kvm: boot-kvm-kernels boot-kvm-devices
KVM_BOOT := VMCORE_RIG_EACH=1 VMCORE_TRANSPORT=pci examples/guest/real-kvm
# By their beginnings, which no other test has.
KVM_DEVICES := cards:: devices:: nat:: pci::

boot-kvm-kernels: guests $(TESTS)
	examples/guest/real-kvm $(TESTS)/contract ::kvm::
	$(KVM_BOOT) $(TESTS)/boot --test-threads=1 --skip other:: $(SOFT_ONLY) $(addprefix --skip ,$(KVM_DEVICES))

boot-kvm-devices: guests $(TESTS)
	$(KVM_BOOT) $(TESTS)/boot --test-threads=1 $(KVM_DEVICES) $(SOFT_ONLY)
	$(KVM_BOOT) $(TESTS)/boot_disks file_systems

# The Python package, built for development: its tests, the boots among them, and its types. Everything from
# PyPI is in a virtual environment below target/.
VENV := $(CURDIR)/target/python
PYTHON_TOOLS := 'maturin>=1.9,<2' pytest numpy mypy typing_extensions basedpyright

$(VENV)/ready: bindings-py/pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip --quiet install --disable-pip-version-check $(PYTHON_TOOLS)
	touch $@

python: guests $(VENV)/ready
	cd bindings-py && VIRTUAL_ENV=$(VENV) $(VENV)/bin/maturin develop --quiet
	cd bindings-py && $(VENV)/bin/mypy python/vmcore tests ../examples/*.py ../benches/callbacks.py
	cd bindings-py && $(VENV)/bin/python -m mypy.stubtest vmcore --mypy-config-file pyproject.toml \
	  --allowlist tests/stubtest-allow.txt --ignore-unused-allowlist
	cd bindings-py && $(VENV)/bin/basedpyright --level error --pythonpath $(VENV)/bin/python python/vmcore ../examples/*.py
	cd bindings-py && VMCORE_REQUIRE_BOOT=1 $(VENV)/bin/pytest -q

# As pip builds it: the wheel and the source distribution, in target/wheels.
python-wheel: $(VENV)/ready
	cd bindings-py && $(VENV)/bin/maturin build --sdist --out $(CURDIR)/target/wheels

# What takes too long for every day, on the software CPU, about two hours of it: every kernel in every
# way; work in a Debian system that debootstrap makes there: dpkg, apt, Python's tests, gcc, openssl, sqlite,
# and half an hour of stress-ng.
soak: guests $(TESTS)
	VMCORE_ACCEL=soft VMCORE_REQUIRE_BOOT=1 $(TESTS)/boot --test-threads=1 --ignored other::

bench: vmrun
	cargo bench -p vmcore-benches
