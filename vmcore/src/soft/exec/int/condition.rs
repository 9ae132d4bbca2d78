//! The sixteen conditions of Jcc, SETcc and CMOVcc (SDM vol. 1, appendix B), as types.

use iced_x86::{ConditionCode, Instruction};

use crate::soft::cpu::flags::Flags;

/// A condition, by the number that instructions encode it with.
pub(super) struct If<const CODE: u8>;

/// A condition on the arithmetic flags.
pub(super) trait Condition {
    /// The number that instructions encode it with.
    const CODE: u8;

    fn holds(flags: &Flags) -> bool;
}

impl<const CODE: u8> Condition for If<CODE> {
    const CODE: u8 = CODE;

    #[inline(always)]
    fn holds(flags: &Flags) -> bool {
        let positive = match CODE >> 1 {
            0 => flags.of(),
            1 => flags.cf(),
            2 => flags.zf(),
            3 => flags.cf() | flags.zf(),
            4 => flags.sf(),
            5 => flags.pf(),
            6 => flags.sf() ^ flags.of(),
            _ => flags.zf() | (flags.sf() ^ flags.of()),
        };
        positive ^ (CODE & 1 != 0)
    }
}

/// The number of the condition that `i` has, if any.
pub(super) fn code(i: &Instruction) -> Option<u8> {
    match i.condition_code() {
        ConditionCode::None => None,
        // `o` is 1, and the rest follow in the order of their numbers.
        code => u8::try_from(code as u32 - 1).ok(),
    }
}

/// The instance of a handler for condition number `$code`: the condition is its last type parameter.
macro_rules! on_condition {
    ($code:expr, $handler:ident $(, $kind:ty)*) => {{
        use $crate::soft::exec::int::condition::If;
        match $code {
            0 => $handler::<$($kind,)* If<0>> as $crate::soft::cpu::op::Handler,
            1 => $handler::<$($kind,)* If<1>>,
            2 => $handler::<$($kind,)* If<2>>,
            3 => $handler::<$($kind,)* If<3>>,
            4 => $handler::<$($kind,)* If<4>>,
            5 => $handler::<$($kind,)* If<5>>,
            6 => $handler::<$($kind,)* If<6>>,
            7 => $handler::<$($kind,)* If<7>>,
            8 => $handler::<$($kind,)* If<8>>,
            9 => $handler::<$($kind,)* If<9>>,
            10 => $handler::<$($kind,)* If<10>>,
            11 => $handler::<$($kind,)* If<11>>,
            12 => $handler::<$($kind,)* If<12>>,
            13 => $handler::<$($kind,)* If<13>>,
            14 => $handler::<$($kind,)* If<14>>,
            _ => $handler::<$($kind,)* If<15>>,
        }
    }};
}
pub(super) use on_condition;
