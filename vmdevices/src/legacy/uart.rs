//! The registers of a 16550A UART (National Semiconductor PC16550D data sheet, 1995).
//!
//! What differs from the chip: bytes are sent in no time, so the transmitter is always empty;
//! a byte that waits below the trigger level is timed out at once; the baud rate means nothing.
//! What a guest can see otherwise is the chip's: the FIFO's depth and overruns (FreeBSD measures it
//! in loopback mode), priorities of interrupts, modem lines in loopback mode.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Register offsets. Those of reads and writes differ at 2; 0 and 1 have two meanings each.
const DATA: u8 = 0;
const IER: u8 = 1;
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const MSR: u8 = 6;
const SCR: u8 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;

const IIR_MODEM_STATUS: u8 = 0x0;
const IIR_NONE: u8 = 0x1;
const IIR_TRANSMITTER_EMPTY: u8 = 0x2;
const IIR_RECEIVED: u8 = 0x4;
const IIR_LINE_STATUS: u8 = 0x6;
const IIR_TIMEOUT: u8 = 0xc;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DIVISOR_LATCH: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_BREAK: u8 = 1 << 4;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5 | 1 << 6;
const LSR_FIFO_ERROR: u8 = 1 << 7;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// The bit of a modem line that tells a change, as a shift from the line's own.
const MSR_DELTA_SHIFT: u8 = 4;

/// How many bytes a FIFO holds.
const FIFO: usize = 16;

/// How many times in a row a guest looks at the line status before it counts as waiting for input.
const PATIENT_LOOKS: u8 = 16;

/// A byte in the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Received {
    byte: u8,
    /// A break condition and not a byte.
    is_break: bool,
    /// From the guest itself, in loopback mode.
    looped: bool,
}

/// A 16550A UART, without a line to either side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Uart {
    divisor: [u8; 2],
    ier: u8,
    /// FIFOs are enabled (FCR bit 0).
    fifos: bool,
    /// How many bytes in the FIFO interrupt.
    trigger: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    received: VecDeque<Received>,
    overrun: bool,
    /// MSR bits 0 to 3: what changed since the last look.
    modem_changes: u8,
    /// The interrupt for an empty transmitter was not acknowledged.
    transmitter_empty: bool,
    /// The guest wants input.
    listening: bool,
    /// How many times in a row it has looked at the line status.
    looks: u8,
}

impl Uart {
    /// The state after power-on: 9600 baud, FIFOs off, all quiet.
    pub(super) fn new() -> Self {
        Self {
            divisor: [12, 0],
            ier: 0,
            fifos: false,
            trigger: 1,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            received: VecDeque::with_capacity(FIFO),
            overrun: false,
            modem_changes: 0,
            transmitter_empty: false,
            listening: false,
            looks: 0,
        }
    }

    /// Whether a saved state is one that the registers can have.
    pub(super) fn is_valid(&self) -> bool {
        self.received.len() <= FIFO && [1, 4, 8, 14].contains(&self.trigger)
    }

    /// How many bytes the receiver can take from the line now.
    ///
    /// None before the guest listens: it has enabled the interrupt for received data, or polls the
    /// line status. So nothing is lost to a driver that clears the receiver when it starts.
    pub(super) fn room(&self) -> usize {
        if self.listening && self.mcr & MCR_LOOP == 0 { self.depth() - self.received.len() } else { 0 }
    }

    fn depth(&self) -> usize {
        if self.fifos { FIFO } else { 1 }
    }

    /// Takes a byte from the line. Without [`Uart::room`] it is an overrun.
    pub(super) fn receive(&mut self, byte: u8) {
        self.take(Received { byte, is_break: false, looped: false });
    }

    /// Takes a break condition from the line: a zero byte with an error bit.
    pub(super) fn receive_break(&mut self) {
        self.take(Received { byte: 0, is_break: true, looped: false });
    }

    fn take(&mut self, received: Received) {
        if self.received.len() < self.depth() {
            self.received.push_back(received);
        } else {
            self.overrun = true;
        }
    }

