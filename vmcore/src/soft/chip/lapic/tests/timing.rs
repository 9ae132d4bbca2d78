//! The timer, and what saving makes of it.

use super::*;
use crate::state::LapicState;

const LVT: u32 = 0x320;
const INITIAL: u32 = 0x380;
const CURRENT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;
const DEADLINE_MSR: u32 = 0x6e0;

/// How often the timer's interrupt, 0x40, comes until `ns`, looking at every one of `looks`.
fn count(rig: &mut Rig, looks: impl IntoIterator<Item = u64>) -> usize {
    let mut count = 0;
    for ns in looks {
        rig.at(ns);
        let apic = &mut rig.apics[0];
        if accept(apic) == Some(0x40) {
            apic.write(0xb0, 0);
            count += 1;
        }
    }
    count
}

#[test]
fn one_shot_counts_down_and_stops() {
    let mut rig = Rig::new(1);
    rig.at(5_000);
    let apic = &mut rig.apics[0];
    apic.write(DIVIDE, 0x3);
    apic.write(LVT, 0x40);
    apic.write(INITIAL, 100);
    assert_eq!(apic.deadline(), Some(5_000 + 1_600));
    assert_eq!(apic.read(CURRENT), 100);
    rig.at(5_016);
    assert_eq!(rig.apics[0].read(CURRENT), 99);
    rig.at(6_599);
    assert_eq!(rig.apics[0].read(CURRENT), 1);
    assert_eq!(rig.apics[0].pending(), None);
    assert_eq!(count(&mut rig, [6_600, 6_601, 100_000]), 1);
    assert_eq!((rig.apics[0].read(CURRENT), rig.apics[0].read(INITIAL)), (0, 100));
    assert_eq!(rig.apics[0].deadline(), None);
}

#[test]
fn divisors_are_powers_of_two() {
    let mut rig = Rig::new(1);
    let apic = &mut rig.apics[0];
    apic.write(LVT, 0x40);
    for (divide, tick) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        apic.write(DIVIDE, divide);
        apic.write(INITIAL, 1000);
        assert_eq!(apic.deadline(), Some(1000 * tick), "{divide:#x}");
    }
    // The count goes on from where it is.
    rig.at(400);
    let apic = &mut rig.apics[0];
    assert_eq!(apic.read(CURRENT), 600);
    apic.write(DIVIDE, 0);
    assert_eq!(apic.read(CURRENT), 600);
    assert_eq!(apic.deadline(), Some(400 + 1200));
}

#[test]
fn periods_do_not_drift_and_missed_ones_are_one() {
    let mut rig = Rig::new(1);
    let apic = &mut rig.apics[0];
    apic.write(DIVIDE, 0xb);
    apic.write(LVT, 0x40 | PERIODIC);
    apic.write(INITIAL, 1000);
    assert_eq!(count(&mut rig, (1..=10).map(|n| n * 1000 + 37)), 10);
    assert_eq!(rig.apics[0].deadline(), Some(11_000));
    assert_eq!(count(&mut rig, [54_321]), 1);
    assert_eq!(rig.apics[0].deadline(), Some(55_000));
    assert_eq!(rig.apics[0].read(CURRENT), 679);
    // A count of 0 stops it.
    rig.apics[0].write(INITIAL, 0);
    assert_eq!(count(&mut rig, [100_000]), 0);
}

#[test]
fn extremes_neither_overflow_nor_hang() {
    let mut rig = Rig::new(1);
    for start in [0, u64::MAX - 5] {
        rig.at(start);
        for mode in [0, PERIODIC, TSC_DEADLINE, 3 << 17] {
            for divide in [0, 0xa, 0xb] {
                for initial in [0, 1, u32::MAX] {
                    let apic = &mut rig.apics[0];
                    apic.write(LVT, 0x40 | mode);
                    apic.write(DIVIDE, divide);
                    apic.write(INITIAL, initial);
                    for (khz, offset) in [(0, 0), (u32::MAX, u64::MAX), (1, 7)] {
                        apic.set_tsc(khz, offset);
                        assert!(apic.msr_write(DEADLINE_MSR, u64::MAX));
                        apic.poll();
                        apic.read(CURRENT);
                        apic.save();
                    }
                    rig.at(u64::MAX);
                    rig.at(start);
                }
            }
        }
    }
}

