//! The two 8259A interrupt controllers of a PC (Intel 8259A data sheet) and their edge/level control
//! registers (ELCR; Intel 82371AB data sheet, 8.3).
//!
//! The slave's output is wired to input 2 of the master. Single mode and ICW1.LTIM do not exist: the
//! wiring is fixed and the ELCR decides what is level-triggered, as in every PC since PCI.
//!
//! A processor acknowledges only while the output is high, hence spurious interrupts 7 and 15 never
//! come from a request that vanished before its acknowledgement.

use crate::state::PicState;

/// The master's input to which the slave is wired.
const CASCADE: u8 = 2;

/// Inputs that the ELCRs can make level-triggered: not the timer, keyboard, cascade, RTC and FPU.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];

/// Which initialisation word comes next ([`PicState::init_state`]).
mod init {
    pub(super) const DONE: u8 = 0;
    pub(super) const ICW2: u8 = 1;
    pub(super) const ICW3: u8 = 2;
    pub(super) const ICW4: u8 = 3;
}

/// One 8259A; its registers are its state.
#[derive(Clone, Debug)]
struct Pic(PicState);

fn bit(input: u8) -> u8 {
    1 << (input & 7)
}

impl Pic {
    fn new(elcr_mask: u8) -> Self {
        Self(PicState { elcr_mask, ..PicState::default() })
    }

    /// Sets the level of an input. Edges are kept until acknowledged.
    fn set_input(&mut self, input: u8, high: bool) {
        let s = &mut self.0;
        let bit = bit(input);
        match (high, s.elcr & bit != 0) {
            (true, true) => s.irr |= bit,
            (true, false) => s.irr |= bit & !s.last_irr,
            (false, true) => s.irr &= !bit,
            (false, false) => {}
        }
        if high { s.last_irr |= bit } else { s.last_irr &= !bit }
    }

    /// Of the inputs `set`, the one with the highest priority, with its distance from the top.
    fn first(&self, set: u8) -> Option<(u8, u8)> {
        let top = self.0.priority_add & 7;
        (0u8..8).map(|rank| (rank, (rank + top) & 7)).find(|&(_, input)| set & bit(input) != 0)
    }

    /// The input whose request reaches the output.
    fn request(&self, master: bool) -> Option<u8> {
        let s = &self.0;
        let (rank, input) = self.first(s.irr & !s.imr)?;
        let mut in_service = s.isr;
        if s.special_mask {
            in_service &= !s.imr;
        }
        if s.special_fully_nested && master {
            // Further requests of the slave come through while one of its is in service.
            in_service &= !bit(CASCADE);
        }
        match self.first(in_service) {
            Some((serving, _)) if rank >= serving => None,
            _ => Some(input),
        }
    }

    /// `input` is acknowledged.
    fn accept(&mut self, input: u8) {
        let s = &mut self.0;
        if s.elcr & bit(input) == 0 {
            s.irr &= !bit(input);
        }
        if !s.auto_eoi {
            s.isr |= bit(input);
        } else if s.rotate_on_auto_eoi {
            s.priority_add = (input + 1) & 7;
        }
    }

    /// The vector of `input`.
    fn vector(&self, input: u8) -> u8 {
        self.0.irq_base & 0xf8 | input & 7
    }

    /// A write with A0 low: ICW1, OCW2, OCW3.
    fn write_command(&mut self, value: u8) {
        let s = &mut self.0;
        if value & 0x10 != 0 {
            // ICW1. The levels of the inputs stay known: only a new edge is one.
            (s.irr, s.isr, s.imr) = (s.irr & s.elcr, 0, 0);
            (s.priority_add, s.special_mask, s.read_isr, s.poll) = (0, false, false, false);
            s.init4 = value & 1 != 0;
            if !s.init4 {
                (s.special_fully_nested, s.auto_eoi) = (false, false);
            }
            s.init_state = init::ICW2;
        } else if value & 8 != 0 {
            // OCW3.
            s.poll = value & 4 != 0;
            if value & 2 != 0 {
                s.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                s.special_mask = value & 0x20 != 0;
            }
        } else {
            self.end_of_interrupt(value >> 5, value & 7);
        }
    }

