//! Chains as a driver offers them that keeps the rules, of whatever pieces: how real traffic is written down.

use vmcore::{GuestAddress, GuestMemory};
use vmdevices::virtio::VirtioMmio;

use super::{AVAILABLE, HALF, PAGE, QUEUES, ROM, SIZE, USED, publish, write};

/// A step that offers a chain: this, the queue, [`INDIRECT`] and [`NOTIFY`], and how many pieces the chain
/// has. Behind it are, for each piece, its length and how many bytes of it are given (16 bits each), and then
/// those bytes. What is not given is zero.
pub const CHAIN: u8 = 0xf8;
/// The descriptors are in a table of their own.
pub const INDIRECT: u8 = 1;
/// The device is notified of it.
pub const NOTIFY: u8 = 2;
/// Bytes of a piece, before the content of all of them.
const PIECE: usize = 4;
/// In place of the number of bytes given: the piece is the device's to write.
pub const WRITABLE: u16 = 1 << 15;

/// Where pieces and tables lie, one behind the other and over and over, across the seam of the two regions.
const PIECES: std::ops::Range<u64> = HALF - PAGE..ROM;

/// The chains of a driver that gives no descriptor away twice.
pub struct Chains {
    memory: GuestMemory,
    queues: Vec<Ring>,
    next: u64,
}

#[derive(Clone)]
struct Ring {
    /// A bit for each descriptor that is the driver's.
    free: u8,
    /// Which descriptors each head stands for.
    taken: [u8; SIZE as usize],
    /// How far the driver has seen the used ring.
    seen: u16,
}

impl Chains {
    pub fn new(memory: GuestMemory, queues: usize) -> Self {
        let ring = Ring { free: u8::MAX, taken: [0; SIZE as usize], seen: 0 };
        Self { memory, queues: vec![ring; queues], next: PIECES.start }
    }

    /// Does one step, unless its queue has too few free descriptors; gives what follows it.
    pub fn offer<'a>(&mut self, device: &mut VirtioMmio, step: [u8; 3], rest: &'a [u8]) -> &'a [u8] {
        let [queue, how, count] = step;
        let (pieces, mut rest) = rest.split_at((PIECE * usize::from(count)).min(rest.len()));
        let mut descriptors = Vec::new();
        for piece in pieces.chunks_exact(PIECE) {
            let len = u16::from_le_bytes([piece[0], piece[1]]).min((PIECES.end - PIECES.start) as u16);
            let given = u16::from_le_bytes([piece[2], piece[3]]);
            let at = self.place(len.into());
            if given & WRITABLE == 0 {
                let (content, behind) = rest.split_at(usize::from(given.min(len)).min(rest.len()));
                rest = behind;
                let mut content = content.to_vec();
                content.resize(len.into(), 0);
                self.memory.write(GuestAddress(at), &content).expect("memory");
            }
            descriptors.push((at, u32::from(len), if given & WRITABLE == 0 { 0 } else { 2 }));
        }
        let queue = usize::from(queue) % self.queues.len();
        if !descriptors.is_empty()
            && self.chain(queue, &descriptors, how & INDIRECT != 0)
            && how & NOTIFY != 0
        {
            write(device, 0x50, queue as u32);
        }
        rest
    }

    /// Where `len` bytes lie. Whole pages lie on pages.
    fn place(&mut self, len: u64) -> u64 {
        let align = if len > 0 && len.is_multiple_of(PAGE) { PAGE } else { 1 };
        let at = self.next.next_multiple_of(align);
        let at = if at + len > PIECES.end { PIECES.start } else { at };
        self.next = at + len;
        at
    }

    /// Makes a chain of `descriptors` (address, length, flags) available, if there is room for it.
    fn chain(&mut self, queue: usize, descriptors: &[(u64, u32, u8)], indirect: bool) -> bool {
        let page = QUEUES + queue as u64 * PAGE;
        let slots = if indirect { 1 } else { descriptors.len() };
        self.reclaim(queue);
        let free = self.queues[queue].free;
        let slots: Vec<u8> = (0..SIZE as u8).filter(|slot| free >> slot & 1 == 1).take(slots).collect();
        if slots.len() < if indirect { 1 } else { descriptors.len() } {
            return false;
        }
        let (table, places) = if indirect {
            let at = self.place(16 * descriptors.len() as u64);
            self.describe(page + 16 * u64::from(slots[0]), (at, 16 * descriptors.len() as u32, 4), 0);
            (at, (0..=255).take(descriptors.len()).collect())
        } else {
            (page, slots.clone())
        };
        for (n, &(at, len, flags)) in descriptors.iter().enumerate() {
            let next = places.get(n + 1).copied();
            let flags = flags | u8::from(next.is_some());
            self.describe(table + 16 * u64::from(places[n]), (at, len, flags), next.unwrap_or(0));
        }
        let taken = slots.iter().fold(0, |taken, slot| taken | 1 << slot);
        let ring = &mut self.queues[queue];
        ring.free &= !taken;
        ring.taken[usize::from(slots[0])] = taken;
        publish(&self.memory, queue, slots[0].into());
        true
    }

    /// Takes back what the device has used.
    fn reclaim(&mut self, queue: usize) {
        let used = QUEUES + queue as u64 * PAGE + USED;
        let index: u16 = self.memory.load(GuestAddress(used + 2)).expect("memory");
        let ring = &mut self.queues[queue];
        if index.wrapping_sub(ring.seen) > SIZE {
            // Other steps have offered more than there is.
            (ring.free, ring.seen) = (u8::MAX, index);
        }
        while ring.seen != index {
            let at = GuestAddress(used + 4 + 8 * u64::from(ring.seen % SIZE));
            let head: u32 = self.memory.load(at).expect("memory");
            ring.free |= std::mem::take(&mut ring.taken[(head % u32::from(SIZE)) as usize]);
            ring.seen = ring.seen.wrapping_add(1);
        }
    }

    fn describe(&self, place: u64, (at, len, flags): (u64, u32, u8), next: u8) {
        let fields = [&at.to_le_bytes()[..], &len.to_le_bytes(), &[flags, 0], &[next, 0]];
        self.memory.write(GuestAddress(place), &fields.concat()).expect("memory");
    }
}

const _: () = assert!(AVAILABLE >= 16 * SIZE as u64);
