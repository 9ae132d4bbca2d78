use super::Rig;
use crate::soft::link::attention;

/// Both initialised as Linux does it: vectors 0x30 and 0x38, nothing masked.
fn ready() -> Rig {
    let rig = Rig::new();
    rig.out(&[(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0)]);
    rig.out(&[(0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, 1), (0xa1, 0)]);
    rig
}

/// IRR and ISR of the chip at `port`.
fn registers(rig: &Rig, port: u16) -> (u8, u8) {
    rig.out(&[(port, 0x0a)]);
    let irr = rig.read(port);
    rig.out(&[(port, 0x0b)]);
    (irr, rig.read(port))
}

#[test]
fn an_edge_is_kept_until_it_is_acknowledged_and_comes_once() {
    let rig = ready();
    rig.pulse(5);
    assert!(rig.asked(attention::INTERRUPT));
    assert_eq!(registers(&rig, 0x20), (0x20, 0));
    assert_eq!(rig.chips.acknowledge(), Some(0x35));
    assert_eq!(registers(&rig, 0x20), (0, 0x20));
    assert_eq!(rig.chips.acknowledge(), None);
    // While it is in service another waits for the EOI, and the line that stays high is no edge.
    rig.set_irq(5, true);
    assert!(!rig.chips.pic_output() && !rig.asked(attention::INTERRUPT));
    rig.out(&[(0x20, 0x20)]);
    assert!(rig.asked(attention::INTERRUPT));
    assert_eq!(rig.chips.acknowledge(), Some(0x35));
    rig.set_irq(5, true);
    rig.out(&[(0x20, 0x20)]);
    assert!(!rig.chips.pic_output());
}

#[test]
fn priorities_nest() {
    let rig = ready();
    rig.pulse(4);
    assert_eq!(rig.chips.acknowledge(), Some(0x34));
    rig.pulse(6);
    assert_eq!(rig.chips.acknowledge(), None);
    rig.pulse(1);
    assert_eq!(rig.chips.acknowledge(), Some(0x31));
    // Non-specific: the highest in service.
    rig.out(&[(0x20, 0x20)]);
    assert_eq!(registers(&rig, 0x20), (0x40, 0x10));
    // Specific: the one named, which is not in service; nothing happens.
    rig.out(&[(0x20, 0x63)]);
    assert_eq!(rig.chips.acknowledge(), None);
    rig.out(&[(0x20, 0x64)]);
    assert_eq!(rig.chips.acknowledge(), Some(0x36));
}

#[test]
fn the_slave_interrupts_through_input_2() {
    let rig = ready();
    rig.pulse(9);
    rig.pulse(12);
    assert_eq!(rig.chips.acknowledge(), Some(0x39));
    assert_eq!((registers(&rig, 0x20), registers(&rig, 0xa0)), ((0, 4), (0x10, 2)));
    // Either order of the EOIs ends with the other one.
    rig.out(&[(0x20, 0x62)]);
    assert_eq!(rig.chips.acknowledge(), None);
    rig.out(&[(0xa0, 0x20)]);
    assert_eq!(rig.chips.acknowledge(), Some(0x3c));
    rig.pulse(14);
    rig.out(&[(0xa0, 0x20)]);
    assert_eq!(rig.chips.acknowledge(), None);
    rig.out(&[(0x20, 0x20)]);
    assert_eq!(rig.chips.acknowledge(), Some(0x3e));
    // A wire to input 2 does not exist.
    rig.set_irq(2, true);
    assert_eq!(registers(&rig, 0x20).0, 0);
}

#[test]
fn a_request_that_is_masked_leaves_no_spurious_interrupt() {
    let rig = ready();
    rig.pulse(9);
    rig.out(&[(0xa1, 0xff)]);
    assert!(!rig.chips.pic_output());
    assert_eq!(rig.chips.acknowledge(), None);
    assert_eq!(registers(&rig, 0x20), (0, 0));
    rig.out(&[(0xa1, 0xfd)]);
    assert_eq!(rig.chips.acknowledge(), Some(0x39));
}

#[test]
fn level_triggered_lines_interrupt_as_long_as_they_are_high() {
    let rig = ready();
    rig.out(&[(0x4d0, 0xff), (0x4d1, 0xff)]);
    assert_eq!((rig.read(0x4d0), rig.read(0x4d1)), (0xf8, 0xde));
    rig.set_irq(11, true);
    for _ in 0..3 {
        assert_eq!(rig.chips.acknowledge(), Some(0x3b));
        assert_eq!(rig.chips.acknowledge(), None);
        rig.out(&[(0xa0, 0x20), (0x20, 0x20)]);
    }
    assert!(rig.chips.pic_output());
    rig.set_irq(11, false);
    assert!(!rig.chips.pic_output());
}

