#ifndef VMCORE_H
#define VMCORE_H

/* Made by cbindgen from bindings-c/src: change that. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * vmcore: virtual machines as a library.
 *
 * Ownership. What `vmcore_X_new`, `_open` and other calls give through an `out` pointer is the caller's, who
 * gives it back by `vmcore_X_delete`; deleting NULL does nothing. Where a call takes an object over, its
 * comment says "taken": it is the library's from then on, also where the call fails. Objects may be deleted in
 * any order: what needs another keeps it.
 *
 * Errors. A call that can fail returns NULL where it did not, or an error, which is the caller's: look at
 * it with `vmcore_error_*`, and give it to `vmcore_error_delete`. It has then set none of its results. A NULL
 * where an object or a result belongs is VMCORE_ERROR_ARGUMENT; calls that cannot fail do nothing with it, and
 * answer 0.
 *
 * Threads. An object may be used by several threads at once by pointers to const, and by one thread alone by
 * others. Each object may move between threads.
 *
 * Callbacks get the `user` pointer that was given with them. Where there is a `drop` function, it is called
 * once with `user` when the library needs it no more, on any thread. Callbacks must return: no longjmp and
 * no exceptions. Tables of functions begin with their size, as the program knew it when it was compiled.
 *
 * Texts are UTF-8 and end with a zero byte. Sizes, lengths and offsets are bytes, addresses guest-physical
 * unless said otherwise.
 *
 * The library never exits, prints, or installs a signal handler; vmcore_log_set tells what it logs.
 */

#define VMCORE_VERSION_MAJOR 0
#define VMCORE_VERSION_MINOR 1
#define VMCORE_VERSION_PATCH 0
/** The version of this header; vmcore_version() tells that of the library. */
#define VMCORE_VERSION "0.1.0"

#if defined(__GNUC__) || defined(__clang__)
#define VMCORE_MUST_USE __attribute__((warn_unused_result))
#else
#define VMCORE_MUST_USE
#endif


/**
 * By the keyboard controller.
 */
#define VMCORE_RESET_KEYBOARD 0

/**
 * By port 0xCF9.
 */
#define VMCORE_RESET_PORT 1

/**
 * By the ACPI reset register, where it is not port 0xCF9.
 */
#define VMCORE_RESET_ACPI 2

/**
 * By a triple fault.
 */
#define VMCORE_RESET_TRIPLE_FAULT 3

/**
 * In a way that this version of the bindings has no number for.
 */
#define VMCORE_RESET_OTHER 99

/**
 * A balloon: to be attached to a machine, and a handle on it from then on.
 */
typedef struct vmcore_balloon vmcore_balloon;

/**
 * Settings of a VM to be built: unless said otherwise a machine of one vCPU and 128 MiB with interrupt controllers and
 * no devices, on the best backend of this host. What it boots must be said.
 */
typedef struct vmcore_builder vmcore_builder;

/**
 * Bytes that the library made: a transcript, a state, a bitmap. They are followed by a zero byte, which does
 * not count, so that a text can be printed.
 */
typedef struct vmcore_bytes vmcore_bytes;

/**
 * One request of a driver, for the call of `serve`.
 */
typedef struct vmcore_chain vmcore_chain;

/**
 * The host's side of a character device, to be given to a machine.
 */
typedef struct vmcore_console vmcore_console;

/**
 * A machine's off and reset switch: what devices keep, to end the guest. It may outlive the machine.
 */
typedef struct vmcore_control vmcore_control;

/**
 * All answers of CPUID for one vCPU, sorted by leaf and subleaf.
 */
typedef struct vmcore_cpuid vmcore_cpuid;

/**
 * A device of the program's, which may be on several machines.
 */
typedef struct vmcore_device vmcore_device;

/**
 * A disk: to be set up and attached to a machine, and a handle on it from then on.
 */
typedef struct vmcore_disk vmcore_disk;

/**
 * What went wrong: a code, a message of one line, errno, and what to do.
 */
typedef struct vmcore_error vmcore_error;

/**
 * A disk image to be opened: nothing but the files that are named here is ever opened.
 */
typedef struct vmcore_image vmcore_image;

/**
 * A device's interrupt wire. Deleting it lowers it. It may outlive the machine, and then does nothing.
 */
typedef struct vmcore_irq vmcore_irq;

/**
 * Stops a vCPU from any thread; it may outlive it, and then does nothing.
 */
typedef struct vmcore_kick vmcore_kick;

/**
 * The machine while it is being built: valid during a vmcore_attach_fn alone.
 */
typedef struct vmcore_machine vmcore_machine;

/**
 * A VM's guest-physical memory. It may outlive the VM. All of it may be used while the guest runs.
 */
typedef struct vmcore_memory vmcore_memory;

/**
 * A NAT that needs no privilege, to be put behind a card, and a handle on it from then on.
 */
typedef struct vmcore_nat vmcore_nat;

/**
 * A network card: to be set up and attached to a machine, and a handle on it from then on.
 */
typedef struct vmcore_net vmcore_net;

/**
 * A VM that stands still until this is deleted. It keeps what the VM consists of.
 */
typedef struct vmcore_pause vmcore_pause;

/**
 * Settings of a region: anonymous memory unless said.
 */
typedef struct vmcore_region vmcore_region;

/**
 * Every backend on this host, in the order in which VMCORE_ACCEL_AUTO prefers them.
 */
typedef struct vmcore_report vmcore_report;

/**
 * Waits for what the guest puts out, and types. It may outlive the VM.
 */
typedef struct vmcore_script vmcore_script;

/**
 * The state of a vCPU, or of the vCPUs and machine of a VM, without memory and devices.
 */
typedef struct vmcore_state vmcore_state;

/**
 * A virtual CPU. It keeps its VM. Calls other than vmcore_vcpu_kick fail with VMCORE_ERROR_WRONG_STATE while it runs.
 */
typedef struct vmcore_vcpu vmcore_vcpu;

/**
 * A piece of guest memory without a copy, which stays where it is while this lives.
 */
typedef struct vmcore_view vmcore_view;

/**
 * A virtio device of the program's: to be attached to a machine, and a handle on it from then on.
 */
typedef struct vmcore_virtio vmcore_virtio;

/**
 * A virtio console with ports, to be attached to a machine.
 */
typedef struct vmcore_virtio_console vmcore_virtio_console;

/**
 * A virtual machine.
 */
typedef struct vmcore_vm vmcore_vm;

/**
 * Sockets to the guest: to be set up and attached to a machine, and a handle on them from then on.
 */
typedef struct vmcore_vsock vmcore_vsock;

/**
 * A port of the host that the guest can connect to. Deleting it frees the port.
 */
typedef struct vmcore_vsock_listener vmcore_vsock_listener;

/**
 * Which backend runs a guest.
 */
typedef uint32_t vmcore_accel;

/**
 * What virtio devices are behind.
 */
typedef uint32_t vmcore_transport;

/**
 * The mode in which a flat image is entered.
 */
typedef uint32_t vmcore_raw_mode;

/**
 * Puts devices of the program's on a machine that is being built. An error that it returns is that of the build.
 */
typedef struct vmcore_error *(*vmcore_attach_fn)(void *user, struct vmcore_machine *machine);

/**
 * Called once with the user pointer when the library needs it no more.
 */
typedef void (*vmcore_drop_fn)(void *user);

/**
 * Gets what the guest writes, on a vCPU's thread, which waits for it.
 */
typedef void (*vmcore_output_fn)(void *user, const uint8_t *data, size_t len);

/**
 * A console that the program writes. Functions are called one at a time, on any thread, and must not block.
 */
typedef struct vmcore_console_ops {
  /**
   * sizeof(vmcore_console_ops).
   */
  size_t size;
  /**
   * Takes output, as much from the front as can be taken now: how many bytes, or a negative errno.
   */
  ptrdiff_t (*write)(void *user, const uint8_t *data, size_t len);
  /**
   * Gives input: how many bytes, 0 where there will be no more, -EAGAIN where there is none now, or another
   * negative errno. NULL for a console without input.
   */
  ptrdiff_t (*read)(void *user, uint8_t *data, size_t len);
  /**
   * The console has been deleted; may be NULL.
   */
  vmcore_drop_fn drop;
} vmcore_console_ops;

/**
 * Kinds of ends.
 */
typedef uint32_t vmcore_outcome_kind;

/**
 * How a run of the guest ended.
 */
typedef struct vmcore_outcome {
  /**
   * In which way.
   */
  vmcore_outcome_kind kind;
  /**
   * The exit value, or the cause of the reset; else 0.
   */
  uint32_t value;
} vmcore_outcome;