    /// OCW2: `command` is R, SL, EOI.
    fn end_of_interrupt(&mut self, command: u8, level: u8) {
        let next = (level + 1) & 7;
        match command {
            0b000 => self.0.rotate_on_auto_eoi = false,
            0b100 => self.0.rotate_on_auto_eoi = true,
            0b001 | 0b101 => {
                // In special mask mode what is masked is not ended (data sheet, "Special mask mode").
                let masked = if self.0.special_mask { self.0.imr } else { 0 };
                let Some((_, input)) = self.first(self.0.isr & !masked) else { return };
                self.0.isr &= !bit(input);
                if command == 0b101 {
                    self.0.priority_add = (input + 1) & 7;
                }
            }
            0b011 => self.0.isr &= !bit(level),
            0b111 => (self.0.isr, self.0.priority_add) = (self.0.isr & !bit(level), next),
            0b110 => self.0.priority_add = next,
            _ => {}
        }
    }

    /// A write with A0 high: ICW2 to ICW4, the mask.
    fn write_data(&mut self, value: u8) {
        let s = &mut self.0;
        match s.init_state {
            init::ICW2 => (s.irq_base, s.init_state) = (value & 0xf8, init::ICW3),
            init::ICW3 => s.init_state = if s.init4 { init::ICW4 } else { init::DONE },
            init::ICW4 => {
                s.special_fully_nested = value & 0x10 != 0;
                s.auto_eoi = value & 2 != 0;
                s.init_state = init::DONE;
            }
            _ => s.imr = value,
        }
    }

    /// Reads with A0 low (`data`: high), unless polled.
    fn read(&self, data: bool) -> u8 {
        match (data, self.0.read_isr) {
            (true, _) => self.0.imr,
            (false, true) => self.0.isr,
            (false, false) => self.0.irr,
        }
    }
}

/// Master and slave.
#[derive(Clone, Debug)]
pub(super) struct Pics {
    chips: [Pic; 2],
}

impl Pics {
    pub(super) fn new() -> Self {
        Self { chips: ELCR_MASKS.map(Pic::new) }
    }

    pub(super) fn claims(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
    }

    /// Sets the level of ISA interrupt `irq`, 0 to 15. 2 is the cascade, and has no wire.
    pub(super) fn set_irq(&mut self, irq: u8, high: bool) {
        if irq != CASCADE {
            self.chips[usize::from(irq >> 3 & 1)].set_input(irq & 7, high);
            self.cascade();
        }
    }

    /// The master's input 2 follows the slave's output.
    fn cascade(&mut self) {
        let [master, slave] = &mut self.chips;
        let bit = bit(CASCADE);
        if slave.request(false).is_some() { master.0.irr |= bit } else { master.0.irr &= !bit }
    }

    /// Whether the output to the processor is high.
    pub(super) fn output(&self) -> bool {
        self.chips[0].request(true).is_some()
    }

    /// The two INTA cycles; `None` where the output is low.
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let [master, slave] = &mut self.chips;
        let input = master.request(true)?;
        master.accept(input);
        let vector = if input == CASCADE {
            // Input 2 is high only while the slave has a request.
            let input = slave.request(false).inspect(|&input| slave.accept(input)).unwrap_or(7);
            slave.vector(input)
        } else {
            master.vector(input)
        };
        self.cascade();
        Some(vector)
    }

    pub(super) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x4d0 | 0x4d1 => {
                let s = &mut self.chips[usize::from(port & 1)].0;
                let level = value & s.elcr_mask;
                // What becomes level-triggered asks as long as its line is high, and only then.
                let changed = level & !s.elcr;
                (s.irr, s.elcr) = (s.irr & !changed | s.last_irr & changed, level);
            }
            _ => {
                let chip = &mut self.chips[usize::from(port & 0x80 != 0)];
                if port & 1 == 0 { chip.write_command(value) } else { chip.write_data(value) }
            }
        }
        self.cascade();
    }

    pub(super) fn read(&mut self, port: u16) -> u8 {
        if let 0x4d0 | 0x4d1 = port {
            return self.chips[usize::from(port & 1)].0.elcr;
        }
        let at = usize::from(port & 0x80 != 0);
        let chip = &mut self.chips[at];
        if !std::mem::take(&mut chip.0.poll) {
            return chip.read(port & 1 != 0);
        }
        // A polled read is an acknowledgement (data sheet, "Poll command").
        let Some(input) = chip.request(at == 0) else { return 0 };
        chip.accept(input);
        self.cascade();
        0x80 | input
    }

    pub(super) fn save(&self) -> [PicState; 2] {
        [self.chips[0].0, self.chips[1].0]
    }

    pub(super) fn restore(&mut self, states: &[PicState; 2]) {
        for ((chip, state), mask) in self.chips.iter_mut().zip(states).zip(ELCR_MASKS) {
            chip.0 = *state;
            chip.0.priority_add &= 7;
            chip.0.elcr_mask = mask;
            chip.0.elcr &= mask;
        }
        self.cascade();
    }
}
