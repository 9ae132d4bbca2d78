//! The 8254 timer of a PC (Intel 8254 data sheet), and port 0x61, which gates its counter 2 and shows
//! its output.

use super::counter::Counter;
use crate::state::PitState;

/// The port of the gate, the speaker and the refresh signal.
const PORT_B: u16 = 0x61;

/// Half a period of the refresh signal, 18 ticks, in ns.
const REFRESH_NS: u64 = 15_085;

/// Counters 0 (IRQ 0), 1 (refresh) and 2 (speaker).
#[derive(Clone, Debug)]
pub(super) struct Pit {
    counters: [Counter; 3],
    speaker: bool,
    gate: bool,
    /// IRQ 0 is not this timer's.
    hpet_legacy: bool,
}

impl Pit {
    pub(super) fn new() -> Self {
        let counters = [true, true, false].map(Counter::new);
        Self { counters, speaker: false, gate: false, hpet_legacy: false }
    }

    pub(super) fn claims(port: u16) -> bool {
        matches!(port, 0x40..=0x43 | PORT_B)
    }

    pub(super) fn read(&mut self, now: u64, port: u16) -> u8 {
        match port {
            PORT_B => {
                u8::from(self.gate)
                    | u8::from(self.speaker) << 1
                    | u8::from((now / REFRESH_NS) & 1 != 0) << 4
                    | u8::from(self.counters[2].out(now)) << 5
            }
            0x40..=0x42 => self.counters[usize::from(port & 3)].read(now),
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, now: u64, port: u16, value: u8) {
        match port {
            PORT_B => {
                self.speaker = value & 2 != 0;
                self.gate = value & 1 != 0;
                self.counters[2].set_gate(now, self.gate);
            }
            0x40..=0x42 => self.counters[usize::from(port & 3)].write(now, value),
            _ => self.control(now, value),
        }
    }

    fn control(&mut self, now: u64, word: u8) {
        if let Some(counter) = self.counters.get_mut(usize::from(word >> 6)) {
            return counter.control(now, word);
        }
        // Read-back.
        for (n, counter) in self.counters.iter_mut().enumerate() {
            if word & 2 << n == 0 {
                continue;
            }
            if word & 0x20 == 0 {
                counter.latch_count(now);
            }
            if word & 0x10 == 0 {
                counter.latch_status(now);
            }
        }
    }

    /// Whether counter 0 has interrupted since this was last asked, once or more often.
    pub(super) fn take_interrupt(&mut self, now: u64) -> bool {
        self.counters[0].take_rise(now) && !self.hpet_legacy
    }

    /// The machine's time in ns at which [`Pit::take_interrupt`] has something next.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.counters[0].deadline()
    }

    pub(super) fn save(&self, now: u64) -> PitState {
        PitState {
            channels: self.counters.each_ref().map(|counter| counter.save(now)),
            speaker_data_on: self.speaker,
            hpet_legacy: self.hpet_legacy,
        }
    }

    pub(super) fn restore(&mut self, now: u64, state: &PitState) {
        for (counter, state) in self.counters.iter_mut().zip(&state.channels) {
            counter.restore(now, state);
        }
        (self.speaker, self.hpet_legacy) = (state.speaker_data_on, state.hpet_legacy);
        self.gate = state.channels[2].gate;
    }
}
