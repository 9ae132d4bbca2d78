use super::Rig;
use crate::soft::link::attention;

/// Ticks of the counters a second.
const FREQUENCY: u128 = 1_193_182;

/// The first ns at which `ticks` have passed.
fn at(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000).div_ceil(FREQUENCY).try_into().unwrap()
}

/// Programs counter `n` with control word bits `mode` (mode and BCD), both bytes.
fn program(rig: &Rig, n: u8, mode: u8, count: u16) {
    let [low, high] = count.to_le_bytes();
    let port = 0x40 + u16::from(n);
    rig.out(&[(0x43, n << 6 | 0x30 | mode), (port, low), (port, high)]);
}

/// The latched count of counter `n`.
fn count(rig: &Rig, n: u8) -> u16 {
    rig.out(&[(0x43, n << 6)]);
    let port = 0x40 + u16::from(n);
    u16::from_le_bytes([rig.read(port), rig.read(port)])
}

/// Status byte of counter `n`, by read-back.
fn status(rig: &Rig, n: u8) -> u8 {
    rig.out(&[(0x43, 0xe0 | 2 << n)]);
    rig.read(0x40 + u16::from(n))
}

fn out2(rig: &Rig) -> bool {
    rig.read(0x61) & 0x20 != 0
}

/// Interrupts of counter 0 since the last call, by the PIC's input 0: at most one.
fn interrupted(rig: &Rig) -> bool {
    rig.chips.poll();
    rig.chips.acknowledge().is_some()
}

/// With the PIC in AEOI mode, so that nothing keeps the next interrupt away.
fn ready() -> Rig {
    let rig = Rig::new();
    rig.out(&[(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)]);
    rig
}

#[test]
fn the_periodic_modes_interrupt_without_drift() {
    for mode in [4, 6] {
        let rig = ready();
        rig.clock.set(777);
        program(&rig, 0, mode, 1193);
        assert!(rig.asked(attention::TIMER), "vCPU 0 must learn of the deadline");
        for period in 1..=5000 {
            let due = 777 + at(1193 * period);
            assert_eq!(rig.chips.deadline(), Some(due));
            rig.clock.set(due - 1);
            assert!(!interrupted(&rig));
            // The processor comes late, each time.
            rig.clock.set(due + 50_000);
            assert!(interrupted(&rig) && !interrupted(&rig));
        }
        // What is missed is not made up for.
        rig.clock.set(777 + at(1193 * 6000) + 5);
        assert!(interrupted(&rig) && !interrupted(&rig));
        assert_eq!(rig.chips.deadline(), Some(777 + at(1193 * 6001)));
    }
}

#[test]
fn the_one_shot_modes_interrupt_once() {
    for (mode, ticks) in [(0, 1000), (8, 1001)] {
        let rig = ready();
        program(&rig, 0, mode, 1000);
        assert_eq!(rig.chips.deadline(), Some(at(ticks)));
        rig.clock.set(at(ticks) - 1);
        assert!(!interrupted(&rig));
        rig.clock.set(at(ticks));
        assert!(interrupted(&rig));
        assert_eq!(rig.chips.deadline(), None);
        rig.clock.set(at(1_000_000));
        assert!(!interrupted(&rig));
        // A new count, without a control word, starts it again.
        rig.out(&[(0x40, 0x10), (0x40, 0)]);
        assert_eq!(rig.chips.deadline(), Some(rig.clock.now() + at(ticks - 1000 + 16)));
    }
    // Counter 0 has no trigger for these.
    for mode in [2, 10] {
        let rig = ready();
        program(&rig, 0, mode, 1000);
        assert_eq!(rig.chips.deadline(), None);
    }
}

