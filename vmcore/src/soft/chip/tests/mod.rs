//! The chips through the registers by which guests reach them.

mod ioapic;
mod pic;
mod pit;

use std::sync::Arc;

use proptest::prelude::*;

use super::Chipset;
use crate::soft::clock::Clock;
use crate::soft::link::{Link, attention};
use crate::state::IrqchipState;

/// A chipset with vCPU 0, and a clock that is set by hand.
struct Rig {
    chips: Chipset,
    clock: Arc<Clock>,
    link: Arc<Link>,
}

impl Rig {
    fn new() -> Self {
        let clock = Arc::new(Clock::manual());
        let chips = Chipset::new(clock.clone());
        let link = Link::new(0);
        chips.add_vcpu(link.clone());
        Self { chips, clock, link }
    }

    /// Writes bytes to ports.
    fn out(&self, writes: &[(u16, u8)]) {
        for &(port, value) in writes {
            assert!(Chipset::claims(port));
            self.chips.port_write(port, value);
        }
    }

    fn read(&self, port: u16) -> u8 {
        assert!(Chipset::claims(port));
        self.chips.port_read(port)
    }

    fn set_irq(&self, gsi: u32, high: bool) {
        self.chips.set_irq(gsi, high).unwrap();
    }

    fn pulse(&self, gsi: u32) {
        self.set_irq(gsi, true);
        self.set_irq(gsi, false);
    }

    /// Whether the link was asked for this since the last call.
    fn asked(&self, bits: u32) -> bool {
        self.link.take(bits) != 0
    }
}

#[test]
fn gsis_are_checked() {
    let rig = Rig::new();
    rig.chips.set_irq(23, true).unwrap();
    for gsi in [24, 1000, u32::MAX] {
        let text = rig.chips.set_irq(gsi, true).unwrap_err().to_string();
        assert!(text.contains(&format!("GSI {gsi}")) && text.contains("0 to 23"), "{text}");
    }
}

#[test]
fn a_saved_state_is_restored_and_saved_the_same() {
    let rig = Rig::new();
    rig.clock.set(5_000_000);
    rig.out(&[(0x20, 0x11), (0x21, 0x68), (0x21, 4), (0x21, 1), (0x21, 0xfb)]);
    rig.out(&[(0xa0, 0x11), (0xa1, 0x70), (0xa1, 2), (0xa1, 1), (0xa1, 0x7f), (0x4d1, 0x0e)]);
    rig.out(&[(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e), (0x43, 0xb6), (0x42, 7), (0x61, 3)]);
    for (register, value) in [(0x18, 0x1_0054), (0x1a, 0x8055), (0x1b, 3 << 24)] {
        rig.chips.ioapic_write(0, register);
        rig.chips.ioapic_write(0x10, value);
    }
    rig.set_irq(5, true);
    rig.pulse(9);
    let state = rig.chips.save();
    assert_eq!((state.pics[0].irq_base, state.pics[0].imr, state.pics[1].imr), (0x68, 0xfb, 0x7f));
    assert_eq!((state.pit.channels[0].count, state.pit.channels[0].mode), (0x2e9c, 2));
    assert_eq!((state.pit.channels[2].write_state, state.pit.speaker_data_on), (4, true));
    // Pin 5 is level-triggered, and its interrupt has been sent.
    assert_eq!(state.ioapic.redirection[5], 3 << 56 | 0xc055);

    let new = Rig::new();
    new.clock.set(5_000_000);
    new.chips.restore(&state).unwrap();
    assert_eq!(new.chips.save(), state);
    assert!(new.asked(attention::TIMER), "vCPU 0 must learn of its new deadline");
    assert_eq!(new.chips.deadline(), rig.chips.deadline());
}

#[test]
fn what_is_not_a_chipset_s_state_is_refused_and_changes_nothing() {
    let rig = Rig::new();
    let state = rig.chips.save();
    assert_eq!(state.ioapic.redirection, [1 << 16; 24]);
    let mut short = state.clone();
    short.ioapic.redirection.pop();
    short.pics[0].imr = 7;
    let text = rig.chips.restore(&short).unwrap_err().to_string();
    assert!(text.contains("24 redirection") && text.contains("23 redirection"), "{text}");
    let mut moved = state.clone();
    moved.ioapic.base = 0x1000;
    assert!(rig.chips.restore(&moved).unwrap_err().to_string().contains("0x1000"));
    assert!(rig.chips.restore(&IrqchipState::default()).is_err());
    assert_eq!(rig.chips.save(), state);
}

