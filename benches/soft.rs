//! The software CPU: a stock kernel from process start to its init, beside QEMU's TCG, with the memory
//! that vmrun takes besides the guest's; and millions of instructions a second of branchy integer code,
//! beside the host's processor.
//!
//! `cargo bench -p vmcore-benches --bench soft [-- ROUNDS]`
//!
//! vmrun and QEMU get the same vmlinux, initrd, command line and memory, take turns, and are killed when
//! init has said its first line. Processor time is that of the whole process (wait4(2)). The integer
//! code is compiled into this program: the guest executes a copy of it. Guests are those of
//! `make guests`, in `$VMCORE_GUESTS` or target/guests; without them, or without QEMU, what wants them
//! is skipped and says so.

use std::error::Error;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmcore_benches::{build_vmrun, median, wait};

/// The software CPU's processor time may be so many times TCG's.
const RATIO_BOUND: f64 = 2.0;
/// What vmrun may have resident besides the guest's memory: the program's own, and the decoded blocks.
const OWN_BOUND_KIB: u64 = (32 + 16) << 10;
/// Least millions of instructions a second, and what is aimed at.
const MIPS_BOUND: f64 = 100.0;
const MIPS_AIM: f64 = 350.0;

const ROUNDS: usize = 5;
const MEMORY_MIB: u64 = 512;
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 vmtest=poweroff";
const INIT: &[u8] = b"vmcore-guest: init";
/// A guest that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(120);

/// One boot of a guest.
struct Boot {
    cpu: Duration,
    wall: Duration,
    /// KiB resident besides the guest's memory, and in it, when init began.
    own_kib: u64,
    guest_kib: u64,
}

/// What is resident of process `pid`: besides the guest's memory, and in that, in KiB (proc(5), smaps).
/// The guest's memory is the smallest mapping that it fits in.
fn resident(pid: u32) -> Result<(u64, u64), Box<dyn Error>> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let values = |key: &str| -> Vec<u64> {
        let lines = smaps.lines().filter_map(|line| line.strip_prefix(key));
        lines.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect()
    };
    let (sizes, resident) = (values("Size:"), values("Rss:"));
    let total: u64 = resident.iter().sum();
    let fits = |&(size, _): &(u64, u64)| size >= MEMORY_MIB << 10;
    let (_, guest) = sizes.into_iter().zip(resident).filter(fits).min().ok_or("no guest memory")?;
    Ok((total - guest, guest))
}

fn boot(program: &Path, args: &[OsString]) -> Result<Boot, Box<dyn Error>> {
    let begin = Instant::now();
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{}: {e}", program.display()))?;
    let mut console = child.stdout.take().ok_or("no pipe")?;
    let (mut output, mut part) = (Vec::new(), [0; 4096]);
    let reached = loop {
        let len = console.read(&mut part)?;
        output.extend_from_slice(&part[..len]);
        let from = output.len().saturating_sub(len + INIT.len());
        if output[from..].windows(INIT.len()).any(|window| window == INIT) {
            break true;
        }
        if len == 0 || begin.elapsed() > TIMEOUT {
            break false;
        }
    };
    let wall = begin.elapsed();
    let resident = resident(child.id());
    child.kill()?;
    let ended = wait(child.id())?;
    if !reached {
        let tail = String::from_utf8_lossy(&output[output.len().saturating_sub(500)..]).into_owned();
        return Err(format!("{} did not reach init: ...{tail}", program.display()).into());
    }
    let (own_kib, guest_kib) = resident?;
    Ok(Boot { cpu: ended.cpu, wall, own_kib, guest_kib })
}

fn boots(rounds: usize) -> Result<(), Box<dyn Error>> {
    let guests = std::env::var_os("VMCORE_GUESTS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests"), PathBuf::from);
    let [kernel, initrd] = ["vmlinux", "initrd.img"].map(|name| guests.join("cloud").join(name));
    if let Some(missing) = [&kernel, &initrd].into_iter().find(|path| !path.exists()) {
        println!("SKIPPED: boots: no {} (make guests)", missing.display());
        return Ok(());
    }
    let arguments = |fixed: String, [kernel_option, initrd_option, line_option]: [&str; 3]| {
        let mut args: Vec<OsString> = fixed.split_whitespace().map(OsString::from).collect();
        args.extend([kernel_option.into(), kernel.clone().into_os_string()]);
        args.extend([initrd_option.into(), initrd.clone().into_os_string()]);
        args.extend([line_option.into(), COMMAND_LINE.into()]);
        args
    };
    let ours =
        arguments(format!("--accel soft --memory {MEMORY_MIB}M"), ["--kernel", "--initrd", "--cmdline"]);
    let theirs = arguments(
        format!(
            "-M microvm,acpi=off -accel tcg -cpu max -m {MEMORY_MIB} -nodefaults -no-user-config \
             -display none -serial stdio -no-reboot"
        ),
        ["-kernel", "-initrd", "-append"],
    );
    let vmrun = build_vmrun()?;
    let qemu = Path::new("qemu-system-x86_64");
    let mut results: [Vec<Boot>; 2] = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        // Neither side always goes first.
        for side in [round % 2, 1 - round % 2] {
            let (program, args) = [(&*vmrun, &ours), (qemu, &theirs)][side];
            match boot(program, args) {
                Ok(boot) => results[side].push(boot),
                Err(error) if side == 1 && results[1].is_empty() => {
                    if round == 0 {
                        println!("SKIPPED: the comparison with QEMU: {error}");
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
    println!("process start to init, {MEMORY_MIB} MiB, medians of {rounds}:");
    let mut times = Vec::new();
    for (name, boots) in ["vmrun --accel soft", "QEMU microvm, TCG"].into_iter().zip(&results) {
        if boots.is_empty() {
            continue;
        }
        let cpu = median(boots.iter().map(|boot| boot.cpu).collect());
        let wall = median(boots.iter().map(|boot| boot.wall).collect());
        let most = |of: fn(&Boot) -> u64| boots.iter().map(of).max().unwrap_or(0);
        println!(
            "{name:<20} CPU {cpu:>8.2?}   wall {wall:>8.2?}   resident at init: guest memory {} KiB, \
             all else {} KiB",
            most(|boot| boot.guest_kib),
            most(|boot| boot.own_kib),
        );
        times.push(cpu.as_secs_f64());
    }
    let held = |holds| if holds { "holds" } else { "DOES NOT HOLD" };
    if let [ours, theirs] = times[..] {
        let ratio = ours / theirs;
        println!("CPU time, vmrun / QEMU: {ratio:.3}; at most {RATIO_BOUND}: {}", held(ratio <= RATIO_BOUND));
    }
    let own = results[0].iter().map(|boot| boot.own_kib).max().unwrap_or(0);
    println!("besides the guest's memory at most {OWN_BOUND_KIB} KiB: {}", held(own <= OWN_BOUND_KIB));
    Ok(())
}

#[cfg(target_arch = "x86_64")]
mod mix {
    //! Branchy integer code, by the guest and by the host.

    use std::time::{Duration, Instant};

    use vmcore::{Accel, GuestAddress, MemoryRegion, Vcpu, VcpuExit, Vm};
    use vmcore_benches::median;

    use crate::{MIPS_AIM, MIPS_BOUND};

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
        let held = |holds| if holds { "holds" } else { "DOES NOT HOLD" };
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
}

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds --bench.
    let rounds = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(ROUNDS).max(1);
    #[cfg(target_arch = "x86_64")]
    mix::run(rounds)?;
    boots(rounds)
}