/**
 * One answer of CPUID.
 */
typedef struct vmcore_cpuid_entry {
  /**
   * EAX on input.
   */
  uint32_t leaf;
  /**
   * ECX on input, where the leaf has subleaves; else 0.
   */
  uint32_t subleaf;
  /**
   * EAX on output.
   */
  uint32_t eax;
  /**
   * EBX on output.
   */
  uint32_t ebx;
  /**
   * ECX on output.
   */
  uint32_t ecx;
  /**
   * EDX on output.
   */
  uint32_t edx;
  /**
   * Whether the leaf has subleaves.
   */
  bool has_subleaf;
} vmcore_cpuid_entry;

/**
 * What a device at ports or addresses does. Called on the threads of the vCPUs, one call at a time; the vCPU waits
 * for the answer. `offset` counts from the device's base, `len` is 1, 2, 4 or 8.
 */
typedef struct vmcore_device_ops {
  /**
   * sizeof(vmcore_device_ops).
   */
  size_t size;
  /**
   * Answers a read.
   */
  void (*read)(void *user, uint64_t offset, uint8_t *data, size_t len);
  /**
   * Takes a write.
   */
  void (*write)(void *user, uint64_t offset, const uint8_t *data, size_t len);
  /**
   * The device's state, for fingerprints; NULL for a device without.
   */
  struct vmcore_error *(*save)(void *user, struct vmcore_bytes **state);
  /**
   * Takes over a state; NULL for a device without.
   */
  struct vmcore_error *(*restore)(void *user, const uint8_t *state, size_t len);
  /**
   * The device is gone from every machine and has been deleted; may be NULL.
   */
  vmcore_drop_fn drop;
} vmcore_device_ops;

/**
 * When what a guest writes is on stable storage.
 */
typedef uint32_t vmcore_cache;

/**
 * What becomes of a request that the host fails.
 */
typedef uint32_t vmcore_on_error;

/**
 * What a disk did so far.
 */
typedef struct vmcore_disk_stats {
  /**
   * Reads that ended well.
   */
  uint64_t reads;
  /**
   * Bytes of them.
   */
  uint64_t bytes_read;
  /**
   * Writes that ended well.
   */
  uint64_t writes;
  /**
   * Bytes of them.
   */
  uint64_t bytes_written;
  /**
   * Flushes that ended well.
   */
  uint64_t flushes;
  /**
   * Discards and writes of zeroes that ended well.
   */
  uint64_t cleared;
  /**
   * Requests that the host failed.
   */
  uint64_t errors;
} vmcore_disk_stats;

/**
 * Kinds of errors.
 */
typedef uint32_t vmcore_error_code;

/**
 * How far a backend can be used on this host.
 */
typedef uint32_t vmcore_status;

/**
 * How much is logged: each level has those before it.
 */
typedef uint32_t vmcore_log_level;

/**
 * Gets one message of `level`; `target` names the part of the library. Called on any thread, on several at
 * once, and must not call the library.
 */
typedef void (*vmcore_log_fn)(void *user, vmcore_log_level level, const char *target, const char *message);

/**
 * Packets and bytes that went through a card since it was made. Bytes are those of Ethernet frames; a packet to be
 * cut into segments counts once.
 */
typedef struct vmcore_net_stats {
  /**
   * Packets that the guest received.
   */
  uint64_t received_packets;
  /**
   * Bytes of them.
   */
  uint64_t received_bytes;
  /**
   * Packets for the guest that were lost.
   */
  uint64_t received_dropped;
  /**
   * Packets that the guest did not ask for.
   */
  uint64_t received_filtered;
  /**
   * Packets that the guest sent.
   */
  uint64_t sent_packets;
  /**
   * Bytes of them.
   */
  uint64_t sent_bytes;
  /**
   * Packets from the guest that were lost.
   */
  uint64_t sent_dropped;
} vmcore_net_stats;

/**
 * What a NAT has done since it was made.
 */
typedef struct vmcore_nat_stats {
  /**
   * Frames that the guest sent.
   */
  uint64_t frames_sent;
  /**
   * Their bytes.
   */
  uint64_t bytes_sent;
  /**
   * Frames that the guest got.
   */
  uint64_t frames_received;
  /**
   * Their bytes.
   */
  uint64_t bytes_received;
  /**
   * TCP connections begun, from either side.
   */
  uint64_t tcp_opened;
  /**
   * UDP flows begun.
   */
  uint64_t udp_opened;
  /**
   * Flows of echo requests begun.
   */
  uint64_t icmp_opened;
  /**
   * Flows that there are now.
   */
  uint64_t flows;
  /**
   * Flows that were given up for new ones.
   */
  uint64_t evicted;
  /**
   * Flows that the rules refused.
   */
  uint64_t denied;
  /**
   * Frames that make no sense.
   */
  uint64_t malformed;
  /**
   * Frames with a source that is not the guest's, or for other stations.
   */
  uint64_t foreign;
  /**
   * Frames of protocols that do not pass.
   */
  uint64_t unsupported;
  /**
   * Segments sent to the guest once more.
   */
  uint64_t retransmitted;
  /**
   * Packets for the guest that were dropped because it takes none.
   */
  uint64_t dropped;
} vmcore_nat_stats;

/**
 * Which host pages back a region.
 */
typedef uint32_t vmcore_huge_pages;

/**
 * On which NUMA nodes of the host a region's pages are placed.
 */
typedef uint32_t vmcore_numa;

/**
 * A segment register with its hidden part. Fields of 8 bits but `kind` and `dpl` are 0 or 1.
 */
typedef struct vmcore_segment {
  /**
   * Linear base address.
   */
  uint64_t base;
  /**
   * Last valid offset in bytes, with the granularity already applied.
   */
  uint32_t limit;
  /**
   * The visible selector.
   */
  uint16_t selector;
  /**
   * Type field, 4 bits.
   */
  uint8_t kind;
  /**
   * P: present.
   */
  uint8_t present;
  /**
   * S: 1 for code or data, 0 for system.
   */
  uint8_t code_or_data;
  /**
   * DPL: privilege level, 0 to 3.
   */
  uint8_t dpl;
  /**
   * D/B: 32-bit default operand size.
   */
  uint8_t big;
  /**
   * L: 64-bit code.
   */
  uint8_t is_long;
  /**
   * G: limit in 4 KiB units.
   */
  uint8_t granular;
  /**
   * AVL: for software.
   */
  uint8_t available;
  /**
   * The register holds a null selector: any use faults.
   */
  uint8_t unusable;
  /**
   * 0.
   */
  uint8_t reserved;
} vmcore_segment;

/**
 * Kinds of exits of a vCPU.
 */
typedef uint32_t vmcore_exit_kind;

/**
 * Why a vCPU's run returned.
 */
typedef struct vmcore_exit {
  /**
   * In which way.
   */
  vmcore_exit_kind kind;
  /**
   * Of VMCORE_EXIT_DEBUG: vector of the exception, 1 or 3.
   */
  uint32_t exception;
  /**
   * Of VMCORE_EXIT_DEBUG: address of the next instruction.
   */
  uint64_t rip;
  /**
   * Of VMCORE_EXIT_DEBUG: what hit, in the layout of DR6.
   */
  uint64_t dr6;
} vmcore_exit;

/**
 * Kinds of accesses.
 */
typedef uint32_t vmcore_io_kind;

/**
 * One access of the guest to a port or to an address without memory.
 */
typedef struct vmcore_io {
  /**
   * Which way, and where.
   */
  vmcore_io_kind kind;
  /**
   * How many bytes: 1, 2 or 4 of a port, 1 to 8 of an address.
   */
  uint32_t len;
  /**
   * The port or address.
   */
  uint64_t address;
  /**
   * The bytes, for the call. Those of a read are ones, to be overwritten; those of a write are not to be
   * changed.
   */
  uint8_t *data;
} vmcore_io;

/**
 * Answers an access; called on the thread that runs the vCPU.
 */
typedef void (*vmcore_io_fn)(void *user, const struct vmcore_io *io);

/**
 * General-purpose registers, instruction pointer and flags.
 */
typedef struct vmcore_regs {
  uint64_t rax;
  uint64_t rbx;
  uint64_t rcx;
  uint64_t rdx;
  uint64_t rsi;
  uint64_t rdi;
  uint64_t rsp;
  uint64_t rbp;
  uint64_t r8;
  uint64_t r9;
  uint64_t r10;
  uint64_t r11;
  uint64_t r12;
  uint64_t r13;
  uint64_t r14;
  uint64_t r15;
  uint64_t rip;
  /**
   * Bit 1 is always set by the hardware; 2 is the value at reset.
   */
  uint64_t rflags;
} vmcore_regs;