#[test]
fn what_becomes_level_triggered_follows_its_line() {
    let rig = ready();
    rig.pulse(5);
    rig.set_irq(6, true);
    rig.out(&[(0x4d0, 0x60)]);
    assert_eq!(registers(&rig, 0x20).0, 0x40);
}

#[test]
fn priorities_rotate() {
    let rig = ready();
    // Lowest priority to 4: 5 is the highest.
    rig.out(&[(0x20, 0xc4)]);
    rig.pulse(0);
    rig.pulse(5);
    assert_eq!(rig.chips.acknowledge(), Some(0x35));
    // Rotate on non-specific EOI: 5 is now the lowest.
    rig.pulse(5);
    rig.out(&[(0x20, 0xa0)]);
    assert_eq!(rig.chips.acknowledge(), Some(0x30));
    // Rotate on specific EOI.
    rig.pulse(1);
    rig.out(&[(0x20, 0xe0)]);
    assert_eq!(rig.chips.acknowledge(), Some(0x31));
    assert_eq!(rig.chips.save().pics[0].priority_add, 1);
}

#[test]
fn automatic_end_of_interrupt_and_its_rotation() {
    let rig = ready();
    rig.out(&[(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x20, 0x80)]);
    rig.pulse(3);
    rig.pulse(6);
    assert_eq!(rig.chips.acknowledge(), Some(0x33));
    assert!(rig.asked(attention::INTERRUPT), "the next one rises anew");
    assert_eq!(registers(&rig, 0x20), (0x40, 0));
    assert_eq!(rig.chips.save().pics[0].priority_add, 4);
    assert_eq!(rig.chips.acknowledge(), Some(0x36));
}

#[test]
fn special_mask_mode_lets_lower_priorities_through() {
    let rig = ready();
    rig.pulse(1);
    assert_eq!(rig.chips.acknowledge(), Some(0x31));
    rig.pulse(6);
    rig.out(&[(0x20, 0x68), (0x21, 2)]);
    assert_eq!(rig.chips.acknowledge(), Some(0x36));
    // Non-specific EOI leaves what is masked.
    rig.out(&[(0x20, 0x20), (0x20, 0x20)]);
    assert_eq!(registers(&rig, 0x20).1, 2);
    rig.out(&[(0x20, 0x48)]);
    rig.pulse(7);
    assert_eq!(rig.chips.acknowledge(), None);
}

#[test]
fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
    let rig = ready();
    rig.out(&[(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 0x11)]);
    rig.pulse(12);
    assert_eq!(rig.chips.acknowledge(), Some(0x3c));
    rig.pulse(9);
    assert_eq!(rig.chips.acknowledge(), Some(0x39));
    rig.pulse(13);
    assert_eq!(rig.chips.acknowledge(), None);
}

#[test]
fn polling_acknowledges() {
    let rig = ready();
    rig.pulse(5);
    rig.pulse(9);
    rig.out(&[(0x20, 0x0c)]);
    assert_eq!(rig.read(0x20), 0x82);
    rig.out(&[(0xa0, 0x0c)]);
    assert_eq!(rig.read(0xa0), 0x81);
    assert_eq!(registers(&rig, 0xa0), (0, 2));
    rig.out(&[(0xa0, 0x20), (0x20, 0x20), (0x20, 0x0c)]);
    assert_eq!(rig.read(0x21), 0x85);
    // Once only, and nothing more to find.
    assert_eq!(rig.read(0x21), 0);
    rig.out(&[(0x20, 0x0c)]);
    assert_eq!(rig.read(0x20), 0);
}

#[test]
fn initialisation_begins_anew() {
    let rig = ready();
    rig.set_irq(5, true);
    rig.pulse(3);
    assert_eq!(rig.chips.acknowledge(), Some(0x33));
    rig.out(&[(0x21, 0xaa), (0x20, 0x10)]);
    // Without ICW4; the line that was high is not an edge.
    assert_eq!((registers(&rig, 0x20), rig.read(0x21)), ((0, 0), 0));
    rig.out(&[(0x21, 0x4b), (0x21, 4), (0x21, 0xf0)]);
    assert_eq!(rig.read(0x21), 0xf0);
    rig.pulse(1);
    assert_eq!(rig.chips.acknowledge(), Some(0x49));
}