    /// Empties the receiver, and returns what came from the line and was not read.
    fn clear_receiver(&mut self) -> Vec<u8> {
        self.listening = self.ier & IER_RECEIVED != 0;
        self.overrun = false;
        self.received.drain(..).filter(|r| !r.looped && !r.is_break).map(|r| r.byte).collect()
    }

    fn divisor_latch(&self) -> bool {
        self.lcr & LCR_DIVISOR_LATCH != 0
    }

    /// Whether the interrupt output is high.
    pub(super) fn interrupt(&self) -> bool {
        self.identify() != IIR_NONE
    }

    /// The cause of interrupt with the highest priority (data sheet, table III).
    fn identify(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        if enabled(IER_LINE_STATUS) && self.line_errors() != 0 {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && self.received.len() >= usize::from(self.trigger) {
            IIR_RECEIVED
        } else if enabled(IER_RECEIVED) && !self.received.is_empty() {
            IIR_TIMEOUT
        } else if enabled(IER_TRANSMITTER_EMPTY) && self.transmitter_empty {
            IIR_TRANSMITTER_EMPTY
        } else if enabled(IER_MODEM_STATUS) && self.modem_changes != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    fn line_errors(&self) -> u8 {
        let at_head = self.received.front().is_some_and(|r| r.is_break);
        (if self.overrun { LSR_OVERRUN } else { 0 }) | (if at_head { LSR_BREAK } else { 0 })
    }

    /// The modem lines (MSR bits 4 to 7): all well, or what the guest drives in loopback mode.
    fn modem_lines(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        let pairs = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)];
        pairs.iter().filter(|(out, _)| self.mcr & out != 0).fold(0, |lines, (_, line)| lines | line)
    }

    /// The guest reads register `offset` (0 to 7).
    pub(super) fn read(&mut self, offset: u8) -> u8 {
        if offset != LSR {
            self.looks = 0;
        }
        match offset {
            DATA | IER if self.divisor_latch() => self.divisor[usize::from(offset)],
            DATA => self.received.pop_front().map_or(0, |r| r.byte),
            IER => self.ier,
            IIR_FCR => {
                let cause = self.identify();
                if cause == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_empty = false;
                }
                cause | if self.fifos { IIR_FIFOS } else { 0 }
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => self.read_line_status(),
            MSR => {
                let changes = std::mem::take(&mut self.modem_changes);
                self.modem_lines() | changes
            }
            SCR => self.scratch,
            _ => 0xff,
        }
    }

    fn read_line_status(&mut self) -> u8 {
        let mut status = LSR_TRANSMITTER_EMPTY | self.line_errors();
        if !self.received.is_empty() {
            status |= LSR_DATA_READY;
        }
        if self.fifos && self.received.iter().any(|r| r.is_break) {
            status |= LSR_FIFO_ERROR;
        }
        // Reading acknowledges the errors.
        self.overrun = false;
        if let Some(head) = self.received.front_mut() {
            head.is_break = false;
        }
        self.looks = self.looks.saturating_add(1);
        if self.looks >= PATIENT_LOOKS {
            self.listening = true;
        }
        status
    }

    /// The guest writes register `offset` (0 to 7). What goes out is in the answer.
    pub(super) fn write(&mut self, offset: u8, value: u8) -> Written {
        self.looks = 0;
        match offset {
            DATA | IER if self.divisor_latch() => self.divisor[usize::from(offset)] = value,
            DATA => {
                self.transmitter_empty = true;
                if self.mcr & MCR_LOOP == 0 {
                    return Written::Sent(value);
                }
                self.take(Received { byte: value, is_break: false, looped: true });
            }
            IER => {
                let before = self.ier;
                self.ier = value & 0x0f;
                // Enabling it while the transmitter is empty interrupts at once.
                if (before ^ self.ier) & IER_TRANSMITTER_EMPTY != 0 {
                    self.transmitter_empty = self.ier & IER_TRANSMITTER_EMPTY != 0;
                }
                self.listening |= self.ier & IER_RECEIVED != 0;
            }
            IIR_FCR => return Written::Cleared(self.write_fifo_control(value)),
            LCR => self.lcr = value,
            MCR => {
                let before = self.modem_lines();
                self.mcr = value & 0x1f;
                let after = self.modem_lines();
                // Of the ring indicator only the end of a ring counts.
                let changed = ((before ^ after) & !MSR_RI) | (before & !after & MSR_RI);
                self.modem_changes |= changed >> MSR_DELTA_SHIFT;
            }
            SCR => self.scratch = value,
            // LSR and MSR are for reading.
            _ => {}
        }
        Written::Nothing
    }