/**
 * GDTR or IDTR.
 */
typedef struct vmcore_table {
  /**
   * Linear base address.
   */
  uint64_t base;
  /**
   * Last valid offset in bytes.
   */
  uint64_t limit;
} vmcore_table;

/**
 * Segments, descriptor tables, control registers and EFER.
 */
typedef struct vmcore_sregs {
  struct vmcore_segment cs;
  struct vmcore_segment ds;
  struct vmcore_segment es;
  struct vmcore_segment fs;
  struct vmcore_segment gs;
  struct vmcore_segment ss;
  struct vmcore_segment tr;
  struct vmcore_segment ldt;
  struct vmcore_table gdt;
  struct vmcore_table idt;
  uint64_t cr0;
  uint64_t cr2;
  uint64_t cr3;
  uint64_t cr4;
  uint64_t cr8;
  uint64_t efer;
  /**
   * IA32_APIC_BASE.
   */
  uint64_t apic_base;
} vmcore_sregs;

/**
 * How often a vCPU left the guest, by reason, since it was made.
 */
typedef struct vmcore_vcpu_stats {
  /**
   * All returns from the guest to the backend.
   */
  uint64_t exits;
  /**
   * Port accesses, one for each operand.
   */
  uint64_t port;
  /**
   * MMIO accesses, one for each of at most 8 bytes.
   */
  uint64_t mmio;
  /**
   * HLTs without interrupt controllers.
   */
  uint64_t halt;
  /**
   * Kicks and host signals.
   */
  uint64_t interrupted;
  /**
   * Debug stops.
   */
  uint64_t debug;
  /**
   * Triple faults.
   */
  uint64_t shutdown;
} vmcore_vcpu_stats;

/**
 * What becomes of a request.
 */
typedef uint32_t vmcore_served;

/**
 * What a virtio device of the program's does. `read_config` and `write_config` are called on the threads of vCPUs, `serve`
 * on an I/O thread and at the same time, one call at a time of each.
 */
typedef struct vmcore_virtio_ops {
  /**
   * sizeof(vmcore_virtio_ops).
   */
  size_t size;
  /**
   * Serves one request of queue number `queue`; `chain` lives for the call.
   */
  vmcore_served (*serve)(void *user, uint16_t queue, struct vmcore_chain *chain);
  /**
   * Reads the configuration; what is beyond its end is to be left as it is. NULL for a device without.
   */
  void (*read_config)(void *user, uint64_t offset, uint8_t *data, size_t len);
  /**
   * Takes a write to the configuration; the guest chooses offset and length. May be NULL.
   */
  void (*write_config)(void *user, uint64_t offset, const uint8_t *data, size_t len);
  /**
   * The driver is ready, with these features. May be NULL.
   */
  struct vmcore_error *(*activate)(void *user, uint64_t features);
  /**
   * The device has been deleted; may be NULL.
   */
  vmcore_drop_fn drop;
} vmcore_virtio_ops;

/**
 * virtio-mmio, which guests find by ACPI.
 */
#define VMCORE_TRANSPORT_MMIO 0

/**
 * virtio-pci, which every guest with PCI finds.
 */
#define VMCORE_TRANSPORT_PCI 1

/**
 * 16-bit real mode.
 */
#define VMCORE_RAW_REAL16 0

/**
 * 32-bit protected mode, flat segments, no paging.
 */
#define VMCORE_RAW_PROTECTED32 1

/**
 * 64-bit mode, the first 4 GiB mapped to themselves.
 */
#define VMCORE_RAW_LONG64 2

/**
 * When the guest flushes.
 */
#define VMCORE_CACHE_WRITEBACK 0

/**
 * When the write ends.
 */
#define VMCORE_CACHE_WRITETHROUGH 1

/**
 * When the host likes.
 */
#define VMCORE_CACHE_UNSAFE 2

/**
 * The guest gets an I/O error.
 */
#define VMCORE_ON_ERROR_REPORT 0

/**
 * The VM stops with VMCORE_OUTCOME_IO_ERROR, and the request is kept. The next run tries it again.
 */
#define VMCORE_ON_ERROR_STOP 1

/**
 * As VMCORE_ON_ERROR_STOP where the host has no room left, as VMCORE_ON_ERROR_REPORT otherwise.
 */
#define VMCORE_ON_ERROR_STOP_IF_FULL 2

/**
 * The guest is told that all went well; what it reads is zero. What it wrote is lost.
 */
#define VMCORE_ON_ERROR_IGNORE 3

/**
 * Guest memory: layout, mapping, access.
 */
#define VMCORE_ERROR_MEMORY 1

/**
 * The kernel or image to boot.
 */
#define VMCORE_ERROR_BOOT 2

/**
 * A system call failed: see vmcore_error_errno.
 */
#define VMCORE_ERROR_OS 3

/**
 * The backend asked for cannot be used on this host.
 */
#define VMCORE_ERROR_BACKEND_UNUSABLE 4

/**
 * The backend does not offer something.
 */
#define VMCORE_ERROR_UNSUPPORTED 5

/**
 * A setting that makes no sense, alone or with others.
 */
#define VMCORE_ERROR_CONFIG 6

/**
 * Two devices want the same addresses, ports or interrupt.
 */
#define VMCORE_ERROR_CONFLICT 7

/**
 * The backend could not execute an instruction of the guest.
 */
#define VMCORE_ERROR_EMULATION 8

/**
 * The processor refused to enter the guest: the registers are invalid.
 */
#define VMCORE_ERROR_ENTRY_FAILED 9

/**
 * A saved state does not fit what it is restored into.
 */
#define VMCORE_ERROR_STATE 10

/**
 * The call does not fit what the VM is doing.
 */
#define VMCORE_ERROR_WRONG_STATE 11

/**
 * A device failed to attach, activate, save or restore.
 */
#define VMCORE_ERROR_DEVICE 12

/**
 * An argument is NULL, not UTF-8, or none of the values that are known.
 */
#define VMCORE_ERROR_ARGUMENT 100

/**
 * Time is over.
 */
#define VMCORE_ERROR_TIMEOUT 101

/**
 * What was waited for has gone.
 */
#define VMCORE_ERROR_CLOSED 102

/**
 * A bug of the library: please report it. The objects of the call should be deleted.
 */
#define VMCORE_ERROR_PANIC 103

/**
 * An error of a kind that this version of the bindings has no number for.
 */
#define VMCORE_ERROR_OTHER 199

/**
 * The best that this host has.
 */
#define VMCORE_ACCEL_AUTO 0

/**
 * KVM.
 */
#define VMCORE_ACCEL_KVM 1

/**
 * The software CPU.
 */
#define VMCORE_ACCEL_SOFT 2

/**
 * For every guest.
 */
#define VMCORE_STATUS_USABLE 0

/**
 * For guests of some thousand instructions, not for kernels.
 */
#define VMCORE_STATUS_SMALL_GUESTS_ONLY 1

/**
 * Not at all.
 */
#define VMCORE_STATUS_NOT_USABLE 2

/**
 * Nothing.
 */
#define VMCORE_LOG_OFF 0

/**
 * What failed.
 */
#define VMCORE_LOG_ERROR 1

/**
 * What the user should know.
 */
#define VMCORE_LOG_WARN 2

/**
 * What happens, in few words.
 */
#define VMCORE_LOG_INFO 3

/**
 * What happens, for those who look for a fault.
 */
#define VMCORE_LOG_DEBUG 4

/**
 * Everything.
 */
#define VMCORE_LOG_TRACE 5

/**
 * The guest switched itself off.
 */
#define VMCORE_OUTCOME_POWER_OFF 0

/**
 * The guest reset itself; the value is a VMCORE_RESET_*.
 */
#define VMCORE_OUTCOME_RESET 1

/**
 * The guest wrote the value to the exit port.
 */
#define VMCORE_OUTCOME_EXIT 2

/**
 * The guest's kernel panicked, and told so.
 */
#define VMCORE_OUTCOME_PANICKED 3

/**
 * Nothing can wake the guest.
 */
#define VMCORE_OUTCOME_HALTED 4

/**
 * The host stopped the run; it can go on.
 */
#define VMCORE_OUTCOME_STOPPED 5

/**
 * The time given to the run is over; it can go on.
 */
#define VMCORE_OUTCOME_TIME_LIMIT 6

/**
 * The instructions given to the run are executed; it can go on.
 */
#define VMCORE_OUTCOME_INSTRUCTION_LIMIT 7

/**
 * The host failed a disk that stops the VM then: see vmcore_disk_stopped. It can go on, and the disk tries again.
 */
