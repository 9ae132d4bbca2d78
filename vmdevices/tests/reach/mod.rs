//! What the seeds of real traffic have to reach in a fuzz target: a seed that does nothing would pass unseen.

use std::collections::{BTreeMap, BTreeSet};

use super::fuzz::{self, End};

/// A device's target: itself, the queues of which every chain is answered at once, and those on which some
/// seed or other has to have an answer.
type Device = (&'static str, fn(&[u8]) -> End, &'static [usize], &'static [usize]);

const DEVICES: [Device; 7] = [
    // Without hinting, reports are on queue 3.
    ("virtio_balloon", fuzz::balloon, &[0, 1, 3], &[0, 1, 2, 3]),
    (DISK, fuzz::block, &[0], &[0]),
    ("virtio_console", fuzz::console, &[1], &[0, 1]),
    // Queue 2 is for commands where there are no several pairs.
    ("virtio_net", fuzz::net, &[1, 3, 4], &[0, 1, 2, 3, 4]),
    // The terminal of the first port has no input.
    ("virtio_ports", fuzz::ports, &[1, 3, 5], &[1, 2, 3, 4, 5]),
    ("virtio_rng", fuzz::rng, &[0], &[0]),
    // Linux waits for an event that does not come.
    (SOCKETS, fuzz::vsock, &[1], &[0, 1]),
];

/// The targets whose requests and streams are looked at too.
const DISK: &str = "virtio_block";
const SOCKETS: &str = "virtio_vsock";

/// Every target that has seeds of real traffic, and what they are to reach together.
pub fn targets() -> BTreeMap<&'static str, BTreeSet<String>> {
    let queue = |number: &usize| format!("queue {number}");
    let mut targets: BTreeMap<_, BTreeSet<_>> =
        DEVICES.iter().map(|device| (device.0, device.3.iter().map(queue).collect())).collect();
    let others: [(_, &[_]); 5] = [
        (DISK, &["reads", "writes", "flushes", "discards and zeroes"]),
        (SOCKETS, &["bytes for the host", "bytes for the guest"]),
        ("virtio_net_commands", &["commands"]),
        ("pci", &["messages"]),
        ("nat", &["connections", "answers", "data"]),
    ];
    for (name, reached) in others {
        targets.entry(name).or_default().extend(reached.iter().map(ToString::to_string));
    }
    targets
}

/// Runs `input` through `target`, which it must keep happy; gives what it reaches.
pub fn reached(target: &str, input: &[u8]) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut counted = |name: &str, count: u64| {
        if count > 0 {
            reached.insert(name.to_owned());
        }
    };
    match target {
        "virtio_net_commands" => {
            let done = fuzz::net_commands(input);
            assert_eq!(done, commands(input), "commands");
            counted("commands", done.into());
        }
        "pci" => counted("messages", fuzz::pci(input) as u64),
        "nat" => {
            let end = fuzz::nat::nat(input);
            assert_eq!(end.stats.malformed, 0, "{end:?}");
            counted("connections", end.stats.tcp_opened);
            counted("answers", end.stats.frames_received);
            counted("data", end.read);
        }
        _ => {
            let device = DEVICES.iter().find(|device| device.0 == target);
            let (_, drive, prompt, _) = device.unwrap_or_else(|| panic!("no target {target}"));
            let end = drive(input);
            assert_eq!(end.status, 15, "{end:?}");
            for &queue in *prompt {
                assert_eq!(end.used[queue], end.offered[queue], "queue {queue}: {end:?}");
            }
            for (queue, &used) in end.used.iter().enumerate() {
                counted(&format!("queue {queue}"), used.into());
            }
            if target == DISK {
                let done = fuzz::requests(input);
                assert_eq!(done.errors, 0, "{done:?}");
                counted("reads", done.reads);
                counted("writes", done.writes);
                counted("flushes", done.flushes);
                counted("discards and zeroes", done.cleared);
            }
            if target == SOCKETS {
                counted("bytes for the host", fuzz::sockets(input).1 as u64);
                // Besides a request, and the answers to what the guest sent.
                counted("bytes for the guest", end.used[0].saturating_sub(end.used[1] + 2).into());
            }
        }
    }
    reached
}

/// How many commands an input of [`fuzz::net_commands`] has.
fn commands(mut input: &[u8]) -> u32 {
    let mut count = 0;
    while let Some((&[what, low, high], rest)) = input.split_first_chunk() {
        input = &rest[usize::from(u16::from_le_bytes([low, high])).min(rest.len())..];
        count += u32::from(what % 8 < 3);
    }
    count
}
