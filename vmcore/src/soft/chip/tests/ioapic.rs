use crate::irq::Msi;
use crate::soft::chip::ioapic::Ioapic;

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;

/// An I/O APIC and what it has sent.
struct Rig {
    ioapic: Ioapic,
    sent: Vec<Msi>,
}

impl Rig {
    fn new() -> Self {
        Self { ioapic: Ioapic::new(), sent: Vec::new() }
    }

    fn write(&mut self, register: u32, value: u32) {
        self.ioapic.write(0, register, |_| panic!("selecting sends nothing"));
        self.ioapic.write(0x10, value, |msi| self.sent.push(msi));
    }

    fn read(&mut self, register: u32) -> u32 {
        self.ioapic.write(0, register, |_| panic!("selecting sends nothing"));
        assert_eq!(self.ioapic.read(0), register);
        self.ioapic.read(0x10)
    }

    fn line(&mut self, pin: usize, high: bool) {
        self.ioapic.set_line(pin, high, |msi| self.sent.push(msi));
    }

    fn end(&mut self, vector: u8) {
        self.ioapic.end_of_interrupt(vector, |msi| self.sent.push(msi));
    }

    /// Low bytes of the messages since the last call: their vectors.
    fn vectors(&mut self) -> Vec<u32> {
        self.sent.drain(..).map(|msi| msi.data & 0xff).collect()
    }
}

#[test]
fn it_is_an_82093aa_with_24_masked_pins() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(1), 0x0017_0011);
    rig.write(0, 0xffff_ffff);
    assert_eq!((rig.read(0), rig.read(2)), (0x0f00_0000, 0x0f00_0000));
    for pin in 0..24 {
        assert_eq!((rig.read(0x10 + 2 * pin), rig.read(0x11 + 2 * pin)), (MASKED, 0));
    }
    for nowhere in [3, 0xf, 0x40, 0xff] {
        rig.write(nowhere, 0x1234);
        assert_eq!(rig.read(nowhere), u32::MAX);
    }
    rig.write(0x3f, 0xff00_0000);
    assert_eq!(rig.read(0x3f), 0xff00_0000);
}

#[test]
fn an_entry_says_which_message_is_sent() {
    let mut rig = Rig::new();
    rig.write(0x10 + 2 * 23 + 1, 0xa5ff_ffff);
    rig.write(0x10 + 2 * 23, !(MASKED | 6 << 8));
    // Status and remote IRR are not the guest's to write, nor is what is reserved.
    assert_eq!((rig.read(0x3e), rig.read(0x3f)), (0xa9ff, 0xa500_0000));
    rig.line(23, true);
    // Logical destination 0xa5, lowest priority, level, asserted.
    assert_eq!(rig.sent, [Msi { address: 0xfeea_5004, data: 0xc1ff }]);

    let mut rig = Rig::new();
    rig.write(0x13, 7 << 24);
    rig.write(0x12, 0x31);
    rig.line(1, true);
    assert_eq!(rig.sent, [Msi { address: 0xfee0_7000, data: 0x31 }]);
}

#[test]
fn edges_are_sent_once_and_only_where_they_are_not_masked() {
    let mut rig = Rig::new();
    rig.write(0x14, 0x41);
    rig.line(2, true);
    rig.line(2, true);
    assert_eq!(rig.vectors(), [0x41]);
    rig.line(2, false);
    rig.end(0x41);
    assert!(rig.vectors().is_empty());
    rig.line(2, true);
    assert_eq!(rig.vectors(), [0x41]);
    rig.line(2, false);
    rig.write(0x14, 0x41 | MASKED);
    rig.line(2, true);
    rig.write(0x14, 0x41);
    assert!(rig.vectors().is_empty());
}

#[test]
fn a_level_is_sent_again_after_each_end_while_it_is_high() {
    let mut rig = Rig::new();
    rig.write(0x14, 0x41 | LEVEL);
    rig.line(2, true);
    rig.line(2, true);
    assert_eq!(rig.vectors(), [0x41]);
    assert_eq!(rig.read(0x14), 0x41 | LEVEL | REMOTE_IRR);
    // Another vector's end is nothing to it, nor does lowering the line end it.
    rig.end(0x42);
    rig.line(2, false);
    rig.line(2, true);
    assert!(rig.vectors().is_empty());
    rig.end(0x41);
    assert_eq!(rig.vectors(), [0x41]);
    rig.line(2, false);
    rig.end(0x41);
    assert_eq!((rig.vectors(), rig.read(0x14)), (vec![], 0x41 | LEVEL));
}

#[test]
fn a_level_that_is_masked_is_sent_when_it_is_unmasked() {
    let mut rig = Rig::new();
    rig.write(0x14, 0x41 | LEVEL | MASKED);
    rig.line(2, true);
    assert!(rig.vectors().is_empty());
    rig.write(0x14, 0x41 | LEVEL);
    assert_eq!(rig.vectors(), [0x41]);
    // Masked while in service: the end sends nothing until it is unmasked again.
    rig.write(0x14, 0x41 | LEVEL | MASKED);
    rig.end(0x41);
    assert!(rig.vectors().is_empty());
    rig.write(0x14, 0x41 | LEVEL);
    assert_eq!(rig.vectors(), [0x41]);
}

#[test]
fn shared_vectors_end_together() {
    let mut rig = Rig::new();
    for pin in [2, 3] {
        rig.write(0x10 + 2 * pin, 0x41 | LEVEL);
    }
    rig.line(2, true);
    rig.line(3, true);
    rig.vectors();
    rig.line(2, false);
    rig.end(0x41);
    assert_eq!(rig.vectors(), [0x41]);
    assert_eq!((rig.read(0x14), rig.read(0x16)), (0x41 | LEVEL, 0x41 | LEVEL | REMOTE_IRR));
}

#[test]
fn remote_irr_is_cleared_by_making_the_pin_an_edge() {
    let mut rig = Rig::new();
    rig.write(0x14, 0x41 | LEVEL);
    rig.line(2, true);
    rig.line(2, false);
    rig.write(0x14, 0x41 | MASKED);
    rig.write(0x14, 0x41 | LEVEL);
    assert_eq!((rig.read(0x14), rig.vectors()), (0x41 | LEVEL, vec![0x41]));
}

#[test]
fn external_interrupts_are_left_to_the_pics() {
    let mut rig = Rig::new();
    rig.write(0x10, 0x700);
    rig.line(0, true);
    assert!(rig.sent.is_empty());
}

#[test]
fn a_restored_ioapic_goes_on() {
    let mut rig = Rig::new();
    rig.write(0x14, 0x41 | LEVEL);
    rig.write(0x16, 0x42);
    rig.line(2, true);
    rig.line(3, true);
    rig.vectors();
    let state = rig.ioapic.save();
    // What has been sent is the local APIC's to remember.
    assert_eq!(state.irr, 1 << 2);
    let mut new = Rig::new();
    new.ioapic.restore(&state, |msi| new.sent.push(msi)).unwrap();
    assert!(new.vectors().is_empty());
    new.end(0x41);
    assert_eq!(new.vectors(), [0x41]);
}
