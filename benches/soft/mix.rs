//! Branchy integer code, by the guest and by the host.

use std::time::{Duration, Instant};

use vmcore::{Accel, GuestAddress, MemoryRegion, Vcpu, VcpuExit, Vm};
use vmcore_benches::median;

use crate::held;

/// Least millions of instructions a second, and what is aimed at.
const MIPS_BOUND: f64 = 100.0;
const MIPS_AIM: f64 = 350.0;

// Sieves 64 Ki numbers, follows the Collatz sequences below 20,000, and computes the 20th Fibonacci
// number by recursion, RSI times; returns a checksum. RDI is a buffer of 64 KiB.
std::arch::global_asm!(
    "vmcore_bench_mix:",
    "push rbx",
    "push rbp",
    "push r12",
    "mov rbx, rdi",
    "mov ebp, esi",
    "xor r8d, r8d",
    "2:",
    "xor ecx, ecx",
    "3:",
    "mov qword ptr [rbx + rcx], 0",
    "add ecx, 8",
    "cmp ecx, 0x10000",
    "jb 3b",
    "mov esi, 2",
    "4:",
    "cmp byte ptr [rbx + rsi], 0",
    "jne 6f",
    "add r8, rsi",
    "lea edx, [rsi + rsi]",
    "cmp edx, 0x10000",
    "jae 6f",
    "5:",
    "mov byte ptr [rbx + rdx], 1",
    "add edx, esi",
    "cmp edx, 0x10000",
    "jb 5b",
    "6:",
    "inc esi",
    "cmp esi, 0x10000",
    "jb 4b",
    "mov ecx, 20000",
    "7:",
    "mov rax, rcx",
    "8:",
    "cmp rax, 1",
    "je 33f",
    "inc r8",
    "test al, 1",
    "jne 9f",
    "shr rax, 1",
    "jmp 8b",
    "9:",
    "lea rax, [rax + rax * 2 + 1]",
    "jmp 8b",
    "33:",
    "dec ecx",
    "jne 7b",
    "mov edi, 20",
    "call 34f",
    "add r8, rax",
    "dec ebp",
    "jne 2b",
    "mov rax, r8",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    "34:",
    "cmp edi, 2",
    "jb 35f",
    "push r12",
    "push rdi",
    "sub edi, 1",
    "call 34b",
    "mov r12, rax",
    "pop rdi",
    "sub edi, 2",
    "call 34b",
    "add rax, r12",
    "pop r12",
    "ret",
    "35:",
    "mov eax, edi",
    "ret",
    "vmcore_bench_mix_end:",
);

unsafe extern "C" {
    fn vmcore_bench_mix(buffer: *mut u8, turns: u32) -> u64;
    static vmcore_bench_mix_end: u8;
}

const TURNS: u32 = 4;
const BUFFER_LEN: usize = 64 << 10;
const MEMORY: u64 = 4 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const CODE: u64 = 0x3000;
/// A HLT, which the code returns to.
const END: u64 = 0x4000;
const STACK: u64 = 0x2_0000;
const BUFFER: u64 = 0x10_0000;

fn code() -> &'static [u8] {
    let start = vmcore_bench_mix as *const u8;
    let len = (&raw const vmcore_bench_mix_end).addr() - start.addr();
    // SAFETY: the assembler has put as many bytes between the two labels, in this program's text.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local that the call fills.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

/// A vCPU in 64-bit mode before the code; returns to a HLT.
fn guest() -> vmcore::Result<(Vm, Vcpu)> {
    let vm = Vm::bare(Accel::Soft)?;
    vm.map(MemoryRegion::anonymous(GuestAddress(0), MEMORY)?)?;
    // 1 GiB as it is: present, writable, and a large page.
    for (at, value) in [(PML4, PDPT | 3), (PDPT, 0x83)] {
        vm.memory().write(GuestAddress(at), &value.to_le_bytes())?;
    }
    vm.memory().write(GuestAddress(CODE), code())?;
    vm.memory().write(GuestAddress(END), &[0xf4])?;
    let vcpu = vm.create_vcpu(0)?;
    Ok((vm, vcpu))
}

fn enter(vm: &Vm, vcpu: &mut Vcpu) -> vmcore::Result<()> {
    use vmcore::state::{Regs, Segment};
    let mut sregs = vcpu.sregs()?;
    let data = Segment::flat(0x10, false);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cs = Segment::long_code(8);
    // PE and PG; PAE; LME and LMA.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, PML4, 0x20, 0x500);
    vcpu.set_sregs(&sregs)?;
    vm.memory().write(GuestAddress(STACK), &END.to_le_bytes())?;
    vcpu.set_regs(&Regs {
        rip: CODE,
        rsp: STACK,
        rdi: BUFFER,
        rsi: TURNS.into(),
        rflags: 2,
        ..Regs::default()
    })
}

fn instructions(vcpu: &Vcpu) -> u64 {
    vcpu.backend_stats().iter().find(|(name, _)| name == "instructions").map_or(0, |&(_, n)| n)
}

pub fn run(rounds: usize) -> vmcore::Result<()> {
    let (vm, mut vcpu) = guest()?;
    let mut buffer = vec![0u8; BUFFER_LEN];
    let (mut ours, mut hosts, mut executed) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        enter(&vm, &mut vcpu)?;
        let (before, begin) = (instructions(&vcpu), cpu_time());
        assert_eq!(vcpu.run_with(|_| ())?, VcpuExit::Halted);
        ours.push(cpu_time() - begin);
        executed = instructions(&vcpu) - before;
        let begin = Instant::now();
        // SAFETY: the code is a function of the C ABI that writes to 64 KiB at its first argument.
        let sum = unsafe { vmcore_bench_mix(buffer.as_mut_ptr(), TURNS) };
        hosts.push(begin.elapsed());
        assert_eq!(vcpu.regs()?.rax, sum, "guest and host do not agree");
    }
    let mips = |times| executed as f64 / median(times).as_secs_f64() / 1e6;
    let (ours, hosts) = (mips(ours), mips(hosts));
    println!(
        "branchy integer mix, {executed} instructions, medians of {rounds}: {ours:.0} MIPS; the host \
         itself {hosts:.0}, {:.1} times as many",
        hosts / ours
    );
    println!(
        "at least {MIPS_BOUND} MIPS: {}; the aim of {MIPS_AIM}: {}",
        held(ours >= MIPS_BOUND),
        held(ours >= MIPS_AIM)
    );
    Ok(())
}
