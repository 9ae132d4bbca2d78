//! Commands to other APICs, errors, modes, saving.

use super::*;

const ICR: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
const ESR: u32 = 0x280;

#[test]
fn commands_reach_whom_they_name() {
    let mut rig = Rig::new(3);
    rig.apics[0].write(ICR_HIGH, 2 << 24);
    rig.apics[0].write(ICR, 0x4040);
    assert_eq!(rig.receivers(0x40), [2]);
    for (shorthand, expected) in [(1, vec![1]), (2, vec![0, 1, 2]), (3, vec![0, 2])] {
        rig.apics[1].write(ICR, shorthand << 18 | 0x41);
        assert_eq!(rig.receivers(0x41), expected);
    }
    assert_eq!(rig.apics[1].read(ICR), 3 << 18 | 0x41);
    rig.apics[1].write(ICR, 1 << 12 | 0x42);
    assert_eq!(rig.apics[1].read(ICR), 0x42, "never busy");
}

#[test]
fn an_application_processor_is_started() {
    let mut rig = Rig::new(2);
    // Disabled by software, as after reset: these come through all the same.
    rig.apics[1].write(0xf0, 0xff);
    let none = Signals::default();
    let mut send = |command| {
        rig.apics[0].write(ICR_HIGH, 1 << 24);
        rig.apics[0].write(ICR, command);
        let asked = rig.apics[1].link.take(attention::INTERRUPT) != 0;
        let signals = rig.signals();
        assert_eq!(signals[0], none);
        assert_eq!(asked, signals[1] != none);
        signals[1]
    };
    assert_eq!(send(0xc500), Signals { init: true, ..none });
    assert_eq!(send(0x8500), none, "INIT level de-assert");
    assert_eq!(send(0x0500), Signals { init: true, ..none });
    assert_eq!(send(0x069f), Signals { sipi: Some(0x9f), ..none });
    assert_eq!(send(0x0400), Signals { nmi: true, ..none });
    assert_eq!(send(0x0041), none, "a fixed interrupt does not");
    assert_eq!(send(0x0200), none, "there is no SMI");
    assert_eq!(send(0x0741), none);
    // INIT makes an earlier SIPI void, but not a later one.
    let posted = &rig.apics[1].link.posted;
    posted.post(crate::soft::chip::posted::Mode::Sipi, 1, false);
    posted.post(crate::soft::chip::posted::Mode::Init, 0, false);
    assert_eq!(posted.signals(), Signals { init: true, ..none });
    posted.post(crate::soft::chip::posted::Mode::Sipi, 2, false);
    assert_eq!(rig.signals()[1], Signals { init: true, sipi: Some(2), ..none });
}

#[test]
fn software_disabling_masks_and_refuses() {
    let mut rig = Rig::new(1);
    rig.msi(0, 0x50);
    rig.apics[0].take_posted();
    rig.apics[0].write(0x320, 0x40);
    rig.apics[0].write(0xf0, 0xff);
    rig.msi(0, 0x60);
    let apic = &mut rig.apics[0];
    apic.take_posted();
    assert_eq!(apic.read(0x320), 0x1_0040);
    apic.write(0x350, 0x700);
    assert_eq!(apic.read(0x350), 0x1_0700, "the mask cannot be taken away");
    assert!(!apic.accepts_pic());
    apic.write(ICR, 1 << 18 | 0x70);
    assert_eq!(accept(apic), Some(0x50), "what had been accepted stays");
    apic.write(0xb0, 0);
    assert_eq!(apic.pending(), None);
    apic.write(0xf0, 0x1ff);
    apic.write(0x350, 0x700);
    assert!(apic.accepts_pic());
    apic.write(0x350, 0x1_0700);
    assert!(!apic.accepts_pic());
    apic.write(0x350, 0x20);
    assert!(!apic.accepts_pic());
}

#[test]
fn errors_are_latched_by_a_write() {
    let mut rig = Rig::new(1);
    rig.apics[0].write(0x370, 0xfe);
    rig.apics[0].write(ICR, 1 << 18 | 0xf);
    assert_eq!(rig.receivers(0xfe), [0]);
    let apic = &mut rig.apics[0];
    assert_eq!(apic.read(ESR), 0);
    apic.write(ESR, 0);
    assert_eq!(apic.read(ESR), 1 << 5);
    apic.write(ESR, 0);
    assert_eq!(apic.read(ESR), 0);
    assert_eq!((apic.read(0x40), apic.read(0x2f0)), (0, 0));
    apic.write(0xff0, 5);
    assert_eq!(rig.receivers(0xfe), [0]);
    rig.apics[0].write(ESR, 0);
    assert_eq!(rig.apics[0].read(ESR), 1 << 7);
    rig.msi(0, 0x0f);
    assert_eq!(rig.receivers(0xfe), [0]);
    rig.apics[0].write(ESR, 0);
    assert_eq!(rig.apics[0].read(ESR), 1 << 6);
    // An error interrupt that is one itself ends.
    rig.apics[0].write(0x370, 1);
    rig.apics[0].write(ICR, 1 << 18 | 0xf);
    rig.apics[0].write(ESR, 0);
    assert_eq!(rig.apics[0].read(ESR), 1 << 5 | 1 << 6);
}

