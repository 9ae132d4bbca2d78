//! x87, MMX and SSE: the host's own instructions on the guest's registers.
//!
//! Most instructions run on the host's CPU in a generated function of one instruction (`thunk`), so
//! that their results are the hardware's to the last bit. Moves, logic and integer arithmetic on SSE
//! registers, the most common ones, are handlers of ordinary code (`moves`, `lanes`).

mod area;
mod control;
mod exec_memory;
mod float;
mod gate;
mod host;
mod lanes;
mod memory;
mod moves;
mod mxcsr;
#[cfg(test)]
mod oracle;
mod packed;
mod state;
#[cfg(test)]
mod tests;
mod thunk;
mod vector;
mod x87;
mod x87_quick;
mod x87_thunk;

use iced_x86::{CpuidFeature, EncodingKind, Instruction};

pub(in crate::soft) use self::host::HostFloat;
pub(in crate::soft) use self::state::FpState;
pub(in crate::soft) use self::thunk::Thunks;

use super::cpu::op::Selected;

/// The handler of an x87, MMX or SSE instruction with these bytes.
pub(in crate::soft) fn select(instruction: &Instruction, bytes: &[u8], thunks: &Thunks) -> Option<Selected> {
    let features = instruction.cpuid_features();
    if instruction.encoding() != EncodingKind::Legacy || !features.iter().all(|feature| offered(*feature)) {
        return None;
    }
    area::select(instruction)
        .or_else(|| control::select(instruction))
        .or_else(|| moves::select(instruction))
        .or_else(|| lanes::select(instruction))
        .or_else(|| x87::select(instruction, bytes, thunks))
        .or_else(|| vector::select(instruction, thunks))
}

/// Whether the instructions of `feature` can be executed here: thunks need the host to have it.
fn offered(feature: CpuidFeature) -> bool {
    match feature {
        CpuidFeature::INTEL8086
        | CpuidFeature::INTEL8086_ONLY
        | CpuidFeature::INTEL186
        | CpuidFeature::INTEL286
        | CpuidFeature::INTEL386
        | CpuidFeature::INTEL486
        | CpuidFeature::X64
        | CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::CMOV
        | CpuidFeature::MMX
        | CpuidFeature::FXSR
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::XSAVE
        | CpuidFeature::XSAVEOPT => true,
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        _ => false,
    }
}