#[test]
fn another_mode_or_half_a_count_stops_the_interrupts() {
    let rig = ready();
    program(&rig, 0, 4, 100);
    rig.asked(attention::TIMER);
    rig.out(&[(0x43, 0x30)]);
    assert_eq!(rig.chips.deadline(), None);
    assert!(rig.asked(attention::TIMER));
    rig.out(&[(0x40, 0x10)]);
    assert_eq!(rig.chips.deadline(), None);
    rig.out(&[(0x40, 0)]);
    assert_eq!(rig.chips.deadline(), Some(at(16)));
    rig.out(&[(0x40, 0x10)]);
    assert_eq!(rig.chips.deadline(), None);
}

#[test]
fn very_short_periods_are_coalesced() {
    let rig = ready();
    program(&rig, 0, 4, 1);
    assert_eq!(rig.chips.deadline(), Some(at(239)));
    rig.clock.set(at(1000));
    assert!(interrupted(&rig));
    assert_eq!(rig.chips.deadline(), Some(at(1239)));
}

#[test]
fn a_count_is_read_as_it_was_latched() {
    let rig = Rig::new();
    rig.clock.set(at(5));
    program(&rig, 0, 4, 0);
    rig.clock.set(rig.clock.now() + at(0x1234));
    rig.out(&[(0x43, 0)]);
    rig.clock.set(rig.clock.now() + at(0x3333));
    // A second latch command before the first was read does nothing.
    rig.out(&[(0x43, 0)]);
    let latched = u16::from_le_bytes([rig.read(0x40), rig.read(0x40)]);
    assert_eq!(latched, 0u16.wrapping_sub(0x1234));
    assert!(count(&rig, 0) < latched);
    // Not latched: low and high take turns.
    let [low, high] = count(&rig, 0).to_le_bytes();
    assert_eq!([0; 4].map(|_| rig.read(0x40)), [low, high, low, high]);
    // One byte only.
    rig.out(&[(0x43, 0x14), (0x40, 0x80), (0x43, 0)]);
    assert_eq!([rig.read(0x40), rig.read(0x40)], [0x80, 0x80]);
    rig.out(&[(0x43, 0x24), (0x40, 0x80), (0x43, 0)]);
    assert_eq!([rig.read(0x40), rig.read(0x40)], [0x80, 0x80]);
    assert_eq!(rig.chips.save().pit.channels[0].count, 0x8000);
}

#[test]
fn read_back_latches_status_and_counts_of_several_counters() {
    let rig = Rig::new();
    program(&rig, 0, 4, 100);
    rig.out(&[(0x43, 0x76)]);
    rig.clock.set(at(10));
    rig.out(&[(0x43, 0xc6)]);
    // OUT, null count, access, mode, BCD; then the count.
    assert_eq!(rig.read(0x40), 0xb4);
    assert_eq!(u16::from_le_bytes([rig.read(0x40), rig.read(0x40)]), 90);
    assert_eq!(rig.read(0x41), 0xf6);
    program(&rig, 1, 1, 0x99);
    assert_eq!(status(&rig, 1), 0x31);
}

#[test]
fn binary_coded_decimals() {
    let rig = Rig::new();
    program(&rig, 0, 5, 0x1000);
    assert_eq!(rig.chips.deadline(), Some(at(1000)));
    rig.clock.set(at(1));
    assert_eq!(count(&rig, 0), 0x999);
    program(&rig, 0, 1, 0);
    let start = rig.clock.now();
    assert_eq!(rig.chips.deadline(), Some(start + at(10_000)));
    assert_eq!(count(&rig, 0), 0);
    rig.clock.set(start + at(1));
    assert_eq!(count(&rig, 0), 0x9999);
    // Digits that are none.
    program(&rig, 0, 1, 0xffff);
    count(&rig, 0);
}

/// OUT of counter 2 after 0, 1, ... ticks.
fn wave(rig: &Rig, ticks: u64) -> String {
    let start = rig.clock.now();
    let wave = (0..ticks).map(|tick| {
        rig.clock.set(start + at(tick));
        if out2(rig) { '-' } else { '_' }
    });
    wave.collect()
}

