//! The local APIC, through its registers.

use super::*;
use crate::irq::Msi;

mod command;
mod timing;

/// A machine of local APICs whose clock the test moves.
struct Rig {
    clock: Arc<Clock>,
    chipset: Arc<Chipset>,
    apics: Vec<Lapic>,
}

impl Rig {
    fn new(count: u32) -> Self {
        let clock = Arc::new(Clock::manual());
        let chipset = Arc::new(Chipset::new(clock.clone()));
        let apics = (0..count)
            .map(|id| {
                let link = Link::new(id);
                chipset.add_vcpu(link.clone());
                let mut apic = Lapic::new(link, chipset.clone(), clock.clone());
                apic.write(0xf0, 0x1ff);
                apic
            })
            .collect();
        Self { clock, chipset, apics }
    }

    fn x2apic(count: u32) -> Self {
        let mut rig = Self::new(count);
        for apic in &mut rig.apics {
            assert!(apic.set_base(apic.base() | base::X2APIC));
        }
        rig
    }

    /// Lets time pass until `ns`.
    fn at(&mut self, ns: u64) {
        self.clock.set(ns);
        self.apics.iter_mut().for_each(Lapic::poll);
    }

    fn msi(&self, address: u64, data: u32) {
        self.chipset.send_msi(Msi { address: 0xfee0_0000 | address, data });
    }

    /// Who has interrupt `vector` pending, by having asked for attention too; takes it.
    fn receivers(&mut self, vector: u8) -> Vec<u32> {
        let mut found = Vec::new();
        for apic in &mut self.apics {
            if apic.link.take(attention::INTERRUPT | attention::EVENT) == 0 {
                continue;
            }
            apic.take_posted();
            if apic.pending() == Some(vector) {
                found.push(apic.link.id);
                apic.accept(vector);
                apic.end_of_interrupt();
            }
        }
        found
    }

    fn signals(&mut self) -> Vec<Signals> {
        self.apics.iter_mut().map(Lapic::take_posted).collect()
    }
}

/// One APIC and its vector, if any, accepted.
fn accept(apic: &mut Lapic) -> Option<u8> {
    let vector = apic.pending()?;
    apic.accept(vector);
    Some(vector)
}

#[test]
fn registers_have_their_reset_values() {
    let make = |id| {
        let clock = Arc::new(Clock::manual());
        Lapic::new(Link::new(id), Arc::new(Chipset::new(clock.clone())), clock)
    };
    let mut apic = make(3);
    assert_eq!(apic.base(), 0xfee0_0800);
    assert_eq!(apic.read(0x20), 3 << 24);
    assert_eq!(apic.read(0x30), 0x5_0014);
    assert_eq!(apic.read(0xe0), u32::MAX);
    assert_eq!(apic.read(0xf0), 0xff);
    for lvt in (0x320..=0x370).step_by(16) {
        assert_eq!(apic.read(lvt), 0x1_0000);
    }
    for zero in [0x80, 0xa0, 0xd0, 0x100, 0x180, 0x200, 0x280, 0x300, 0x310, 0x380, 0x390, 0x3e0] {
        assert_eq!(apic.read(zero), 0, "{zero:#x}");
    }
    assert!(!apic.accepts_pic());
    let first = make(0);
    assert_eq!(first.base(), 0xfee0_0900);
    assert!(first.accepts_pic());
}

#[test]
fn writable_bits_only_are_written() {
    let mut rig = Rig::new(1);
    let apic = &mut rig.apics[0];
    for (offset, expected) in [
        (0x80, 0xff),
        (0xd0, 0xff00_0000),
        (0xe0, u32::MAX),
        (0x310, 0xff00_0000),
        (0x320, 0x7_00ff),
        (0x330, 0x1_07ff),
        (0x340, 0x1_07ff),
        (0x350, 0x1_a7ff),
        (0x360, 0x1_a7ff),
        (0x370, 0x1_00ff),
        (0x3e0, 0xb),
        (0xf0, 0x3ff),
    ] {
        apic.write(offset, u32::MAX);
        assert_eq!(apic.read(offset), expected, "{offset:#x}");
    }
    for offset in [0x30, 0xa0, 0x100, 0x180, 0x200, 0x390] {
        let before = apic.read(offset);
        apic.write(offset, 0x5555_5555);
        assert_eq!(apic.read(offset), before, "{offset:#x}");
    }
}