#[test]
fn a_masked_timer_runs_silently() {
    let mut rig = Rig::new(1);
    let apic = &mut rig.apics[0];
    apic.write(DIVIDE, 0xb);
    apic.write(LVT, 0x1_0040);
    apic.write(INITIAL, 1000);
    assert_eq!(apic.deadline(), None);
    rig.at(400);
    assert_eq!(rig.apics[0].read(CURRENT), 600);
    rig.clock.set(2000);
    rig.apics[0].write(LVT, 0x40);
    assert_eq!(count(&mut rig, [2000, 3000]), 0, "it expired while it was masked");
}

#[test]
fn the_deadline_is_in_ticks_of_the_tsc() {
    let mut rig = Rig::new(1);
    let apic = &mut rig.apics[0];
    assert!(apic.msr_write(DEADLINE_MSR, 500));
    assert_eq!(apic.msr_read(DEADLINE_MSR), Some(0), "in another mode it does not take");
    apic.write(LVT, 0x40 | TSC_DEADLINE);
    apic.set_tsc(3_000_000, 600);
    assert!(apic.msr_write(DEADLINE_MSR, 600 + 3_001));
    assert_eq!(apic.deadline(), Some(1_001));
    assert_eq!(apic.msr_read(DEADLINE_MSR), Some(3_601));
    assert_eq!((apic.read(INITIAL), apic.read(CURRENT)), (0, 0));
    // The TSC is set: so is the time.
    apic.set_tsc(3_000_000, 0);
    assert_eq!(apic.deadline(), Some(1_201));
    assert_eq!(count(&mut rig, [1_200, 1_201, 9_999]), 1);
    let apic = &mut rig.apics[0];
    assert_eq!(apic.msr_read(DEADLINE_MSR), Some(0));
    // What is over comes at once.
    apic.link.take(u32::MAX);
    assert!(apic.msr_write(DEADLINE_MSR, 1));
    assert_eq!(apic.link.take(u32::MAX), attention::TIMER);
    assert_eq!(count(&mut rig, [9_999]), 1);
    let apic = &mut rig.apics[0];
    assert!(apic.msr_write(DEADLINE_MSR, 100_000));
    apic.write(LVT, 0x40);
    assert_eq!(apic.deadline(), None, "another mode disarms it");
    assert_eq!(apic.msr_read(DEADLINE_MSR), Some(0));
}

fn restored(state: &LapicState, base: u64, now: u64) -> Rig {
    let mut rig = Rig::new(1);
    rig.clock.set(now);
    rig.apics[0].restore(state, base).unwrap();
    rig
}

#[test]
fn a_saved_timer_goes_on() {
    for (mode, looks, expected) in
        [(0, [10_000, 10_599, 10_600, 12_000], 1), (PERIODIC, [10_599, 10_600, 11_599, 11_600], 2)]
    {
        let mut rig = Rig::new(1);
        let apic = &mut rig.apics[0];
        apic.write(DIVIDE, 0xb);
        apic.write(LVT, 0x40 | mode);
        apic.write(INITIAL, 1000);
        rig.at(400);
        let state = rig.apics[0].save();
        assert_eq!(state.registers[0x39], 600);
        let mut other = restored(&state, 0xfee0_0900, 10_000);
        assert_eq!(other.apics[0].save(), state);
        assert_eq!(count(&mut other, looks), expected);
    }
}

#[test]
fn an_expiry_is_not_lost_by_saving() {
    for mode in [0, PERIODIC] {
        let mut rig = Rig::new(1);
        let apic = &mut rig.apics[0];
        apic.write(DIVIDE, 0xb);
        apic.write(LVT, 0x40 | mode);
        apic.write(INITIAL, 1000);
        // It expires, and nobody looks.
        rig.clock.set(1_100);
        let state = rig.apics[0].save();
        assert_eq!(state.registers[0x22], 1);
        assert_eq!(count(&mut restored(&state, 0xfee0_0900, 0), [0]), 1);
    }
    let mut rig = Rig::new(1);
    let apic = &mut rig.apics[0];
    apic.write(LVT, 0x40 | TSC_DEADLINE);
    assert!(apic.msr_write(DEADLINE_MSR, 700));
    rig.clock.set(800);
    let (state, deadline) = (rig.apics[0].save(), rig.apics[0].tsc_deadline());
    assert_eq!((state.registers[0x22], deadline), (0, 700));
    let mut other = restored(&state, 0xfee0_0900, 800);
    assert!(other.apics[0].msr_write(DEADLINE_MSR, deadline));
    assert_eq!(count(&mut other, [800, 900]), 1);
}
