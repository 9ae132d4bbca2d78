//! How the guest reads and writes the registers: a page in xAPIC mode (SDM vol. 3A, 11.4.1), MSRs in
//! x2APIC mode (11.12.1).

use super::register::{
    APR, CURRENT_COUNT, DFR, DIVIDE, EOI, ESR, ICR, ICR_HIGH, ID, INITIAL_COUNT, IRR, IRR_END, ISR, ISR_END,
    LDR, LVT_ERROR, LVT_TIMER, PPR, RRD, SELF_IPI, SVR, TMR, TMR_END, TPR, VERSION, esr, icr, lvt, svr,
};
use super::{Lapic, VERSION_VALUE, x2apic_logical};

const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// MSR `X2APIC + n` is the register at offset `n * 16`.
const X2APIC: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;

/// Index of the register at `offset` in its array, which begins at `first`.
fn index(offset: u32, first: u32) -> usize {
    ((offset - first) >> 4) as usize
}

impl Lapic {
    /// Reads the register at `offset` (a multiple of 16, below 4096) of the page.
    pub(in crate::soft) fn read(&mut self, offset: u32) -> u32 {
        match offset {
            ID => u32::from(self.id) << 24,
            LDR => u32::from(self.logical) << 24,
            DFR => u32::from(self.model) << 28 | 0x0fff_ffff,
            ICR_HIGH => self.icr_high(),
            // Arbitration priority and remote read are of older processors; EOI cannot be read.
            APR | RRD | EOI => 0,
            _ => self.read_common(offset).unwrap_or_else(|| {
                self.error(esr::ILLEGAL_REGISTER);
                0
            }),
        }
    }

    /// Writes the register at `offset` of the page. What is reserved stays as it is.
    pub(in crate::soft) fn write(&mut self, offset: u32, value: u32) {
        let [low, .., high] = value.to_le_bytes();
        match offset {
            ID => {
                self.id = high;
                self.publish();
            }
            LDR => {
                self.logical = high;
                self.publish();
            }
            DFR => {
                self.model = high >> 4;
                self.publish();
            }
            TPR => self.set_tpr(low),
            EOI => self.end_of_interrupt(),
            SVR => self.set_svr(value),
            ESR => self.latch_errors(),
            ICR => {
                self.icr = u64::from(self.icr_high()) << 32 | u64::from(value & !(icr::BUSY | icr::RESERVED));
                self.send();
            }
            ICR_HIGH => self.icr = u64::from(value & 0xff00_0000) << 32 | u64::from(self.icr_low()),
            LVT_TIMER..=LVT_ERROR => self.set_lvt(index(offset, LVT_TIMER), value),
            INITIAL_COUNT => self.set_initial_count(value),
            DIVIDE => self.set_divide(value),
            // Only for reading.
            VERSION | APR | PPR | RRD | ISR..=ISR_END | TMR..=TMR_END | IRR..=IRR_END | CURRENT_COUNT => {}
            _ => self.error(esr::ILLEGAL_REGISTER),
        }
    }

