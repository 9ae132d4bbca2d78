//! An instruction on the host's own CPU.
//!
//! A stub loads every register, executes the instruction and stores every register. What the
//! instruction raises arrives as a signal, whose handler goes on behind the instruction.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::multiple_unsafe_ops_per_block,
    reason = "offsets in one page; a handler is set up in one go"
)]
#![expect(unsafe_code, reason = "it executes generated code and handles its signals")]

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::code_asm::*;

use crate::generate::Case;
use crate::{MEMORY, State};

/// Offsets in the data page.
const IN: i32 = 0;
const OUT: i32 = 256;
const FX_IN: i32 = 512;
const FX_OUT: i32 = 1024;
const HOST_RSP: i32 = 1536;
const HOST_FX: i32 = 2048;

/// Address to go on at after a signal, and what it was: the exception's vector plus 1.
static RESUME: AtomicU64 = AtomicU64::new(0);
static VECTOR: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid context to SA_SIGINFO handlers.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let trap = registers[libc::REG_TRAPNO as usize];
    VECTOR.store(trap.cast_unsigned() + 1, Ordering::SeqCst);
    registers[libc::REG_RIP as usize] = RESUME.load(Ordering::SeqCst).cast_signed();
}

pub struct Native {
    /// Code page, data page, and the memory.
    base: *mut u8,
}

impl Native {
    pub fn new() -> Self {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // The stub's stores have 32-bit addresses.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        // The guest maps the memory by one page table, so it must not lie across the end of one.
        let base = std::iter::repeat_with(|| {
            // SAFETY: a new mapping; nothing else is touched.
            unsafe { libc::mmap(std::ptr::null_mut(), 8192 + MEMORY, prot, flags, -1, 0) }
        })
        .find(|&base| {
            assert_ne!(base, libc::MAP_FAILED);
            (base as usize + 8192) >> 21 == (base as usize + 8191 + MEMORY) >> 21
        })
        .unwrap();
        // SAFETY: zeroed is a valid `sigaction`, and the handler only touches the context and atomics. The
        // alternative stack lives as long as the process.
        unsafe {
            let stack = libc::stack_t {
                ss_sp: Box::leak(vec![0u8; 1 << 16].into_boxed_slice()).as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: 1 << 16,
            };
            assert_eq!(libc::sigaltstack(&stack, std::ptr::null_mut()), 0);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            for signal in [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS, libc::SIGTRAP] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
        Self { base: base.cast() }
    }

    fn data(&self) -> *mut u8 {
        self.base.wrapping_add(4096)
    }

    /// Linear address of the memory, on the host and in the guest.
    pub fn memory_address(&self) -> u64 {
        self.base.wrapping_add(8192) as u64
    }

    fn write(&self, at: i32, bytes: &[u8]) {
        // SAFETY: offsets and lengths used here stay within the data page and the memory.
        unsafe {
            self.data().wrapping_add(at as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
    }

    fn read(&self, at: i32, len: usize) -> Vec<u8> {
        // SAFETY: as in `write`.
        unsafe { std::slice::from_raw_parts(self.data().wrapping_add(at as usize), len) }.to_vec()
    }

    pub fn run(&mut self, case: &Case) -> State {
        let data = self.data() as u64;
        let at = |offset: i32| qword_ptr(data + offset as u64);
        let registers = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        let mut a = CodeAssembler::new(64).unwrap();
        let mut code = || -> Result<(), iced_x86::IcedError> {
            for register in [rbx, rbp, r12, r13, r14, r15] {
                a.push(register)?;
            }
            a.mov(at(HOST_RSP), rsp)?;
            a.fxsave64(ptr(data + HOST_FX as u64))?;
            a.fxrstor64(ptr(data + FX_IN as u64))?;
            a.push(at(IN + 128))?;
            a.popfq()?;
            for (n, register) in registers.into_iter().enumerate() {
                a.mov(register, at(IN + 8 * n as i32))?;
            }
            let mut after = a.create_label();
            a.db(&case.bytes)?;
            a.set_label(&mut after)?;
            for (n, register) in registers.into_iter().enumerate() {
                a.mov(at(OUT + 8 * n as i32), register)?;
            }
            a.mov(rsp, at(HOST_RSP))?;
            a.pushfq()?;
            a.pop(at(OUT + 128))?;
            a.fxsave64(ptr(data + FX_OUT as u64))?;
            a.fxrstor64(ptr(data + HOST_FX as u64))?;
            a.cld()?;
            for register in [r15, r14, r13, r12, rbp, rbx] {
                a.pop(register)?;
            }
            a.ret()
        };
        code().unwrap();
        let origin = self.base as u64;
        let assembled = a
            .assemble_options(origin, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
            .unwrap();
        let bytes = assembled.inner.code_buffer;
        // The instruction's bytes are data to the assembler: behind them come the stores.
        let resume = bytes.windows(case.bytes.len()).rposition(|window| window == case.bytes).unwrap();
        RESUME.store(origin + (resume + case.bytes.len()) as u64, Ordering::SeqCst);
        VECTOR.store(0, Ordering::SeqCst);
        let state = &case.state;
        for (n, value) in state.gpr.iter().chain([&state.flags]).enumerate() {
            self.write(IN + 8 * n as i32, &value.to_le_bytes());
        }
        self.write(FX_IN, &state.fx);
        self.write(4096, &state.memory);
        // SAFETY: the code page has room for the stub; the stub keeps the C calling convention, and what
        // the instruction in it does is confined to the registers and the memory by the generator.
        unsafe {
            self.base.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            let call: extern "sysv64" fn() = std::mem::transmute(self.base);
            call();
        }
        let word = |bytes: Vec<u8>| u64::from_le_bytes(bytes.try_into().unwrap());
        let vector = VECTOR.load(Ordering::SeqCst);
        State {
            gpr: std::array::from_fn(|n| word(self.read(OUT + 8 * n as i32, 8))),
            flags: word(self.read(OUT + 128, 8)),
            fx: self.read(FX_OUT, 512),
            memory: self.read(4096, MEMORY),
            fault: vector.checked_sub(1).map(|vector| u8::try_from(vector).unwrap()),
        }
    }
}