#[test]
fn level_triggered_vectors_are_told_by_tmr() {
    let mut rig = Rig::new(1);
    rig.msi(0, 0xc050);
    rig.msi(0, 0x51);
    let apic = &mut rig.apics[0];
    apic.take_posted();
    assert_eq!((apic.read(0x1a0), apic.read(0x220)), (1 << 16, 3 << 16));
    // As an edge it loses its mark.
    rig.msi(0, 0x50);
    let apic = &mut rig.apics[0];
    apic.take_posted();
    assert_eq!(apic.read(0x1a0), 0);
}

#[test]
fn x2apic_registers_are_strict() {
    let mut rig = Rig::new(1);
    let apic = &mut rig.apics[0];
    assert_eq!(apic.msr_read(0x802), None);
    assert!(!apic.msr_write(0x808, 0));
    assert!(apic.set_base(apic.base() | base::X2APIC));
    let is_read_only = |msr| matches!(msr, 0x802 | 0x803 | 0x80a | 0x80d | 0x810..=0x827 | 0x839);
    let writable = [0x808, 0x80f, 0x828, 0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x83e];
    let write_only = [0x80b, 0x83f];
    for msr in 0x800..=0x900 {
        assert_eq!(apic.msr_read(msr).is_some(), is_read_only(msr) || writable.contains(&msr), "{msr:#x}");
        let value = if msr == 0x83f { 0x40 } else { 0 };
        let written = apic.msr_write(msr, value);
        assert_eq!(written, writable.contains(&msr) || write_only.contains(&msr), "{msr:#x}");
    }
    for (msr, bad) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 0x400),
        (0x80f, 0x1000),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x830, 1 << 20),
        (0x832, 1 << 19),
        (0x832, 1 << 8),
        (0x835, 1 << 17),
        (0x837, 1 << 10),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert!(!apic.msr_write(msr, bad), "{msr:#x} {bad:#x}");
    }
    assert!(apic.msr_write(0x830, 7 << 32 | 0x1040));
    assert_eq!(apic.msr_read(0x830), Some(7 << 32 | 0x40));
    assert!(apic.msr_write(0x80f, 0x1ff));
    assert!(apic.msr_write(0x83f, 0x45));
    assert_eq!(apic.pending(), Some(0x45));
}

#[test]
fn modes_change_as_the_manual_allows() {
    let mut rig = Rig::new(2);
    let apic = &mut rig.apics[1];
    let (x, x2, off) = (0xfee0_0800, 0xfee0_0c00, 0xfee0_0000);
    assert!(!apic.set_base(x | 1) && !apic.set_base(x | 1 << 9) && !apic.set_base(x | 1 << 60));
    assert!(!apic.set_base(off | base::X2APIC));
    assert!(apic.set_base(0x1234_5800));
    assert!(apic.set_base(x));
    apic.write(0x20, 0x77 << 24);
    assert!(apic.set_base(x2));
    assert_eq!(apic.msr_read(0x802), Some(1));
    assert!(!apic.set_base(x), "not back");
    assert!(apic.msr_write(0x80f, 0x1ff));
    assert!(apic.set_base(off));
    assert!(apic.accepts_pic(), "without an APIC the PIC is wired to the CPU");
    assert!(!apic.set_base(x2));
    assert_eq!(apic.msr_read(0x802), None);
    rig.msi(1 << 12, 0x440);
    assert_eq!(rig.signals()[1], Signals::default());
    let apic = &mut rig.apics[1];
    assert!(apic.set_base(x));
    assert_eq!((apic.read(0x20), apic.read(0xf0)), (1 << 24, 0xff), "as after power-up");
}