#define VMCORE_OUTCOME_IO_ERROR 8

/**
 * In a way that this version of the bindings has no number for.
 */
#define VMCORE_OUTCOME_OTHER 99

/**
 * Whatever the host's settings give.
 */
#define VMCORE_HUGE_PAGES_DEFAULT 0

/**
 * Transparent ones, where the host finds some.
 */
#define VMCORE_HUGE_PAGES_TRANSPARENT 1

/**
 * None.
 */
#define VMCORE_HUGE_PAGES_NEVER 2

/**
 * Reserved ones of 2 MiB.
 */
#define VMCORE_HUGE_PAGES_2M 3

/**
 * Reserved ones of 1 GiB.
 */
#define VMCORE_HUGE_PAGES_1G 4

/**
 * As the calling thread has it.
 */
#define VMCORE_NUMA_DEFAULT 0

/**
 * Only on these; allocation fails where they are full.
 */
#define VMCORE_NUMA_BIND 1

/**
 * On this one while it has room, on others after.
 */
#define VMCORE_NUMA_PREFERRED 2

/**
 * On these by turns.
 */
#define VMCORE_NUMA_INTERLEAVE 3

/**
 * HLT on a VM without interrupt controllers.
 */
#define VMCORE_EXIT_HALTED 0

/**
 * It was kicked.
 */
#define VMCORE_EXIT_KICKED 1

/**
 * As many instructions are executed as were to be.
 */
#define VMCORE_EXIT_INSTRUCTION_LIMIT 2

/**
 * A deterministic vCPU is halted or not started, and nothing is there to wake it.
 */
#define VMCORE_EXIT_WAITING 3

/**
 * A triple fault.
 */
#define VMCORE_EXIT_TRIPLE_FAULT 4

/**
 * A breakpoint, watchpoint or single step that vmcore_vcpu_set_debug asked for.
 */
#define VMCORE_EXIT_DEBUG 5

/**
 * In a way that this version of the bindings has no number for.
 */
#define VMCORE_EXIT_OTHER 99

/**
 * IN: fill the data.
 */
#define VMCORE_IO_PORT_READ 0

/**
 * OUT: take the data.
 */
#define VMCORE_IO_PORT_WRITE 1

/**
 * A read from an address without memory: fill the data.
 */
#define VMCORE_IO_MMIO_READ 2

/**
 * A write to an address without memory: take the data.
 */
#define VMCORE_IO_MMIO_WRITE 3

/**
 * It is done, and goes back to the driver with what was written.
 */
#define VMCORE_SERVED_DONE 0

/**
 * It waits at the head of its queue until vmcore_virtio_wake; a notification of the driver's may come before. Nothing may
 * have been read of it or written to it.
 */
#define VMCORE_SERVED_LATER 1

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library, as VMCORE_VERSION is the header's: "0.1.0". Never freed.
 */
const char *vmcore_version(void);

/**
 * Begins a VM.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_builder_new(struct vmcore_builder **out);

/**
 * Which kind of backend to run on.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_set_accel(struct vmcore_builder *builder,
                                              vmcore_accel kind);

/**
 * Size of the guest's memory, a multiple of 4096.
 */
void vmcore_builder_set_memory(struct vmcore_builder *builder, uint64_t bytes);

/**
 * Has the guest's memory backed as `region` says: by huge pages, on NUMA nodes, in a memfd. Its base and length do
 * not count; it may have no file, no contents, and be written. `region` stays the caller's.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_set_memory_like(struct vmcore_builder *builder,
                                                    const struct vmcore_region *region);

/**
 * How many vCPUs, as cores of one socket.
 */
void vmcore_builder_set_cpus(struct vmcore_builder *builder, uint32_t count);

/**
 * How many vCPUs, as sockets of cores of threads.
 */
void vmcore_builder_set_topology(struct vmcore_builder *builder,
                                 uint32_t sockets,
                                 uint32_t cores,
                                 uint32_t threads);

/**
 * Which CPU the guest sees: "best", "v1" to "v4", "host".
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_set_cpu_model(struct vmcore_builder *builder,
                                                  const char *model);

/**
 * Frequency of the guest's TSC in kHz.
 */
void vmcore_builder_set_tsc_khz(struct vmcore_builder *builder, uint32_t khz);

/**
 * Whether the machine has interrupt controllers and a PIT. Without, it ends at the first HLT.
 */
void vmcore_builder_set_irqchip(struct vmcore_builder *builder, bool yes);

/**
 * Whether the guest gets ACPI tables.
 */
void vmcore_builder_set_acpi(struct vmcore_builder *builder, bool yes);

/**
 * Has the VM do the same in every run, on the software CPU; `seed` is what all random numbers follow from.
 */
void vmcore_builder_set_deterministic(struct vmcore_builder *builder, uint64_t seed);

/**
 * What the virtio devices that are attached from now on are behind; VMCORE_TRANSPORT_MMIO unless said.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_set_transport(struct vmcore_builder *builder,
                                                  vmcore_transport transport);

/**
 * Boots a Linux kernel: a bzImage or vmlinux at `kernel`, with the initial RAM disk at `initrd`, which may be NULL.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_boot_linux(struct vmcore_builder *builder,
                                               const char *kernel,
                                               const char *initrd,
                                               const char *cmdline);

/**
 * Boots an ELF kernel by its PVH entry; `initrd` may be NULL.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_boot_pvh(struct vmcore_builder *builder,
                                             const char *kernel,
                                             const char *initrd,
                                             const char *cmdline);

/**
 * Boots a multiboot 1 kernel with one module, which may be NULL.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_boot_multiboot(struct vmcore_builder *builder,
                                                   const char *kernel,
                                                   const char *module,
                                                   const char *cmdline);

/**
 * Runs a plain ELF executable.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_boot_elf(struct vmcore_builder *builder,
                                             const char *path);

/**
 * Runs a copy of the `len` bytes at `data` in `mode`, from 0x7c00 in real mode, else from 1 MiB.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_boot_raw(struct vmcore_builder *builder,
                                             const uint8_t *data,
                                             size_t len,
                                             vmcore_raw_mode mode);

/**
 * Adds a PC board: keyboard controller, reset, ACPI power, clock. Serial and exit ports add it too.
 */
void vmcore_builder_add_pc(struct vmcore_builder *builder);

/**
 * Connects COM1 (ttyS0), by another call COM2, to a console. `console` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_add_serial(struct vmcore_builder *builder,
                                               struct vmcore_console *console);

/**
 * Ends the VM with VMCORE_OUTCOME_EXIT when the guest writes to port `base` or the three behind it.
 */
void vmcore_builder_set_exit_port(struct vmcore_builder *builder, uint16_t base);

/**
 * Attaches a disk. The handle stays the caller's, for statistics and limits; a disk is attached once.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_add_disk(struct vmcore_builder *builder,
                                             struct vmcore_disk *disk);

/**
 * Attaches a network card. The handle stays the caller's; a card is attached once.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_add_net(struct vmcore_builder *builder,
                                            struct vmcore_net *net);

/**
 * Attaches sockets to the guest. The handle stays the caller's; a device is attached once.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_add_vsock(struct vmcore_builder *builder,
                                              struct vmcore_vsock *vsock);

/**
 * Attaches a balloon. The handle stays the caller's; a device is attached once.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_add_balloon(struct vmcore_builder *builder,
                                                struct vmcore_balloon *balloon);

/**
 * Attaches a virtio console (hvc0). `console` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_add_virtio_console(struct vmcore_builder *builder,
                                                       struct vmcore_virtio_console *console);

/**
 * Attaches an entropy source.
 */
void vmcore_builder_add_rng(struct vmcore_builder *builder);

/**
 * Attaches a virtio device of the program's. The handle stays the caller's; a device is attached once.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_add_virtio(struct vmcore_builder *builder,
                                               struct vmcore_virtio *device);

/**
 * Has `attach` called while the VM is built, in the order of what is attached, to put devices of the program's on the
 * machine. `user` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_attach(struct vmcore_builder *builder,
                                           vmcore_attach_fn attach,
                                           void *user,
                                           vmcore_drop_fn drop);

/**
 * Makes the VM: memory, devices, vCPUs, and what it boots. `builder` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_builder_build(struct vmcore_builder *builder,
                                          struct vmcore_vm **out);

/**
 * Frees the settings and all that was attached.
 */
void vmcore_builder_delete(struct vmcore_builder *builder);

/**
 * Copies `len` bytes from `data`, for callbacks to return.
 */
struct vmcore_bytes *vmcore_bytes_new(const uint8_t *data, size_t len);

