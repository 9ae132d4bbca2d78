//! The software CPU against the host's: the same instruction on the same state must give the same
//! state, flags that the manual leaves undefined apart.
//!
//! Cases are random but repeatable: `VMCORE_INSN_SEED` and `VMCORE_INSN_CASES` choose others and more,
//! `VMCORE_INSN_ONLY=mnemonic` narrows them, and `VMCORE_INSN_TRACE=1` shows
//! each. A disagreement prints what is needed to repeat it.
//!
//! Nightly mode: some millions of cases, of another seed each time:
//!
//!     VMCORE_INSN_SEED=$(date +%s) VMCORE_INSN_CASES=5000000 cargo test -p vmcore --test insn
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod generate;
mod native;
mod soft;

use std::collections::BTreeMap;

use generate::Generator;

/// Everything an unprivileged instruction can see and change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
    /// FXSAVE64's area.
    pub fx: Vec<u8>,
    /// The memory that addresses point into.
    pub memory: Vec<u8>,
    /// Vector of the exception raised, if one was.
    pub fault: Option<u8>,
}

/// Size of [`State::memory`] in bytes: two pages, so that accesses cross.
pub const MEMORY: usize = 8192;

/// Flags that are compared.
pub const FLAGS: u64 = 0x8d5 | 1 << 10;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The difference between what the host and the software CPU made of a case.
fn difference(case: &generate::Case, host: &State, soft: &State) -> Option<String> {
    let mut text = String::new();
    let mut note = |what: String| {
        text.push_str("  ");
        text.push_str(&what);
        text.push('\n');
    };
    if host.fault != soft.fault {
        note(format!("fault: host {:?}, soft {:?}", host.fault, soft.fault));
    }
    if host.fault.is_none() || soft.fault.is_none() {
        for (n, (h, s)) in host.gpr.iter().zip(&soft.gpr).enumerate() {
            if h != s {
                note(format!("r{n}: before {:#x}, host {h:#x}, soft {s:#x}", case.state.gpr[n]));
            }
        }
        let mask = FLAGS & !case.undefined_flags;
        if (host.flags ^ soft.flags) & mask != 0 {
            note(format!(
                "flags: before {:#x}, host {:#x}, soft {:#x}, of {mask:#x}",
                case.state.flags & mask,
                host.flags & mask,
                soft.flags & mask
            ));
        }
        for (what, range) in case.fx_ranges() {
            let (h, s) = (&host.fx[range.clone()], &soft.fx[range.clone()]);
            if h != s {
                note(format!("{what}: before {:02x?}, host {h:02x?}, soft {s:02x?}", &case.state.fx[range]));
            }
        }
    }
    let differs = |&n: &usize| host.memory[n] != soft.memory[n] && !case.elsewhere.contains(&n);
    if let Some(at) = (0..MEMORY).find(differs) {
        let end = (at + 16).min(MEMORY);
        note(format!(
            "memory at {at:#x}: before {:02x?}, host {:02x?}, soft {:02x?}",
            &case.state.memory[at..end],
            &host.memory[at..end],
            &soft.memory[at..end]
        ));
    }
    (!text.is_empty()).then_some(text)
}

#[test]
fn the_software_cpu_agrees_with_the_host() {
    let cases = number("VMCORE_INSN_CASES", 40_000);
    let mut generator = Generator::new(number("VMCORE_INSN_SEED", 1), std::env::var("VMCORE_INSN_ONLY").ok());
    let mut native = native::Native::new();
    let mut soft = soft::Soft::new(native.memory_address());
    let mut failures: BTreeMap<String, (u32, String)> = BTreeMap::new();
    for _ in 0..cases {
        let case = generator.next(native.memory_address());
        if std::env::var_os("VMCORE_INSN_TRACE").is_some() {
            println!("{} {:02x?}", case.text, case.bytes);
        }
        let by_host = native.run(&case);
        let by_soft = soft.run(&case);
        if let Some(text) = difference(&case, &by_host, &by_soft) {
            let entry = failures.entry(case.code_name()).or_insert((0, String::new()));
            entry.0 += 1;
            if entry.1.is_empty() {
                entry.1 = format!("{} ({:02x?})\n{text}", case.text, case.bytes);
            }
        }
    }
    println!("{cases} cases, {} different instructions", generator.codes());
    let summary: String =
        failures.iter().map(|(code, (count, first))| format!("{code} x {count}: {first}")).collect();
    assert!(failures.is_empty(), "{} kinds of instruction disagree:\n{summary}", failures.len());
}
