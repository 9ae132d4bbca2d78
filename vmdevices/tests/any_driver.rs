//! The fuzz targets' drivers on a few fixed inputs: they build, they reach the devices, and what
//! fuzzing once found stays found.
#![expect(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::panic,
    reason = "tests, and a fuzz crate of its own workspace"
)]

#[path = "../fuzz/src/lib.rs"]
mod fuzz;
mod reach;

use std::collections::BTreeSet;
use std::path::Path;

use fuzz::{BARE, CHAIN, End, INDIRECT, LAYOUT, MASK, MOST_QUEUES, NOTIFY, STEP, WRITABLE};

type Device = fn(&[u8]) -> End;
type Target = Box<dyn Fn(&[u8])>;

/// How many queues each has, and what it is.
const DEVICES: [(usize, &str, Device); 7] = [
    (6, "ports", fuzz::ports),
    (5, "balloon", fuzz::balloon),
    (1, "block", fuzz::block),
    (5, "net", fuzz::net),
    (1, "rng", fuzz::rng),
    (2, "console", fuzz::console),
    (3, "vsock", fuzz::vsock),
];

/// DRIVER_OK and all before it, and DEVICE_NEEDS_RESET.
const READY: u32 = 15;
const NEEDS_RESET: u32 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// An input without masked features and with descriptors (address, length, flags, next) in the
/// table of its first queue.
fn input(queues: usize, table: &[(u64, u32, u16, u16)]) -> Vec<u8> {
    let mut input = vec![0; MASK + queues * LAYOUT];
    for ((at, len, flags, next), place) in table.iter().zip(input[MASK..].chunks_exact_mut(16)) {
        let fields = [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        place.copy_from_slice(&fields.concat());
    }
    input
}

/// Makes chain 0 of queue 0 available.
const OFFER: [u8; STEP] = [3, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn well_formed_requests_are_served() {
    // A disk's header is all zero behind the layout: a read of sector 0, with the status behind it.
    let request = [(0x8000, 16, NEXT, 1), (0x9000, 512, NEXT | WRITE, 2), (0x9200, 1, WRITE, 0)];
    let buffer = [(0x9000, 64, WRITE, 0)];
    for (queues, device, table) in [
        (1, fuzz::block as Device, &request[..]),
        (1, fuzz::rng, &buffer),
        // Where somebody has typed.
        (2, fuzz::console, &buffer),
    ] {
        let mut input = input(queues, table);
        input.extend(OFFER.repeat(3));
        let end = device(&input);
        assert_eq!((end.status, end.used[0]), (READY, 3), "{table:x?}");
    }
    // A packet goes out on queue 1, whose table lies behind that of queue 0, and comes back.
    let mut input = input(5, &buffer);
    let table = MASK + LAYOUT;
    input[table..table + 16].copy_from_slice(&self::input(1, &[(0x8000, 60, 0, 0)])[MASK..MASK + 16]);
    input.extend([OFFER, [3, 1, 0, 0, 0, 0, 0, 0], [6; STEP]].concat());
    // Without large packets to wait for buffers for.
    input[..2].copy_from_slice(&[0x80, 0x7f]);
    let end = fuzz::net(&input);
    assert_eq!((end.status, end.used), (READY, [1, 1, 0, 0, 0, 0]));
}

/// What real traffic is written down in.
#[test]
fn chains_of_given_pieces_are_served_as_long_as_there_is_room() {
    let mut input = BARE.to_le_bytes().to_vec();
    let [low, high] = WRITABLE.to_le_bytes();
    // A read of sector 1, of whose header the first byte of the sector number is the last that is not zero.
    let pieces = [16, 0, 9, 0, 0, 2, low, high, 1, 0, low, high];
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 1];
    for how in [NOTIFY, NOTIFY | INDIRECT, INDIRECT, INDIRECT] {
        input.extend([&[CHAIN, 0, how, 3][..], &pieces, &header].concat());
    }
    // Two wait, which leaves six descriptors: one chain of three more, another, and none.
    let waiting = [&[CHAIN, 0, 0, 3][..], &pieces, &header].concat();
    let mut more = input.clone();
    more.extend(waiting.repeat(3));
    let end = |used, offered| {
        let queue = |count| [count, 0, 0, 0, 0, 0];
        End { status: READY, offered: queue(offered), used: queue(used) }
    };
    assert_eq!(fuzz::block(&input), end(2, 4));
    assert_eq!(fuzz::block(&more), end(2, 6));
    // Once they are answered there is room again.
    more.extend([[1, 0, 0, 0, 0, 0, 0, 0].to_vec(), waiting].concat());
    assert_eq!(fuzz::block(&more), end(6, 7));
}

#[test]
fn commands_are_answered() {
    let step = |what: u8, data: &[u8]| [&[what, data.len() as u8, 0], data].concat();
    let steps = [
        step(0, &[0, 0, 0]),
        step(1, &[4, 0, 2, 0]),
        step(2, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        // Refused: three pairs of two, a table of 4 GiB.
        step(0, &[4, 0, 3, 0]),
        step(0, &[1, 0, 0xff, 0xff, 0xff, 0xff]),
        // Packets of any header, buffers, moves.
        step(3, &[0xff; 100]),
        step(5, &[]).repeat(20),
        step(7, &[]),
        step(0, &[2, 0, 5, 0]),
    ];
    assert_eq!(fuzz::net_commands(&steps.concat()), 4);
}

#[test]
fn loops_are_found() {
    for (queues, name, device) in DEVICES {
        let mut input = input(queues, &[(0x8000, 16, NEXT | WRITE, 0)]);
        // Without several ports: their input waits until they are open.
        input[0] = 2;
        input.extend([OFFER, [6; STEP]].concat());
        let end = device(&input);
        assert_eq!((end.status, end.used), (READY | NEEDS_RESET, [0; MOST_QUEUES]), "{name}");
    }
}

/// Each restore once put the unread input in front of what the console had: twice as much each time.
#[test]
fn restoring_again_and_again_does_not_multiply_the_input() {
    let mut input = input(2, &[]);
    input.extend([7; 100 * STEP]);
    assert_eq!(fuzz::console(&input).status, READY);
}

/// The fuzzed bus does what it is to do.
#[test]
fn a_function_on_pci_sends_messages_wherever_its_bar_is() {
    let config = |slot: u8, offset: u8, value: u32| {
        let [a, b, c, d] = value.to_le_bytes();
        [0, slot | 2 << 2, offset, 0, a, b, c, d]
    };
    let msix = 0x40 + 3 * 16 + 20 + 20;
    let mut input = Vec::new();
    for (slot, bar) in [(1, 0xc700_0000), (2, 0xd000_0000)] {
        input.extend([config(slot, 0x10, bar), config(slot, 4, 6), config(slot, msix, 0x8001_0011)].concat());
        // Vector 1 is masked no more; the device is used.
        input.extend([5, slot | 2 << 2, 0x1c, 0x40, 0, 0, 0, 0, 8, slot, 0, 0, 0, 0, 0, 0]);
    }
    // The second one finds the first one's request too, as both have the same rings.
    assert_eq!(fuzz::pci(&input), 1 + 2);
    // Over memory it is silent.
    assert_eq!(fuzz::pci(&[&config(1, 0x10, 0xc800_0000)[..], &input[STEP..input.len() / 2]].concat()), 0);
}

/// What fuzzing with these began with, and what it found on the way there.
#[test]
fn the_seeds_of_the_fuzz_targets_do_no_harm() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let devices = DEVICES.map(|(_, name, device)| (format!("virtio_{name}"), device));
    let mut targets: Vec<(String, Target)> = vec![
        ("virtio_net_commands".into(), Box::new(|input| _ = fuzz::net_commands(input))),
        ("pci".into(), Box::new(|input| _ = fuzz::pci(input))),
        ("nat".into(), Box::new(|input| _ = fuzz::nat::nat(input))),
    ];
    targets.extend(devices.map(|(name, device)| {
        let target: Target = Box::new(move |input| _ = device(input));
        (name, target)
    }));
    for (name, target) in targets {
        let seeds = std::fs::read_dir(corpus.join(&name)).expect(&name).collect::<Vec<_>>();
        assert!(!seeds.is_empty(), "{name}");
        for seed in seeds {
            target(&std::fs::read(seed.expect("a seed").path()).expect("a seed"));
        }
    }
}

/// A seed that does nothing would pass unseen.
#[test]
fn the_seeds_of_real_traffic_reach_what_they_are_made_for() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (target, wanted) in reach::targets() {
        let mut reached = BTreeSet::new();
        for seed in std::fs::read_dir(corpus.join(target)).expect(target) {
            let path = seed.expect("a seed").path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("linux-")) {
                let of_seed = reach::reached(target, &std::fs::read(&path).expect("a seed"));
                assert!(!of_seed.is_empty(), "{} reaches nothing", path.display());
                reached.extend(of_seed);
            }
        }
        assert!(reached.is_superset(&wanted), "{target}: {reached:?}, not all of {wanted:?}");
    }
}

#[test]
fn arbitrary_drivers_do_no_harm() {
    // Weyl's sequence through a mixer (splitmix64): the same on every run.
    let mut state = 0_u64;
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    for round in 0..200 {
        let len = word() as usize % 4096;
        let mut input = (0..len).flat_map(|_| word().to_le_bytes()).take(len).collect::<Vec<_>>();
        if round % 2 == 0 {
            // Tables of descriptors that lie in memory, most of them.
            for entry in input.get_mut(MASK..).unwrap_or_default().chunks_exact_mut(16).take(8) {
                entry[2..8].fill(0);
                entry[10..12].fill(0);
                entry[13] = 0;
                entry[14] %= 9;
                entry[15] = 0;
            }
        }
        for (_, _, device) in DEVICES {
            device(&input);
        }
        fuzz::net_commands(&input);
        fuzz::pci(&input);
        fuzz::nat::nat(&input);
    }
}