/**
 * The first byte. It lives as long as the object.
 */
const uint8_t *vmcore_bytes_data(const struct vmcore_bytes *bytes);

/**
 * The same as text.
 */
const char *vmcore_bytes_text(const struct vmcore_bytes *bytes);

/**
 * How many there are.
 */
size_t vmcore_bytes_len(const struct vmcore_bytes *bytes);

/**
 * Frees them.
 */
void vmcore_bytes_delete(struct vmcore_bytes *bytes);

/**
 * Standard input and output; on a terminal, Ctrl-A x stops the VM.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_console_stdio(struct vmcore_console **out);

/**
 * Nowhere.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_console_null(struct vmcore_console **out);

/**
 * Output goes to a function; there is no input. `user` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_console_callback(vmcore_output_fn output,
                                             void *user,
                                             vmcore_drop_fn drop,
                                             struct vmcore_console **out);

/**
 * A console of the functions in `ops`, which is copied. `input_fd` becomes readable when there is input again after
 * -EAGAIN, or is -1; it is duplicated, and stays the caller's. `user` is taken, where the call does not fail.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_console_custom(const struct vmcore_console_ops *ops,
                                           void *user,
                                           int32_t input_fd,
                                           struct vmcore_console **out);

/**
 * Output goes to the file at `path`, which is made or emptied, or where `append` is set appended to.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_console_file(const char *path,
                                         bool append,
                                         struct vmcore_console **out);

/**
 * A new pseudo-terminal; `path` gets the name of its other end.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_console_pty(struct vmcore_bytes **path,
                                        struct vmcore_console **out);

/**
 * Who connects to a Unix socket at `path`.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_console_socket(const char *path, struct vmcore_console **out);

/**
 * A script, which waits for output and types.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_console_script(struct vmcore_script **script,
                                           struct vmcore_console **out);

/**
 * Frees it, where no machine has taken it.
 */
void vmcore_console_delete(struct vmcore_console *console);

/**
 * Ends the run that is under way, or the next one at its begin. From any thread, callbacks included.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_control_end(const struct vmcore_control *control,
                                        struct vmcore_outcome outcome);

/**
 * Ends the run with an error, for a device that cannot go on. `error` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_control_fail(const struct vmcore_control *control,
                                         struct vmcore_error *error);

/**
 * Frees the handle.
 */
void vmcore_control_delete(struct vmcore_control *control);

/**
 * Everything that a backend of this host can present.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_cpuid_supported(vmcore_accel kind, struct vmcore_cpuid **out);

/**
 * What vCPU number `id` of a VM with `cpus` cores of one socket is told, for `model`: "best", "v1" to "v4", "host".
 * `irqchip` is whether the VM has interrupt controllers.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_cpuid_of_model(vmcore_accel kind,
                                           const char *model,
                                           uint32_t cpus,
                                           uint32_t id,
                                           bool irqchip,
                                           struct vmcore_cpuid **out);

/**
 * How many answers there are.
 */
size_t vmcore_cpuid_len(const struct vmcore_cpuid *cpuid);

/**
 * Answer number `index`.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_cpuid_get(const struct vmcore_cpuid *cpuid,
                                      size_t index,
                                      struct vmcore_cpuid_entry *out);

/**
 * Adds an answer, or replaces the one for its leaf and subleaf.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_cpuid_set(struct vmcore_cpuid *cpuid,
                                      const struct vmcore_cpuid_entry *entry);

/**
 * Frees it.
 */
void vmcore_cpuid_delete(struct vmcore_cpuid *cpuid);

/**
 * A device of the functions in `ops`, which is copied. `user` is taken, where the call does not fail.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_device_new(const struct vmcore_device_ops *ops,
                                       void *user,
                                       struct vmcore_device **out);

/**
 * Frees the handle; machines that the device is on keep it.
 */
void vmcore_device_delete(struct vmcore_device *device);

/**
 * The image at `path` of `format`: "raw", "qcow2", "vmdk", "vhdx", "vdi".
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_image_new(const char *path,
                                      const char *format,
                                      struct vmcore_image **out);

/**
 * The guest cannot write it, and others may read it too.
 */
void vmcore_image_set_read_only(struct vmcore_image *image);

/**
 * Past the host's page cache (O_DIRECT).
 */
void vmcore_image_set_direct(struct vmcore_image *image);

/**
 * What the image does not have itself is read from `backing`, which is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_image_set_backing(struct vmcore_image *image,
                                              struct vmcore_image *backing);

/**
 * A file that a VMDK descriptor may name as one of its extents.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_image_add_extent(struct vmcore_image *image, const char *path);

/**
 * Frees it.
 */
void vmcore_image_delete(struct vmcore_image *image);

/**
 * The raw image at `path`, for reading and writing. It is locked.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_disk_open(const char *path, struct vmcore_disk **out);

/**
 * The disk in an image, which is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_disk_open_image(struct vmcore_image *image,
                                            struct vmcore_disk **out);

/**
 * What the guest reads as the disk's serial number: at most 20 bytes.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_disk_set_serial(struct vmcore_disk *disk, const char *serial);

/**
 * How many queues it has, 1 to 256.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_disk_set_queues(struct vmcore_disk *disk, uint16_t count);

/**
 * When writes are stable.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_disk_set_cache(struct vmcore_disk *disk, vmcore_cache mode);

/**
 * What becomes of reads that the host fails, and of its other requests; VMCORE_ON_ERROR_REPORT unless said.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_disk_set_on_error(struct vmcore_disk *disk,
                                              vmcore_on_error reads,
                                              vmcore_on_error others);

/**
 * Why the disk stopped its VM, in words, until the VM runs again; a NULL where it did not.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_disk_stopped(const struct vmcore_disk *disk,
                                         struct vmcore_bytes **out);

/**
 * How many requests and bytes a second the guest may have of it; 0 is no limit. At any time.
 */
void vmcore_disk_set_limits(const struct vmcore_disk *disk, uint64_t operations, uint64_t bytes);

/**
 * Its length.
 */
uint64_t vmcore_disk_len(const struct vmcore_disk *disk);

/**
 * Makes it `len` bytes long, while the guest runs too; it cannot shrink.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_disk_resize(const struct vmcore_disk *disk, uint64_t len);

/**
 * What it did so far.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_disk_get_stats(const struct vmcore_disk *disk,
                                           struct vmcore_disk_stats *out);

/**
 * Frees the handle, and the disk where no machine has it.
 */
void vmcore_disk_delete(struct vmcore_disk *disk);

/**
 * Makes an error, for callbacks to return. `fix` may be NULL.
 */
struct vmcore_error *vmcore_error_new(vmcore_error_code code, const char *message, const char *fix);

/**
 * Which kind it is; 0 for NULL.
 */
vmcore_error_code vmcore_error_get_code(const struct vmcore_error *error);

/**
 * Which error it is exactly, in words that stay the same: "memory.overlap", "boot.open", "disk.locked",
 * "wrong_state"; "" for NULL. It lives as long as the error.
 */
const char *vmcore_error_name(const struct vmcore_error *error);

/**
 * What was tried, with which value, and what to do, in one line. It lives as long as the error.
 */
const char *vmcore_error_message(const struct vmcore_error *error);

/**
 * The part of the message that says what to do, or NULL where nothing is known. It lives as long as the error.
 */
const char *vmcore_error_fix(const struct vmcore_error *error);

/**
 * The operating system's error number (errno) that is behind it, or 0.
 */
int32_t vmcore_error_errno(const struct vmcore_error *error);

/**
 * Frees it.
 */
void vmcore_error_delete(struct vmcore_error *error);

/**
 * Looks at every backend; takes a few milliseconds.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_host_check(struct vmcore_report **out);

/**
 * All of it for people, in several lines. It lives as long as the report.
 */
const char *vmcore_report_text(const struct vmcore_report *report);

/**
 * How many backends there are.
 */
size_t vmcore_report_len(const struct vmcore_report *report);

/**
 * The name of a backend, or NULL where there is none of that number. It lives as long as the report.
 */
const char *vmcore_report_name(const struct vmcore_report *report, size_t index);

/**
 * How far it can be used.
 */
vmcore_status vmcore_report_status(const struct vmcore_report *report, size_t index);

/**
 * Why, in one sentence. It lives as long as the report.
 */
const char *vmcore_report_reason(const struct vmcore_report *report, size_t index);

/**
 * What the user should do; empty where there is nothing to do. It lives as long as the report.
 */
const char *vmcore_report_advice(const struct vmcore_report *report, size_t index);

/**
 * Frees it.
 */
void vmcore_report_delete(struct vmcore_report *report);

