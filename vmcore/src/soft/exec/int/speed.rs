//! How fast integer code runs: `cargo test --release -p vmcore --lib speed -- --ignored --nocapture`.

use std::time::Duration;

use iced_x86::code_asm::*;

use super::programs::{DATA, Program, RBX, RCX, RDI, RSI};

/// What this thread has had of the processor.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap())
}

/// Runs the program and says how many million instructions a second of processor time were executed.
fn measure(name: &str, write: impl Fn(&mut CodeAssembler)) {
    let mut best = 0.0f64;
    for _ in 0..5 {
        let mut program = Program::new(64, &write);
        for (n, r) in [RBX, RCX, RSI, RDI].into_iter().enumerate() {
            program.set(r, DATA + 0x10_0000 * n as u64);
        }
        let start = cpu_time();
        program.run();
        let time = cpu_time() - start;
        best = best.max(program.instructions() as f64 / time.as_secs_f64() / 1e6);
    }
    println!("{name:24} {best:6.0} MIPS");
}

#[test]
#[ignore = "measures"]
fn speed() {
    measure("registers, one branch", |a| {
        let mut again = a.create_label();
        a.mov(ecx, 5_000_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(rax, rcx).unwrap();
        a.xor(rdx, rax).unwrap();
        a.lea(r8, ptr(rax + rdx * 4 + 8)).unwrap();
        a.shr(r8, 3).unwrap();
        a.and(r8d, 0xffff).unwrap();
        a.mov(r9, r8).unwrap();
        a.sub(r10, r9).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    measure("loads and stores", |a| {
        let mut again = a.create_label();
        a.mov(ecx, 3_000_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rax, qword_ptr(rbx + 8)).unwrap();
        a.add(rax, qword_ptr(rsi + 16)).unwrap();
        a.mov(qword_ptr(rdi + 24), rax).unwrap();
        a.add(dword_ptr(rbx + 32), 1).unwrap();
        a.movzx(edx, byte_ptr(rbx + 9)).unwrap();
        a.push(rdx).unwrap();
        a.pop(r8).unwrap();
        a.cmp(r8d, dword_ptr(rbx + rdx * 4 + 64)).unwrap();
        a.sub(ecx, 1).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    // Branches that depend on data, as compilers make them: a sieve, then Collatz sequences.
    measure("sieve", |a| {
        let (mut outer, mut inner, mut next, mut rounds) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(ebp, 4).unwrap();
        a.set_label(&mut rounds).unwrap();
        a.mov(rdi, rbx).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(ecx, 0x80000).unwrap();
        a.rep().stosb().unwrap();
        a.mov(esi, 2).unwrap();
        a.set_label(&mut outer).unwrap();
        a.cmp(byte_ptr(rbx + rsi), 0).unwrap();
        a.jne(next).unwrap();
        a.inc(r8d).unwrap();
        a.lea(rdx, ptr(rsi + rsi)).unwrap();
        a.cmp(edx, 0x80000).unwrap();
        a.jae(next).unwrap();
        a.set_label(&mut inner).unwrap();
        a.mov(byte_ptr(rbx + rdx), 1).unwrap();
        a.add(rdx, rsi).unwrap();
        a.cmp(edx, 0x80000).unwrap();
        a.jb(inner).unwrap();
        a.set_label(&mut next).unwrap();
        a.inc(esi).unwrap();
        a.cmp(esi, 0x80000).unwrap();
        a.jb(outer).unwrap();
        a.dec(ebp).unwrap();
        a.jne(rounds).unwrap();
        a.hlt().unwrap();
    });
    measure("collatz", |a| {
        let (mut start, mut step, mut odd, mut done) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 100_000).unwrap();
        a.set_label(&mut start).unwrap();
        a.mov(rax, rcx).unwrap();
        a.set_label(&mut step).unwrap();
        a.cmp(rax, 1).unwrap();
        a.je(done).unwrap();
        a.inc(r8).unwrap();
        a.test(al, 1).unwrap();
        a.jne(odd).unwrap();
        a.shr(rax, 1).unwrap();
        a.jmp(step).unwrap();
        a.set_label(&mut odd).unwrap();
        a.lea(rax, ptr(rax + rax * 2 + 1)).unwrap();
        a.jmp(step).unwrap();
        a.set_label(&mut done).unwrap();
        a.dec(rcx).unwrap();
        a.jne(start).unwrap();
        a.hlt().unwrap();
    });
    measure("calls", |a| {
        let (mut fib, mut base) = (a.create_label(), a.create_label());
        a.mov(edi, 28).unwrap();
        a.call(fib).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut fib).unwrap();
        a.cmp(edi, 2).unwrap();
        a.jb(base).unwrap();
        a.push(rbx).unwrap();
        a.push(rdi).unwrap();
        a.sub(edi, 1).unwrap();
        a.call(fib).unwrap();
        a.mov(rbx, rax).unwrap();
        a.pop(rdi).unwrap();
        a.sub(edi, 2).unwrap();
        a.call(fib).unwrap();
        a.add(rax, rbx).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
        a.set_label(&mut base).unwrap();
        a.mov(eax, edi).unwrap();
        a.ret().unwrap();
    });
}