#[test]
fn priorities_decide_what_interrupts() {
    let mut rig = Rig::new(1);
    for vector in [0x41, 0x52, 0x5f, 0x31] {
        rig.msi(0, vector);
    }
    let apic = &mut rig.apics[0];
    assert_eq!(apic.link.take(attention::INTERRUPT), attention::INTERRUPT);
    apic.take_posted();
    assert_eq!(accept(apic), Some(0x5f));
    assert_eq!((apic.read(0x120), apic.read(0x220)), (1 << 31, 1 << 18 | 1 << 1));
    assert_eq!(apic.read(0xa0), 0x50);
    // The same class does not interrupt itself.
    assert_eq!(apic.pending(), None);
    apic.write(0xb0, 0);
    assert_eq!(accept(apic), Some(0x52));
    apic.write(0xb0, 0);
    apic.set_cr8(4);
    assert_eq!((apic.cr8(), apic.read(0x80), apic.read(0xa0)), (4, 0x40, 0x40));
    assert_eq!(apic.pending(), None);
    apic.link.take(u32::MAX);
    apic.write(0x80, 0x3f);
    assert_eq!(apic.link.take(u32::MAX), attention::EVENT, "lowering the priority lets 0x41 through");
    assert_eq!(accept(apic), Some(0x41));
    apic.write(0xb0, 0);
    assert_eq!(apic.pending(), None);
    apic.set_cr8(0);
    assert_eq!(accept(apic), Some(0x31));
}

#[test]
fn messages_find_physical_and_logical_destinations() {
    let mut rig = Rig::new(4);
    rig.msi(2 << 12, 0x40);
    assert_eq!(rig.receivers(0x40), [2]);
    rig.msi(0xff << 12, 0x40);
    assert_eq!(rig.receivers(0x40), [0, 1, 2, 3]);
    rig.msi(9 << 12, 0x40);
    assert!(rig.receivers(0x40).is_empty());
    // Flat: a bit for each.
    for n in 0..4 {
        rig.apics[n].write(0xd0, 1 << (24 + n));
    }
    rig.msi(0b1010 << 12 | 4, 0x41);
    assert_eq!(rig.receivers(0x41), [1, 3]);
    // Clusters of two.
    for (apic, logical) in rig.apics.iter_mut().zip([0x01, 0x02, 0x11, 0x12]) {
        apic.write(0xe0, 0);
        apic.write(0xd0, logical << 24);
    }
    rig.msi(0x13 << 12 | 4, 0x42);
    assert_eq!(rig.receivers(0x42), [2, 3]);
    rig.msi(0xf2 << 12 | 4, 0x42);
    assert_eq!(rig.receivers(0x42), [1, 3]);
    // Other addresses are no messages.
    rig.chipset.send_msi(Msi { address: 0xfed0_0000, data: 0x42 });
    rig.chipset.send_msi(Msi { address: 0x1_fee0_0000, data: 0x42 });
    assert!(rig.receivers(0x42).is_empty());
}

#[test]
fn logical_x2apic_destinations_are_clusters_of_16() {
    let mut rig = Rig::x2apic(20);
    let apic = &mut rig.apics[19];
    assert_eq!(apic.msr_read(0x802), Some(19));
    assert_eq!(apic.msr_read(0x80d), Some(1 << 16 | 1 << 3));
    assert!(rig.apics[0].msr_write(0x830, (1 << 16 | 0b1001) << 32 | 1 << 11 | 0x40));
    assert_eq!(rig.receivers(0x40), [16, 19]);
    assert!(rig.apics[0].msr_write(0x830, 18 << 32 | 0x40));
    assert_eq!(rig.receivers(0x40), [18]);
    assert!(rig.apics[0].msr_write(0x830, 0xffff_ffff << 32 | 0x40));
    assert_eq!(rig.receivers(0x40).len(), 20);
    // A message's logical destination is in cluster 0.
    rig.msi(0b110 << 12 | 4, 0x41);
    assert_eq!(rig.receivers(0x41), [1, 2]);
}

#[test]
fn lowest_priority_goes_to_one_that_is_least_busy() {
    let mut rig = Rig::new(4);
    for n in 0..4 {
        rig.apics[n].write(0xd0, 1 << (24 + n));
        rig.apics[n].write(0x80, if n == 2 { 0x10 } else { 0x20 });
    }
    rig.msi(0xf << 12 | 4, 0x151);
    assert_eq!(rig.receivers(0x51), [2]);
    // The redirection hint says the same.
    rig.msi(0xf << 12 | 4 | 8, 0x51);
    assert_eq!(rig.receivers(0x51), [2]);
    rig.apics[2].write(0xf0, 0xff);
    rig.msi(0xf << 12 | 4, 0x151);
    let first = rig.receivers(0x51);
    assert_eq!(first.len(), 1);
    assert_ne!(first, [2], "it is disabled");
    rig.msi(0xf << 12 | 4, 0x151);
    assert_eq!(rig.receivers(0x51), first, "a vector stays where it is");
    rig.msi(0x1 << 12 | 4, 0x152);
    assert_eq!(rig.receivers(0x52), [0]);
}