/**
 * Sets the wire's level, from any thread.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_irq_set(const struct vmcore_irq *irq, bool high);

/**
 * Raises and lowers the wire: one edge. From any thread.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_irq_pulse(const struct vmcore_irq *irq);

/**
 * Whether the wire is high.
 */
bool vmcore_irq_level(const struct vmcore_irq *irq);

/**
 * Lowers and frees it.
 */
void vmcore_irq_delete(struct vmcore_irq *irq);

/**
 * Has `function` get what is logged in this process up to `level`, in place of the one before, whose drop
 * function has been called when this returns. VMCORE_LOG_OFF with a NULL function ends logging. `user` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_log_set(vmcore_log_level level,
                                    vmcore_log_fn function,
                                    void *user,
                                    vmcore_drop_fn drop);

/**
 * Puts a device at `len` I/O ports from `base`. The device stays the caller's too.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_machine_insert_ports(struct vmcore_machine *machine,
                                                 uint16_t base,
                                                 uint16_t len,
                                                 const struct vmcore_device *device);

/**
 * Puts a device at `len` addresses from `base`. The device stays the caller's too.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_machine_insert_mmio(struct vmcore_machine *machine,
                                                uint64_t base,
                                                uint64_t len,
                                                const struct vmcore_device *device);

/**
 * Sets aside `len` addresses that neither memory nor another device uses, and tells the first.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_machine_mmio_window(struct vmcore_machine *machine,
                                                uint64_t len,
                                                uint64_t *out);

/**
 * Gives out the number of a global system interrupt; devices share them when all are given out.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_machine_allocate_gsi(struct vmcore_machine *machine,
                                                 uint32_t *out);

/**
 * The wire into global system interrupt `gsi`. It may outlive the machine.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_machine_irq(struct vmcore_machine *machine,
                                        uint32_t gsi,
                                        struct vmcore_irq **out);

/**
 * The machine's off switch, for devices to keep.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_machine_control(struct vmcore_machine *machine,
                                            struct vmcore_control **out);

/**
 * The guest's memory.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_machine_memory(struct vmcore_machine *machine,
                                           struct vmcore_memory **out);

/**
 * Copies `len` bytes of guest memory from `at` into `data`.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_memory_read(const struct vmcore_memory *memory,
                                        uint64_t at,
                                        uint8_t *data,
                                        size_t len);

/**
 * Copies `len` bytes from `data` to guest memory at `at`: all of them, or where it fails none.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_memory_write(const struct vmcore_memory *memory,
                                         uint64_t at,
                                         const uint8_t *data,
                                         size_t len);

/**
 * Sets `len` bytes from `at` to zero.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_memory_zero(const struct vmcore_memory *memory,
                                        uint64_t at,
                                        uint64_t len);

/**
 * Sum of the lengths of all regions.
 */
uint64_t vmcore_memory_total(const struct vmcore_memory *memory);

/**
 * Whether all of `len` bytes from `at` are memory.
 */
bool vmcore_memory_contains(const struct vmcore_memory *memory, uint64_t at, uint64_t len);

/**
 * How many regions there are.
 */
size_t vmcore_memory_regions(const struct vmcore_memory *memory);

/**
 * Base and length of region number `index`, in the order of their bases.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_memory_region(const struct vmcore_memory *memory,
                                          size_t index,
                                          uint64_t *base,
                                          uint64_t *len);

/**
 * A view of `len` bytes from `at`, which must be in one region that the guest can write. What is written through it is
 * not seen by dirty tracking, nor by a vCPU of the software CPU that has run code there: write code by
 * vmcore_memory_write. The guest may change the bytes at any moment.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_memory_view(const struct vmcore_memory *memory,
                                        uint64_t at,
                                        size_t len,
                                        struct vmcore_view **out);

/**
 * The first byte. It lives as long as the view, also where the VM does not.
 */
uint8_t *vmcore_view_data(const struct vmcore_view *view);

/**
 * How many bytes it has.
 */
size_t vmcore_view_len(const struct vmcore_view *view);

/**
 * Frees it.
 */
void vmcore_view_delete(struct vmcore_view *view);

/**
 * Frees the handle; the memory is the VM's.
 */
void vmcore_memory_delete(struct vmcore_memory *memory);

/**
 * A card on a tap of this name.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_net_tap(const char *name, struct vmcore_net **out);

/**
 * A card with a pair of queues for each of `queues` of a tap.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_net_tap_queues(const char *name,
                                           uint16_t queues,
                                           struct vmcore_net **out);

/**
 * A card on an open descriptor of a tap or Unix socket, which is duplicated.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_net_fd(int32_t fd, struct vmcore_net **out);

/**
 * A card on what listens at a Unix socket: passt, QEMU.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_net_unix(const char *path, struct vmcore_net **out);

/**
 * A card on a NAT. The handle stays the caller's; a NAT is behind one card.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_net_nat(struct vmcore_nat *nat, struct vmcore_net **out);

/**
 * The card's address, six bytes.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_net_set_mac(struct vmcore_net *net, const uint8_t (*mac)[6]);

/**
 * Tells the guest that the largest IP packet has `mtu` bytes, at least 68; a tap and a NAT know theirs.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_net_set_mtu(struct vmcore_net *net, uint16_t mtu);

/**
 * Limits what goes through the card to so many bytes each second, in each direction.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_net_set_limit(struct vmcore_net *net, uint64_t bytes_per_second);

/**
 * Records all packets of the card in a new file at `path`, or in place of what it has, for tcpdump and Wireshark.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_net_record(struct vmcore_net *net,
                                       const char *path);

/**
 * What went through it so far.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_net_get_stats(const struct vmcore_net *net,
                                          struct vmcore_net_stats *out);

/**
 * Connects or disconnects the cable, while the guest runs too.
 */
void vmcore_net_set_link(const struct vmcore_net *net, bool up);

/**
 * Frees the handle, and the card where no machine has it.
 */
void vmcore_net_delete(struct vmcore_net *net);

/**
 * A NAT with DHCP, names and no forwards, by which the guest reaches everything.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_nat_new(struct vmcore_nat **out);

/**
 * Leads a port of the host to one of the guest: "tcp:8080:80", "udp:192.0.2.1:5353:53". At any time.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_nat_forward(const struct vmcore_nat *nat, const char *forward);

/**
 * Ends a forward, which the same text began; `was_there` tells whether it did. Its connections go on.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_nat_remove_forward(const struct vmcore_nat *nat,
                                               const char *forward,
                                               bool *was_there);

/**
 * The forwards that there are, one in a line, with the ports that the host chose where 0 was asked for.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_nat_forwards(const struct vmcore_nat *nat,
                                         struct vmcore_bytes **out);

/**
 * The guest may reach a destination: "any", "10.0.0.0/8", "tcp:10.0.0.0/8:80-90". The first rule that fits counts.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_nat_allow(struct vmcore_nat *nat,
                                      const char *destination);

/**
 * The guest may not reach a destination.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_nat_deny(struct vmcore_nat *nat, const char *destination);

/**
 * Whether the guest may reach what no rule is about, as it may unless said.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_nat_otherwise(struct vmcore_nat *nat, bool allow);

/**
 * The largest IP packet that the guest is told of, in bytes.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_nat_set_mtu(struct vmcore_nat *nat, uint16_t mtu);

/**
 * Has the gateway's address stand for this host's loopback address.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_nat_gateway_is_host(struct vmcore_nat *nat);

/**
 * Asks these resolvers for names, separated by commas ("192.0.2.53,[::1]:5353"), in place of those of
 * /etc/resolv.conf. "" means none.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_nat_set_resolvers(struct vmcore_nat *nat, const char *resolvers);

/**
 * Answers for `name` with these addresses, separated by commas.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_nat_add_name(struct vmcore_nat *nat,
                                         const char *name,
                                         const char *addresses);

/**
 * What it has done so far.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_nat_get_stats(const struct vmcore_nat *nat,
                                          struct vmcore_nat_stats *out);

/**
 * Frees the handle, and the NAT where no card has it.
 */
void vmcore_nat_delete(struct vmcore_nat *nat);

/**
 * Writes what happened in a word or two ("PowerOff", "Exit(7)") to the `len` bytes at `buffer`, as snprintf does:
 * cut where it does not fit, with a zero byte at its end. Returns the length of the whole.
 */
size_t vmcore_outcome_format(struct vmcore_outcome outcome,
                             char *buffer,
                             size_t len);