#[test]
fn counter_2_shows_its_wave_at_port_61() {
    let cases = [(0, "____------"), (4, "---_---_---_"), (6, "--__--__--__"), (8, "----_-----")];
    for (mode, expected) in cases {
        let rig = Rig::new();
        rig.out(&[(0x61, 1)]);
        program(&rig, 2, mode, 4);
        assert_eq!(wave(&rig, expected.len() as u64), expected, "mode {}", mode / 2);
    }
    let rig = Rig::new();
    rig.out(&[(0x61, 1)]);
    program(&rig, 2, 6, 5);
    assert_eq!(wave(&rig, 10), "---__---__");
}

#[test]
fn the_gate_triggers_and_holds() {
    // Modes 1 and 5 wait for the gate to rise.
    for (mode, expected) in [(2, "____------"), (10, "----_-----")] {
        let rig = Rig::new();
        program(&rig, 2, mode, 4);
        assert_eq!(wave(&rig, 5), "-----");
        rig.out(&[(0x61, 3)]);
        assert_eq!(wave(&rig, 10), expected);
        rig.out(&[(0x61, 0), (0x61, 1)]);
        assert_eq!(wave(&rig, 10), expected);
        assert_eq!(rig.read(0x61) & 3, 1);
    }
    // Mode 0 goes on where it was.
    let rig = Rig::new();
    program(&rig, 2, 0, 4);
    assert_eq!(wave(&rig, 5), "_____");
    rig.out(&[(0x61, 1)]);
    assert_eq!(wave(&rig, 3), "___");
    rig.out(&[(0x61, 0)]);
    assert_eq!((wave(&rig, 9), count(&rig, 2)), ("_________".into(), 2));
    rig.out(&[(0x61, 1)]);
    assert_eq!(wave(&rig, 3), "__-");
    // Mode 2 begins anew.
    let rig = Rig::new();
    rig.out(&[(0x61, 1)]);
    program(&rig, 2, 4, 4);
    assert_eq!(wave(&rig, 3), "---");
    rig.out(&[(0x61, 0)]);
    assert_eq!(wave(&rig, 9), "---------");
    rig.out(&[(0x61, 1)]);
    assert_eq!(wave(&rig, 5), "---_-");
}

#[test]
fn the_square_wave_counts_by_two() {
    let rig = Rig::new();
    for (period, expected) in [(6, [6, 4, 2, 6, 4, 2, 6]), (7, [6, 4, 2, 0, 6, 4, 2])] {
        program(&rig, 0, 6, period);
        let start = rig.clock.now();
        let counts = [0, 1, 2, 3, 4, 5, 6].map(|tick| {
            rig.clock.set(start + at(tick));
            count(&rig, 0)
        });
        assert_eq!(counts, expected);
    }
}

#[test]
fn a_one_shot_counts_through_zero() {
    let rig = Rig::new();
    program(&rig, 0, 0, 5);
    rig.clock.set(at(7));
    assert_eq!(count(&rig, 0), 0xfffe);
}

#[test]
fn the_refresh_signal_toggles() {
    let rig = Rig::new();
    let bits: Vec<_> = (0..6)
        .map(|n| {
            rig.clock.set(n * 15_085);
            rig.read(0x61) & 0x10 != 0
        })
        .collect();
    assert_eq!(bits, [false, true, false, true, false, true]);
}

#[test]
fn a_restored_counter_begins_anew() {
    let rig = ready();
    rig.clock.set(123_456);
    program(&rig, 0, 4, 1000);
    rig.clock.set(200_000_000);
    let mut state = rig.chips.save();
    assert_eq!(state.pit.channels[0].count_load_time_ns, 123_456);
    // Another host's clock.
    state.pit.channels[0].count_load_time_ns = i64::MAX;
    let new = ready();
    new.clock.set(50);
    new.chips.restore(&state).unwrap();
    assert_eq!(new.chips.deadline(), Some(50 + at(1000)));
    state.pit.hpet_legacy = true;
    new.chips.restore(&state).unwrap();
    new.clock.set(at(5000));
    assert!(!interrupted(&new));
}