    fn write_fifo_control(&mut self, value: u8) -> Vec<u8> {
        let enable = value & FCR_ENABLE != 0;
        let clear = enable != self.fifos || value & FCR_CLEAR_RECEIVER != 0;
        self.fifos = enable;
        self.trigger = match (enable, value >> 6) {
            (true, 1) => 4,
            (true, 2) => 8,
            (true, 3) => 14,
            _ => 1,
        };
        if clear { self.clear_receiver() } else { Vec::new() }
    }
}

/// What a write to a register did beyond the registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Written {
    Nothing,
    /// This byte goes out on the line.
    Sent(u8),
    /// These bytes were received and are cleared before the guest has read them.
    Cleared(Vec<u8>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A UART as a driver leaves it that uses FIFOs and the interrupts in `ier`.
    fn running(ier: u8) -> Uart {
        let mut uart = Uart::new();
        uart.write(IIR_FCR, 0xc7);
        uart.write(MCR, MCR_DTR | MCR_RTS | MCR_OUT2);
        uart.write(IER, ier);
        uart.read(MSR);
        uart
    }

    #[test]
    fn linux_takes_it_for_a_16550a() {
        let mut uart = Uart::new();
        // drivers/tty/serial/8250, autoconfig: which interrupts can be enabled?
        uart.write(IER, 0);
        assert_eq!(uart.read(IER), 0);
        uart.write(IER, 0x0f);
        assert_eq!(uart.read(IER), 0x0f);
        uart.write(IER, 0);
        // Do the modem lines follow in loopback mode?
        uart.write(MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS);
        assert_eq!(uart.read(MSR) & 0xf0, MSR_DCD | MSR_CTS);
        uart.write(MCR, 0);
        // Does it say that it has working FIFOs?
        assert_eq!(uart.read(IIR_FCR) >> 6, 0);
        uart.write(IIR_FCR, FCR_ENABLE);
        assert_eq!(uart.read(IIR_FCR) >> 6, 3);
        // And nothing of its successors: no enhanced registers behind the divisor latch.
        uart.write(LCR, LCR_DIVISOR_LATCH);
        assert_ne!(uart.read(IIR_FCR), 0);
        uart.write(LCR, 3);
        // startup: the interrupt of an empty transmitter comes again when it is enabled again.
        for _ in 0..2 {
            uart.write(IER, IER_TRANSMITTER_EMPTY);
            assert_eq!(uart.read(IIR_FCR) & 0xf, IIR_TRANSMITTER_EMPTY);
            assert_eq!(uart.read(IIR_FCR) & 0xf, IIR_NONE);
            uart.write(IER, 0);
        }
    }

    #[test]
    fn freebsd_measures_a_fifo_of_sixteen() {
        let mut uart = running(0);
        uart.write(MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS | MCR_DTR);
        let mut sent = 0;
        while uart.read(LSR) & LSR_OVERRUN == 0 {
            assert_eq!(uart.write(DATA, 0x55), Written::Nothing, "nothing leaves the chip");
            sent += 1;
        }
        assert_eq!(sent, 17);
        assert_eq!(uart.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER), Written::Cleared(vec![]));
        assert_eq!(uart.read(LSR) & LSR_DATA_READY, 0);
    }

    #[test]
    fn loopback_returns_what_was_sent() {
        let mut uart = running(IER_RECEIVED);
        uart.write(MCR, MCR_LOOP);
        for byte in *b"abc" {
            uart.write(DATA, byte);
        }
        assert_eq!((uart.room(), uart.interrupt()), (0, true));
        assert_eq!([(); 4].map(|()| uart.read(DATA)), *b"abc\0");
    }

    #[test]
    fn causes_of_interrupt_come_by_priority_and_go_by_their_acknowledgement() {
        let mut uart = running(0x0f);
        uart.write(MCR, MCR_LOOP);
        uart.write(MCR, 0);
        (0..14).for_each(|byte| uart.receive(byte));
        uart.receive_break();
        (0..2).for_each(|byte| uart.receive(byte));
        let mut cause = |act: &mut dyn FnMut(&mut Uart)| {
            assert!(uart.interrupt());
            let cause = uart.read(IIR_FCR) & 0xf;
            act(&mut uart);
            cause
        };
        assert_eq!(cause(&mut |u| assert_eq!(u.read(LSR), 0xe3)), IIR_LINE_STATUS, "overrun");
        assert_eq!(cause(&mut |u| (0..13).for_each(|byte| assert_eq!(u.read(DATA), byte))), IIR_RECEIVED);
        assert_eq!(cause(&mut |u| assert_eq!(u.read(DATA), 13)), IIR_TIMEOUT);
        assert_eq!(cause(&mut |u| assert_eq!(u.read(LSR), 0xf1)), IIR_LINE_STATUS, "break");
        assert_eq!(cause(&mut |u| assert_eq!((u.read(DATA), u.read(DATA)), (0, 0))), IIR_TIMEOUT);
        assert_eq!(cause(&mut |_| ()), IIR_TRANSMITTER_EMPTY);
        assert_eq!(cause(&mut |u| assert_eq!(u.read(MSR), 0xbb)), IIR_MODEM_STATUS);
        assert!(!uart.interrupt());
        assert_eq!(uart.read(IIR_FCR), IIR_FIFOS | IIR_NONE);
    }

    #[test]
    fn without_fifos_it_is_a_16450() {
        let mut uart = Uart::new();
        uart.write(IER, IER_RECEIVED);
        assert_eq!(uart.room(), 1);
        uart.receive(b'x');
        assert_eq!((uart.room(), uart.read(IIR_FCR)), (0, IIR_RECEIVED));
        uart.receive(b'y');
        assert_eq!(uart.read(LSR) & (LSR_OVERRUN | LSR_DATA_READY), LSR_OVERRUN | LSR_DATA_READY);
        assert_eq!(uart.read(DATA), b'x');
    }

    #[test]
    fn the_divisor_latch_hides_data_and_enable() {
        let mut uart = running(0x05);
        uart.write(LCR, LCR_DIVISOR_LATCH | 3);
        assert_eq!(uart.write(DATA, 1), Written::Nothing);
        uart.write(IER, 2);
        assert_eq!((uart.read(DATA), uart.read(IER)), (1, 2));
        uart.write(LCR, 3);
        assert_eq!((uart.read(DATA), uart.read(IER), uart.read(LCR)), (0, 5, 3));
        uart.write(SCR, 0xa5);
        assert_eq!(uart.read(SCR), 0xa5);
    }

    #[test]
    fn input_waits_until_the_guest_listens_and_comes_back_when_it_clears() {
        let mut uart = Uart::new();
        assert_eq!(uart.room(), 0);
        (0..PATIENT_LOOKS).for_each(|_| assert_eq!(uart.read(LSR), 0x60));
        assert_eq!(uart.room(), 1, "it polls");
        let mut uart = running(IER_RECEIVED);
        assert_eq!(uart.room(), 16);
        uart.receive(b'a');
        uart.receive(b'b');
        uart.write(IER, 0);
        assert_eq!(uart.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER), Written::Cleared(b"ab".to_vec()));
        assert_eq!((uart.room(), uart.read(DATA)), (0, 0));
    }

    proptest! {
        #[test]
        fn no_access_breaks_it(accesses in prop::collection::vec((0..8u8, any::<u8>(), 0..4u8), 0..400)) {
            let mut uart = Uart::new();
            for (offset, value, kind) in accesses {
                match kind {
                    0 => drop(uart.write(offset, value)),
                    1 => drop(uart.read(offset)),
                    2 => uart.receive(value),
                    _ => uart.receive_break(),
                }
                prop_assert!(uart.is_valid() && uart.room() <= FIFO);
                // What interrupts can be told, and what is told interrupts.
                let mut copy = uart.clone();
                prop_assert_eq!(copy.read(IIR_FCR) & 1 == 0, uart.interrupt());
            }
        }
    }
}