/**
 * Holds all vCPUs and device threads, running or not, and returns once they stand still. From any thread but the VM's
 * own: not from callbacks of devices.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_pause(const struct vmcore_vm *vm,
                                     struct vmcore_pause **out);

/**
 * The state of vCPUs and machine. Memory can be read meanwhile; devices are not part of it.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_pause_save(const struct vmcore_pause *pause,
                                       struct vmcore_state **out);

/**
 * Takes over a state from vmcore_pause_save, of this VM or of one built alike.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_pause_restore(struct vmcore_pause *pause,
                                          const struct vmcore_state *state);

/**
 * A fingerprint of the state of vCPUs, machine, memory and devices: 64 hexadecimal digits.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_pause_hash(const struct vmcore_pause *pause,
                                       struct vmcore_bytes **out);

/**
 * Lets the VM go on, where no other pause holds it.
 */
void vmcore_pause_delete(struct vmcore_pause *pause);

/**
 * A region of `len` bytes at `base`, both multiples of 4096.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_region_new(uint64_t base,
                                       uint64_t len,
                                       struct vmcore_region **out);

/**
 * The guest cannot write it.
 */
void vmcore_region_set_read_only(struct vmcore_region *region, bool yes);

/**
 * Which pages are written is noted: vmcore_vm_take_dirty.
 */
void vmcore_region_set_track_dirty(struct vmcore_region *region, bool yes);

/**
 * The host may merge its pages with equal ones.
 */
void vmcore_region_set_mergeable(struct vmcore_region *region, bool yes);

/**
 * All of it is there from the start.
 */
void vmcore_region_set_prefault(struct vmcore_region *region, bool yes);

/**
 * Which host pages back it.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_region_set_huge_pages(struct vmcore_region *region,
                                                  vmcore_huge_pages kind);

/**
 * On which NUMA nodes of the host its pages are placed: on the `count` of them at `nodes`, by `policy`.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_region_set_numa(struct vmcore_region *region,
                                            vmcore_numa policy,
                                            const uint32_t *nodes,
                                            size_t count);

/**
 * Backed by an unnamed file in memory, which other processes can map.
 */
void vmcore_region_set_memfd(struct vmcore_region *region);

/**
 * Backed by the open file `fd` from `offset`. Writes reach the file where `shared`, else they stay here. The
 * descriptor is duplicated, and stays the caller's.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_region_set_file(struct vmcore_region *region,
                                            int32_t fd,
                                            uint64_t offset,
                                            bool shared);

/**
 * Its first `len` bytes are a copy of those at `data`, also where the guest cannot write it.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_region_set_contents(struct vmcore_region *region,
                                                const uint8_t *data,
                                                size_t len);

/**
 * Frees the settings.
 */
void vmcore_region_delete(struct vmcore_region *region);

/**
 * A flat 4 GiB segment of privilege level 0: code (1) or data (0).
 */
struct vmcore_segment vmcore_segment_flat(uint16_t selector, bool code);

/**
 * A 64-bit code segment of privilege level 0.
 */
struct vmcore_segment vmcore_segment_long_code(uint16_t selector);

/**
 * Waits until the guest has put out `pattern`, `milliseconds` at most, and tells all it put out since the last match
 * up to the pattern; `out` may be NULL. Fails with VMCORE_ERROR_TIMEOUT, or VMCORE_ERROR_CLOSED when the VM is gone.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_script_expect(const struct vmcore_script *script,
                                          const char *pattern,
                                          uint64_t milliseconds,
                                          struct vmcore_bytes **out);

/**
 * Types `len` bytes. They wait until the guest reads them.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_script_send(const struct vmcore_script *script,
                                        const uint8_t *data,
                                        size_t len);

/**
 * Ends the input.
 */
void vmcore_script_close_input(const struct vmcore_script *script);

/**
 * All output so far, as far as it is kept.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_script_transcript(const struct vmcore_script *script,
                                              struct vmcore_bytes **out);

/**
 * Frees it.
 */
void vmcore_script_delete(struct vmcore_script *script);

/**
 * The state as bytes, to be kept or sent.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_state_to_bytes(const struct vmcore_state *state,
                                           struct vmcore_bytes **out);

/**
 * The state that `len` bytes from vmcore_state_to_bytes are.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_state_from_bytes(const uint8_t *data,
                                             size_t len,
                                             struct vmcore_state **out);

/**
 * Frees it.
 */
void vmcore_state_delete(struct vmcore_state *state);

/**
 * Its number, which is its APIC id.
 */
uint32_t vmcore_vcpu_id(const struct vmcore_vcpu *vcpu);

/**
 * Runs the guest on this thread; devices on the VM answer its I/O, and what none claims reads as ones.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vcpu_run(const struct vmcore_vcpu *vcpu, struct vmcore_exit *out);

/**
 * Runs the guest on this thread; `io` answers all of its I/O, the VM's devices none. To stop from inside, kick
 * the vCPU. `user` is the caller's, and used until this returns.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_run_with(const struct vmcore_vcpu *vcpu,
                                          vmcore_io_fn io,
                                          void *user,
                                          struct vmcore_exit *out);

/**
 * As vmcore_vcpu_run on a deterministic VM, for at most `count` instructions.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_run_instructions(const struct vmcore_vcpu *vcpu,
                                                  uint64_t count,
                                                  struct vmcore_exit *out);

/**
 * Makes the current or next run return VMCORE_EXIT_KICKED. From any thread, callbacks included.
 */
void vmcore_vcpu_kick(const struct vmcore_vcpu *vcpu);

/**
 * A handle that stops the vCPU and may outlive it.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_kick_new(const struct vmcore_vcpu *vcpu,
                                     struct vmcore_kick **out);

/**
 * As vmcore_vcpu_kick.
 */
void vmcore_kick_now(const struct vmcore_kick *kick);

/**
 * Frees it.
 */
void vmcore_kick_delete(struct vmcore_kick *kick);

/**
 * General-purpose registers, RIP and RFLAGS.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_regs(const struct vmcore_vcpu *vcpu,
                                      struct vmcore_regs *out);

/**
 * Sets what vmcore_vcpu_regs tells.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_set_regs(const struct vmcore_vcpu *vcpu,
                                          const struct vmcore_regs *regs);

/**
 * Segments, descriptor tables, control registers.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_sregs(const struct vmcore_vcpu *vcpu,
                                       struct vmcore_sregs *out);

/**
 * Sets what vmcore_vcpu_sregs tells.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_set_sregs(const struct vmcore_vcpu *vcpu,
                                           const struct vmcore_sregs *sregs);

/**
 * Sets the vCPU to run 16-bit code at the address `at` below 1 MiB, with all segments there and a stack that
 * grows down from it.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vcpu_enter_real_mode(const struct vmcore_vcpu *vcpu, uint64_t at);

/**
 * Translates a guest virtual address; `mapped` tells whether anything is there.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_translate(const struct vmcore_vcpu *vcpu,
                                           uint64_t gva,
                                           uint64_t *out,
                                           bool *mapped);

/**
 * Sets what the vCPU stops for: after every instruction, at INT3, and at the addresses and conditions of
 * `dr`, DR0 to DR3 and DR7 in the hardware's layout; `dr` may be NULL.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_set_debug(const struct vmcore_vcpu *vcpu,
                                           bool single_step,
                                           bool software_breakpoints,
                                           const uint64_t (*dr)[5]);

/**
 * Raises a non-maskable interrupt.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vcpu_inject_nmi(const struct vmcore_vcpu *vcpu);

/**
 * What CPUID tells the guest.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_cpuid(const struct vmcore_vcpu *vcpu,
                                       struct vmcore_cpuid **out);

/**
 * Sets what CPUID tells the guest, before the first run.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_set_cpuid(const struct vmcore_vcpu *vcpu,
                                           const struct vmcore_cpuid *cpuid);

/**
 * Sets the frequency of the guest's TSC in kHz, before the first run.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vcpu_set_tsc_khz(const struct vmcore_vcpu *vcpu, uint32_t khz);

/**
 * How often the vCPU left the guest, by reason.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_get_stats(const struct vmcore_vcpu *vcpu,
                                           struct vmcore_vcpu_stats *out);

/**
 * All of the vCPU's state.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_save(const struct vmcore_vcpu *vcpu,
                                      struct vmcore_state **out);

/**
 * Takes over a state from vmcore_vcpu_save, of any backend.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vcpu_restore(const struct vmcore_vcpu *vcpu,
                                         const struct vmcore_state *state);

/**
 * Frees it. It must not be running.
 */
void vmcore_vcpu_delete(struct vmcore_vcpu *vcpu);