#[test]
fn a_state_keeps_every_register() {
    let mut rig = Rig::new(2);
    let apic = &mut rig.apics[1];
    for (offset, value) in [
        (0x80, 0x25),
        (0xd0, 0x0200_0000),
        (0xe0, 0x0fff_ffff),
        (0x350, 0x8700),
        (0x360, 0x400),
        (0x370, 0xfe),
    ] {
        apic.write(offset, value);
    }
    apic.write(ICR_HIGH, 0x0300_0000);
    apic.write(ICR, 0x4055);
    apic.write(0x20, 7 << 24);
    rig.msi(7 << 12, 0x8071);
    rig.apics[1].take_posted();
    assert_eq!(accept(&mut rig.apics[1]), Some(0x71));
    rig.msi(7 << 12, 0x80f3);
    let state = rig.apics[1].save();
    let at = |offset: usize| state.registers[offset >> 4];
    assert_eq!((at(0x20), at(0x30), at(0x80), at(0xa0)), (7 << 24, 0x5_0014, 0x25, 0x70));
    assert_eq!((at(0xd0), at(0xe0), at(0xf0)), (0x0200_0000, 0x0fff_ffff, 0x1ff));
    assert_eq!((at(0x130), at(0x1b0), at(0x1f0)), (1 << 17, 1 << 17, 1 << 19));
    assert_eq!((at(0x230), at(0x270)), (0, 1 << 19), "what is still posted counts");
    assert_eq!((at(0x300), at(0x310)), (0x4055, 0x0300_0000));
    assert_eq!((at(0x350), at(0x360), at(0x370)), (0x8700, 0x400, 0xfe));

    let mut other = Rig::new(2);
    other.msi(1 << 12, 0x99);
    other.apics[1].restore(&state, 0xfee0_0800).unwrap();
    assert_eq!(other.apics[1].save(), state);
    other.msi(7 << 12, 0xf4);
    assert_eq!(other.receivers(0xf4), [1], "its new address is known");
    assert_eq!(accept(&mut other.apics[1]), Some(0xf3));
}

#[test]
fn an_x2apic_state_is_in_kvms_layout() {
    let mut rig = Rig::x2apic(18);
    assert!(rig.apics[17].msr_write(0x830, 0x1234 << 32 | 0x40));
    let state = rig.apics[17].save();
    let at = |offset: usize| state.registers[offset >> 4];
    assert_eq!((at(0x20), at(0xd0)), (17 << 24, 1 << 16 | 1 << 1));
    assert_eq!((at(0x300), at(0x310)), (0x40, 0x1234));
    let mut other = Rig::new(18);
    let apic = &mut other.apics[17];
    apic.restore(&state, 0xfee0_0c00).unwrap();
    assert_eq!((apic.msr_read(0x802), apic.msr_read(0x80d)), (Some(17), Some(1 << 16 | 1 << 1)));
    assert_eq!(apic.msr_read(0x830), Some(0x1234 << 32 | 0x40));
    assert_eq!(apic.save(), state);
    // And back to another mode, which the guest itself could not go to.
    let old = Rig::new(18).apics[17].save();
    apic.restore(&old, 0xfee0_0800).unwrap();
    assert_eq!(apic.save(), old);
    let mut short = old.clone();
    short.registers.pop();
    assert!(apic.restore(&short, 0xfee0_0800).unwrap_err().to_string().contains("64 registers"));
    assert!(apic.restore(&old, 0xfee0_0400).is_err());
    assert_eq!(apic.save(), old);
}

/// Whatever is written, wherever and whenever: nothing panics, and a state that is saved is the state
/// that is restored.
#[test]
#[expect(clippy::cast_possible_truncation, reason = "any value will do")]
fn any_access_is_survived_and_saved() {
    let mut rig = Rig::new(3);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        // The upper half, which is the better one.
        (seed >> 32) % below
    };
    let mut compared = 0;
    for step in 0..200_000 {
        let n = random(3) as usize;
        let value = random(1 << 32) << random(32) & 0xffff_ffff;
        let registers = if random(8) == 0 { 256 } else { 64 };
        let offset = random(registers) as u32 * 16;
        let apic = &mut rig.apics[n];
        match random(12) {
            0 => _ = apic.read(offset),
            1..=3 if !apic.is_x2apic() => apic.write(offset, value as u32),
            1..=3 => _ = apic.msr_write(0x800 + offset / 16, value << random(33)),
            4 => _ = apic.msr_read(0x800 + offset / 16),
            5 => _ = apic.msr_write(0x6e0, value << random(33)),
            6 => apic.set_cr8(value),
            7 => _ = apic.take_posted(),
            8 => _ = accept(apic),
            9 => rig
                .chipset
                .send_msi(Msi { address: 0xfee0_0000 | value & 0xf_ffff, data: random(1 << 16) as u32 }),
            10 if random(50) == 0 => _ = apic.set_base(0xfee0_0000 | random(16) << 8),
            10 => apic.set_tsc(value as u32, value << 20),
            _ => rig.at(rig.clock.now().saturating_add(random(1 << 20) << random(32))),
        }
        if step % 100 == 0 {
            let apic = &mut rig.apics[n];
            apic.take_posted();
            apic.poll();
            if apic.timer.initial() != 0 && apic.timer.expiry().is_none() {
                // A timer that has stopped expires once more when it is restored: see `Timer::restore`.
                continue;
            }
            let (state, deadline, base) = (apic.save(), apic.tsc_deadline(), apic.base());
            let other = &mut Rig::new(3).apics[n];
            other.clock.set(apic.clock.now());
            other.restore(&state, base).unwrap();
            assert!(other.msr_write(0x6e0, deadline));
            assert_eq!(other.save(), state);
            compared += 1;
            assert_eq!((other.pending(), other.cr8()), (apic.pending(), apic.cr8()));
        }
    }
    assert!(compared > 500, "{compared} states were compared");
}