    /// What both modes read alike. `None`: there is no such register.
    fn read_common(&mut self, offset: u32) -> Option<u32> {
        Some(match offset {
            VERSION => VERSION_VALUE,
            TPR => self.tpr.into(),
            PPR => self.ppr().into(),
            SVR => self.svr,
            ISR..=ISR_END => self.isr.register(index(offset, ISR)),
            TMR..=TMR_END => self.tmr.register(index(offset, TMR)),
            IRR..=IRR_END => {
                self.take_vectors();
                self.attend();
                self.irr.register(index(offset, IRR))
            }
            ESR => self.esr,
            ICR => self.icr_low(),
            LVT_TIMER..=LVT_ERROR => self.lvt[index(offset, LVT_TIMER)],
            INITIAL_COUNT => self.timer.initial(),
            CURRENT_COUNT => {
                self.poll();
                self.timer.current(self.clock.now())
            }
            DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Reads an x2APIC MSR (0x800 to 0x8FF) or IA32_TSC_DEADLINE (0x6E0, in TSC ticks). `None`: #GP.
    pub(in crate::soft) fn msr_read(&mut self, msr: u32) -> Option<u64> {
        if msr == IA32_TSC_DEADLINE {
            self.poll();
            return Some(self.timer.tsc_deadline());
        }
        let offset = self.x2apic_offset(msr)?;
        match offset {
            ID => Some(self.link.id.into()),
            LDR => Some(x2apic_logical(self.link.id).into()),
            ICR => Some(self.icr),
            _ => self.read_common(offset).map(u64::from),
        }
    }

    /// Writes an MSR of [`Lapic::msr_read`]. `false`: #GP, for what is reserved or only for reading.
    pub(in crate::soft) fn msr_write(&mut self, msr: u32, value: u64) -> bool {
        if msr == IA32_TSC_DEADLINE {
            self.poll();
            let now = self.clock.now();
            self.timer.set_tsc_deadline(value, now);
            self.attend_timer(now);
            return true;
        }
        let Some(offset) = self.x2apic_offset(msr) else { return false };
        #[expect(clippy::cast_possible_truncation, reason = "the upper half is looked at below")]
        let low = value as u32;
        if offset == ICR {
            if low & icr::RESERVED != 0 {
                return false;
            }
            self.icr = value & !u64::from(icr::BUSY);
            self.send();
            return true;
        }
        let allowed = match offset {
            TPR | SELF_IPI => 0xff,
            EOI | ESR => 0,
            SVR => svr::WRITABLE,
            LVT_TIMER..=LVT_ERROR => {
                let n = index(offset, LVT_TIMER);
                lvt::WRITABLE[n] | lvt::READ_ONLY[n]
            }
            INITIAL_COUNT => u32::MAX,
            DIVIDE => 0xb,
            _ => return false,
        };
        if value & !u64::from(allowed) != 0 {
            return false;
        }
        if offset == SELF_IPI {
            let [vector, ..] = low.to_le_bytes();
            self.raise_own(vector);
        } else {
            self.write(offset, low);
        }
        true
    }

    /// IA32_TSC_DEADLINE as a saved state has it: a deadline that is over, but has not been noticed, is
    /// still there.
    pub(in crate::soft) fn tsc_deadline(&self) -> u64 {
        self.timer.tsc_deadline()
    }

    /// Offset of the register that `msr` is in x2APIC mode.
    fn x2apic_offset(&self, msr: u32) -> Option<u32> {
        ((X2APIC..=X2APIC_LAST).contains(&msr) && self.is_x2apic()).then(|| (msr - X2APIC) << 4)
    }

    fn set_svr(&mut self, value: u32) {
        self.poll();
        self.svr = value & svr::WRITABLE;
        if !self.is_software_enabled() {
            self.lvt.iter_mut().for_each(|register| *register |= lvt::MASKED);
        }
        self.publish();
    }

    /// A write to ESR: it shows what has happened since the last one.
    fn latch_errors(&mut self) {
        self.esr = std::mem::take(&mut self.errors);
    }

    fn set_lvt(&mut self, n: usize, value: u32) {
        // What has been due until now is so by the old value.
        self.poll();
        let masked = if self.is_software_enabled() { 0 } else { lvt::MASKED };
        self.lvt[n] = value & lvt::WRITABLE[n] | masked;
        if n == lvt::TIMER {
            self.timer.set_mode(self.lvt[n]);
            self.attend_timer(self.clock.now());
        }
    }

    fn set_initial_count(&mut self, value: u32) {
        self.poll();
        let now = self.clock.now();
        self.timer.set_initial(value, now);
        self.attend_timer(now);
    }

    fn set_divide(&mut self, value: u32) {
        self.poll();
        let now = self.clock.now();
        self.timer.set_divide(value, now);
        self.attend_timer(now);
    }
}