/// One thing that a guest or a device does.
#[derive(Clone, Debug)]
enum Act {
    Out(u16, u8),
    In(u16),
    Write(u64, u32),
    Read(u64),
    Line(u32, bool),
    End(u8),
    Acknowledge,
    Later(u64),
    Poll,
    SaveAndRestore,
}

fn act() -> impl Strategy<Value = Act> {
    let port =
        || prop::sample::select(vec![0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61]);
    prop_oneof![
        8 => (port(), any::<u8>()).prop_map(|(port, value)| Act::Out(port, value)),
        4 => port().prop_map(Act::In),
        4 => (prop::sample::select(vec![0, 0x10]), prop_oneof![0u32..0x50, any::<u32>()])
            .prop_map(|(offset, value)| Act::Write(offset, value)),
        1 => any::<u64>().prop_map(Act::Read),
        1 => (any::<u64>(), any::<u32>()).prop_map(|(offset, value)| Act::Write(offset, value)),
        4 => (0u32..30, any::<bool>()).prop_map(|(gsi, high)| Act::Line(gsi, high)),
        2 => any::<u8>().prop_map(Act::End),
        3 => Just(Act::Acknowledge),
        3 => prop_oneof![0u64..100_000_000, any::<u64>()].prop_map(Act::Later),
        3 => Just(Act::Poll),
        1 => Just(Act::SaveAndRestore),
    ]
}

proptest! {
    #[test]
    fn nothing_panics(acts in prop::collection::vec(act(), 0..200)) {
        let rig = Rig::new();
        for act in acts {
            match act {
                Act::Out(port, value) => rig.chips.port_write(port, value),
                Act::In(port) => drop(rig.chips.port_read(port)),
                Act::Write(offset, value) => rig.chips.ioapic_write(offset, value),
                Act::Read(offset) => drop(rig.chips.ioapic_read(offset)),
                Act::Line(gsi, high) => prop_assert_eq!(rig.chips.set_irq(gsi, high).is_ok(), gsi < 24),
                Act::End(vector) => rig.chips.end_of_interrupt(vector),
                Act::Acknowledge => {
                    let high = rig.chips.pic_output();
                    prop_assert_eq!(rig.chips.acknowledge().is_some(), high);
                }
                Act::Later(ns) => rig.clock.set(rig.clock.now().saturating_add(ns)),
                Act::Poll => {
                    rig.chips.poll();
                    let now = rig.clock.now();
                    prop_assert!(now == u64::MAX || rig.chips.deadline().is_none_or(|at| at > now));
                }
                Act::SaveAndRestore => {
                    let state = rig.chips.save();
                    rig.chips.restore(&state).unwrap();
                }
            }
        }
    }

    #[test]
    fn no_saved_state_makes_the_chips_panic(bytes in prop::collection::vec(any::<u8>(), 1024)) {
        let mut bytes = bytes.into_iter().cycle();
        let mut byte = move || bytes.next().unwrap();
        let rig = Rig::new();
        let mut state = rig.chips.save();
        for pic in &mut state.pics {
            for field in [&mut pic.last_irr, &mut pic.irr, &mut pic.imr, &mut pic.isr, &mut pic.priority_add,
                &mut pic.irq_base, &mut pic.init_state, &mut pic.elcr, &mut pic.elcr_mask] {
                *field = byte();
            }
        }
        for channel in &mut state.pit.channels {
            channel.count = u32::from_le_bytes([byte(), byte(), byte() & 1, byte() & 1]);
            channel.mode = byte() % 9;
            channel.bcd = byte() % 2 != 0;
            channel.gate = byte() % 2 != 0;
            for field in [&mut channel.count_latched, &mut channel.read_state, &mut channel.write_state,
                &mut channel.rw_mode] {
                *field = byte();
            }
        }
        state.ioapic.ioregsel = u32::from_le_bytes([byte(), byte(), byte(), byte()]);
        state.ioapic.irr = u32::from_le_bytes([byte(), byte(), byte(), byte()]);
        state.ioapic.redirection.iter_mut().for_each(|entry| *entry = u64::from(byte()) << 8);
        rig.chips.restore(&state).unwrap();
        for port in (0..=u16::MAX).filter(|&port| Chipset::claims(port)) {
            rig.clock.set(rig.clock.now() + 1_000_000);
            rig.chips.poll();
            rig.chips.port_read(port);
            rig.chips.port_write(port, byte());
        }
        rig.chips.save();
    }
}