/**
 * A balloon of nothing, with free-page reporting.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_balloon_new(struct vmcore_balloon **out);

/**
 * Wishes `bytes` of the guest's memory in the balloon; the guest follows as it can.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_balloon_set_target(const struct vmcore_balloon *balloon,
                                               uint64_t bytes);

/**
 * Bytes that the guest says are in the balloon.
 */
uint64_t vmcore_balloon_actual(const struct vmcore_balloon *balloon);

/**
 * Frees the handle, and the balloon where no machine has it.
 */
void vmcore_balloon_delete(struct vmcore_balloon *balloon);

/**
 * A console whose terminal is `console`, which is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_virtio_console_new(struct vmcore_console *console,
                                               struct vmcore_virtio_console **out);

/**
 * Adds a port called `name` for programs of the guest. `console` is taken. The object is not to be used where this
 * fails, but deleted.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_virtio_console_add_port(struct vmcore_virtio_console *to,
                                                    const char *name,
                                                    struct vmcore_console *console);

/**
 * Frees it, where no machine has taken it.
 */
void vmcore_virtio_console_delete(struct vmcore_virtio_console *console);

/**
 * A device of virtio type `kind` that offers `features` and has queues of these sizes, powers of two up to 32768. `ops`
 * is copied. `user` is taken, where the call does not fail.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_virtio_new(uint32_t kind,
                                       uint64_t features,
                                       const uint16_t *queue_sizes,
                                       size_t queues,
                                       const struct vmcore_virtio_ops *ops,
                                       void *user,
                                       struct vmcore_virtio **out);

/**
 * Has `serve` called for the requests that wait. From any thread.
 */
void vmcore_virtio_wake(const struct vmcore_virtio *device);

/**
 * Frees the handle, and the device where no machine has it.
 */
void vmcore_virtio_delete(struct vmcore_virtio *device);

/**
 * How many bytes of the driver's are still to be read.
 */
size_t vmcore_chain_readable(struct vmcore_chain *request);

/**
 * How many bytes can still be written for the driver.
 */
size_t vmcore_chain_writable(struct vmcore_chain *request);

/**
 * Takes up to `len` of the driver's bytes, and tells how many there were.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_chain_read(struct vmcore_chain *request,
                                       uint8_t *data,
                                       size_t len,
                                       size_t *out);

/**
 * Writes up to `len` bytes for the driver, and tells how many had room.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_chain_write(struct vmcore_chain *request,
                                        const uint8_t *data,
                                        size_t len,
                                        size_t *out);

/**
 * A VM without memory, devices and vCPUs, for programs that do it all themselves.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vm_bare(vmcore_accel kind, struct vmcore_vm **out);

/**
 * As vmcore_vm_bare, with interrupt controllers and a PIT.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vm_bare_with_irqchip(vmcore_accel kind, struct vmcore_vm **out);

/**
 * A VM that does the same in every run, on the software CPU; with interrupt controllers and a PIT where `irqchip`.
 * vmcore_vcpu_run_instructions runs its vCPUs, one at a time. `seed` is where its random numbers begin.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_bare_deterministic(uint64_t seed,
                                                  bool irqchip,
                                                  struct vmcore_vm **out);

/**
 * Name of the backend that runs it: "kvm", "soft". It lives as long as the VM.
 */
const char *vmcore_vm_backend(const struct vmcore_vm *vm);

/**
 * The guest's memory.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vm_memory(const struct vmcore_vm *vm, struct vmcore_memory **out);

/**
 * Makes `len` bytes of anonymous memory at `base` the guest's, both multiples of 4096.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vm_map(const struct vmcore_vm *vm, uint64_t base, uint64_t len);

/**
 * Makes a region the guest's memory. `region` is taken.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_map_region(const struct vmcore_vm *vm,
                                          struct vmcore_region *region);

/**
 * Takes the memory that begins at `base` away from the guest.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vm_unmap(const struct vmcore_vm *vm, uint64_t base);

/**
 * Takes the pages of the region at `base` that were written since the last call, a bit a page from the lowest bit
 * of the first byte on, and clears them.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_take_dirty(const struct vmcore_vm *vm,
                                          uint64_t base,
                                          struct vmcore_bytes **out);

/**
 * Makes vCPU number `id`, to be run by the caller.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_create_vcpu(const struct vmcore_vm *vm,
                                           uint32_t id,
                                           struct vmcore_vcpu **out);

/**
 * Puts a device at `len` I/O ports from `base`. The device stays the caller's too.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_insert_ports(const struct vmcore_vm *vm,
                                            uint16_t base,
                                            uint16_t len,
                                            const struct vmcore_device *device);

/**
 * Puts a device at `len` addresses from `base`. The device stays the caller's too.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_insert_mmio(const struct vmcore_vm *vm,
                                           uint64_t base,
                                           uint64_t len,
                                           const struct vmcore_device *device);

/**
 * Takes the device whose ports begin at `base` away, and tells whether there was one.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_remove_ports(const struct vmcore_vm *vm,
                                            uint16_t base,
                                            bool *out);

/**
 * Takes the device whose addresses begin at `base` away, and tells whether there was one.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_remove_mmio(const struct vmcore_vm *vm,
                                           uint64_t base,
                                           bool *out);

/**
 * The wire into global system interrupt `gsi`, 0 to 23, of a VM with interrupt controllers.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_irq(const struct vmcore_vm *vm,
                                   uint32_t gsi,
                                   struct vmcore_irq **out);

/**
 * Delivers a message-signalled interrupt.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_send_msi(const struct vmcore_vm *vm,
                                        uint64_t address,
                                        uint32_t data);

/**
 * Runs the guest until it ends or is stopped, and tells how it ended.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vm_run(const struct vmcore_vm *vm, struct vmcore_outcome *out);

/**
 * As vmcore_vm_run, for `milliseconds` at most: another run goes on where this one stopped.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_run_for(const struct vmcore_vm *vm,
                                       uint64_t milliseconds,
                                       struct vmcore_outcome *out);

/**
 * As vmcore_vm_run of a deterministic VM, for `count` instructions of all its vCPUs together.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_run_instructions(const struct vmcore_vm *vm,
                                                uint64_t count,
                                                struct vmcore_outcome *out);

/**
 * How many instructions the vCPUs of a deterministic VM have executed; 0 of another.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vm_instructions(const struct vmcore_vm *vm, uint64_t *out);

/**
 * Ends the run that is under way, or the next one at its begin, with VMCORE_OUTCOME_STOPPED. From any thread.
 */
void vmcore_vm_stop(const struct vmcore_vm *vm);

/**
 * Presses the power button of a VM with a PC board; whether it has one.
 */
bool vmcore_vm_press_power_button(const struct vmcore_vm *vm);

/**
 * The machine's off switch. It may outlive the VM.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_control(const struct vmcore_vm *vm,
                                       struct vmcore_control **out);

/**
 * The sums of what all vCPUs did so far.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vm_get_stats(const struct vmcore_vm *vm,
                                         struct vmcore_vcpu_stats *out);

/**
 * Frees the VM, and stops its threads. It must not be running. Its memory stays while views and handles of it
 * are there.
 */
void vmcore_vm_delete(struct vmcore_vm *vm);

/**
 * For a guest that others know as `cid`, 3 or more.
 */
VMCORE_MUST_USE struct vmcore_error *vmcore_vsock_new(uint32_t cid, struct vmcore_vsock **out);

/**
 * Listens on a Unix socket at `path` for programs of the host, which send "CONNECT PORT", and connects the guest to
 * those that listen on path_PORT.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vsock_set_socket(struct vmcore_vsock *vsock,
                                             const char *path);

/**
 * Connects to a port of the guest, `milliseconds` at most; the descriptor of the stream is the caller's.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vsock_connect(const struct vmcore_vsock *vsock,
                                          uint32_t port,
                                          uint64_t milliseconds,
                                          int32_t *out);

/**
 * Listens on a port of the host (CID 2): the guest's connections to it come here, and to no Unix socket. Up to 128
 * wait to be accepted.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vsock_listen(const struct vmcore_vsock *vsock,
                                         uint32_t port,
                                         struct vmcore_vsock_listener **out);

/**
 * Waits for the guest's next connection, `milliseconds` at most; the descriptor of the stream is the caller's.
 */
VMCORE_MUST_USE
struct vmcore_error *vmcore_vsock_listener_accept(const struct vmcore_vsock_listener *listener,
                                                  uint64_t milliseconds,
                                                  int32_t *out);

/**
 * Frees it, and the port.
 */
void vmcore_vsock_listener_delete(struct vmcore_vsock_listener *listener);

/**
 * Frees the handle, and the device where no machine has it.
 */
void vmcore_vsock_delete(struct vmcore_vsock *vsock);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* VMCORE_H */
