//! The sixteen conditions of Jcc, SETcc and CMOVcc (SDM vol. 1, appendix B), as types.

use iced_x86::{ConditionCode, Instruction};

use crate::soft::cpu::flags::Flags;

/// A condition, by the number that instructions encode it with.
pub(super) struct If<const CODE: u8>;

/// A condition on the arithmetic flags.
pub(super) trait Condition {
    fn holds(flags: &Flags) -> bool;
}

impl<const CODE: u8> Condition for If<CODE> {
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

/// The instance of a handler for condition number `$code`: the condition is its first type parameter.
macro_rules! on_condition {
    ($code:expr, $handler:ident, $word:ty) => {{
        use $crate::soft::exec::int::condition::If;
        match $code {
            0 => $handler::<If<0>, $word> as $crate::soft::cpu::op::Handler,
            1 => $handler::<If<1>, $word>,
            2 => $handler::<If<2>, $word>,
            3 => $handler::<If<3>, $word>,
            4 => $handler::<If<4>, $word>,
            5 => $handler::<If<5>, $word>,
            6 => $handler::<If<6>, $word>,
            7 => $handler::<If<7>, $word>,
            8 => $handler::<If<8>, $word>,
            9 => $handler::<If<9>, $word>,
            10 => $handler::<If<10>, $word>,
            11 => $handler::<If<11>, $word>,
            12 => $handler::<If<12>, $word>,
            13 => $handler::<If<13>, $word>,
            14 => $handler::<If<14>, $word>,
            _ => $handler::<If<15>, $word>,
        }
    }};
}
pub(super) use on_condition;
