//! Fuzz inputs that do what was recorded, in the little memory and with the short queues of the targets.

use std::collections::{BTreeMap, VecDeque};

use super::fuzz::nat::{CONNECT, FOLLOW, FORWARDED, PORT, RAW};
use super::fuzz::{BARE, CHAIN, INDIRECT, NOTIFY, SIZE, WRITABLE};
use super::recorder::{Chain, Event, Piece};

/// The largest seed: mutations of more find less.
pub const MOST: usize = 3072;

/// How often the same step is worth it: buffers look all alike.
const MOST_ALIKE: usize = 16;

/// The most bytes of a piece that are kept as they were; the rest is zero.
const CONTENT: usize = 1024;

/// The most pieces of a chain.
const PIECES: usize = 6;

/// How a device's chains are made to fit.
#[derive(Clone, Copy)]
pub struct Fit {
    /// The most bytes of a piece.
    pub piece: u32,
    /// What becomes of the content of a queue's chains.
    pub content: fn(u16, &mut [u8]),
}

impl Fit {
    /// Pieces of at most `piece` bytes, with what was in them.
    pub fn pieces(piece: u32) -> Self {
        Self { piece, content: |_, _| {} }
    }

    fn chain(self, chain: &Chain) -> Chain {
        let Chain { queue, indirect, pieces } = chain;
        let last = pieces.len() - 1;
        let kept = pieces.iter().enumerate().filter(|(n, _)| *n < PIECES - 1 || *n == last);
        let pieces = kept.map(|(_, piece)| {
            let len = piece.len.min(self.piece);
            let mut content = piece.content.clone();
            if let Some(content) = &mut content {
                content.truncate(usize::try_from(len).unwrap());
                (self.content)(*queue, content);
            }
            Piece { len, content }
        });
        Chain { queue: *queue, indirect: *indirect, pieces: pieces.collect() }
    }
}

/// An input that does what happened in `parts`, in order. A driver begins with the chains that wait for the
/// device at that time.
pub fn device(events: &[Event], parts: &[&str], fit: Fit) -> Vec<u8> {
    let ready = events.iter().find_map(|event| if let Event::Ready(f) = event { Some(*f) } else { None });
    let accepted = u32::try_from(ready.unwrap() & 0x00ff_ffff).unwrap();
    let mut script =
        Script { bytes: (!accepted & 0x00ff_ffff | BARE).to_le_bytes().to_vec(), ..Script::default() };
    // What is with the device, from the beginning and in the seed, and what waits until there is room.
    let mut pending = BTreeMap::<u16, VecDeque<Chain>>::new();
    let (mut offered, mut waiting) = (BTreeMap::<u16, u16>::new(), BTreeMap::<u16, VecDeque<Chain>>::new());
    let (mut part, mut begun) = ("probe", false);
    for event in events {
        if let Event::Part(name) = event {
            part = name;
            continue;
        }
        if parts.contains(&part) && !begun {
            begun = true;
            for (&queue, chains) in &pending {
                for chain in chains {
                    offer(&mut script, &mut offered, &mut waiting, chain.clone());
                }
                script.notify(queue);
            }
        }
        let recorded = parts.contains(&part);
        match event {
            Event::Offered(chain) => {
                let chain = fit.chain(chain);
                pending.entry(chain.queue).or_default().push_back(chain.clone());
                if recorded {
                    offer(&mut script, &mut offered, &mut waiting, chain);
                }
            }
            Event::Answered(queue, count) => {
                for _ in 0..*count {
                    pending.entry(*queue).or_default().pop_front();
                    if recorded {
                        let offered = offered.entry(*queue).or_default();
                        *offered = offered.saturating_sub(1);
                        if let Some(chain) = waiting.entry(*queue).or_default().pop_front() {
                            script.chain(&chain);
                            *offered += 1;
                        }
                    }
                }
            }
            _ if !recorded => {}
            Event::Notified(queue) => script.notify(*queue),
            Event::Polled => script.step([6, 0, 0, 0, 0, 0, 0, 0]),
            Event::Read(at, len) => {
                let [a, b] = at.to_le_bytes();
                script.step([5, a, b, u8::try_from(len.trailing_zeros()).unwrap(), 0, 0, 0, 0]);
            }
            Event::Write(at, value) => {
                let ([a, b], width) = (at.to_le_bytes(), value.len().trailing_zeros());
                let mut step = [4, a, b, u8::try_from(width).unwrap(), 0, 0, 0, 0];
                step[4..4 + value.len().min(4)].copy_from_slice(&value[..value.len().min(4)]);
                script.step(step);
            }
            Event::Part(_) | Event::Ready(_) => {}
        }
    }
    assert!(begun, "nothing was recorded in {parts:?}");
    script.bytes
}

/// Offers `chain`, or has it wait until the queue has room.
fn offer(
    script: &mut Script,
    offered: &mut BTreeMap<u16, u16>,
    waiting: &mut BTreeMap<u16, VecDeque<Chain>>,
    chain: Chain,
) {
    let offered = offered.entry(chain.queue).or_default();
    if *offered < SIZE {
        *offered += 1;
        script.chain(&chain);
    } else {
        waiting.entry(chain.queue).or_default().push_back(chain);
    }
}

/// Steps of an input, up to its largest size.
#[derive(Default)]
struct Script {
    bytes: Vec<u8>,
    /// Where the last step begins, which is this queue's chain.
    last: Option<(u16, usize)>,
    steps: BTreeMap<Vec<u8>, usize>,
    full: bool,
}

impl Script {
    /// One more step; the same one again and again is left out.
    fn push(&mut self, step: Vec<u8>) -> bool {
        self.full |= self.bytes.len() + step.len() > MOST;
        let count = self.steps.entry(step.clone()).or_default();
        *count += 1;
        let fits = !self.full && *count <= MOST_ALIKE;
        if fits {
            self.bytes.extend(step);
            self.last = None;
        }
        fits
    }

    fn step(&mut self, step: [u8; 8]) {
        self.push(step.to_vec());
    }

    fn notify(&mut self, queue: u16) {
        if let Some((last, at)) = self.last.take()
            && last == queue
        {
            self.bytes[at + 2] |= NOTIFY;
            return;
        }
        self.step([1, u8::try_from(queue).unwrap(), 0, 0, 0, 0, 0, 0]);
    }

    fn chain(&mut self, chain: &Chain) {
        let how = if chain.indirect { INDIRECT } else { 0 };
        let mut step =
            vec![CHAIN, u8::try_from(chain.queue).unwrap(), how, u8::try_from(chain.pieces.len()).unwrap()];
        let mut contents = Vec::<u8>::new();
        for Piece { len, content } in &chain.pieces {
            step.extend(u16::try_from(*len).unwrap().to_le_bytes());
            let given = content.as_ref().map_or(WRITABLE, |content| {
                let content = &content[..content.len().min(CONTENT)];
                let end = content.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                contents.extend(&content[..end]);
                u16::try_from(end).unwrap()
            });
            step.extend(given.to_le_bytes());
        }
        step.extend(contents);
        let at = self.bytes.len();
        if self.push(step) {
            self.last = Some((chain.queue, at));
        }
    }
}

/// An input of `net_commands` with what happened in `parts`: commands, packets, and buffers for some to come.
pub fn commands(events: &[Event], parts: &[&str]) -> Vec<u8> {
    const CONTROL: u16 = 4;
    let (mut input, mut part, mut seen) = (Vec::new(), "probe", BTreeMap::<Vec<u8>, usize>::new());
    for event in events {
        match event {
            Event::Part(name) => part = name,
            Event::Offered(chain) if parts.contains(&part) => {
                let pair = u8::try_from(chain.queue / 2).unwrap();
                let contents: Vec<u8> =
                    chain.pieces.iter().flat_map(|p| p.content.clone().unwrap_or_default()).collect();
                let what = match chain.queue {
                    CONTROL => 0,
                    queue if queue % 2 == 1 => 3 | pair << 3,
                    _ => 5 | pair << 3,
                };
                let [low, high] = u16::try_from(contents.len()).unwrap().to_le_bytes();
                let step = [&[what, low, high][..], &contents].concat();
                let count = seen.entry(step.clone()).or_default();
                *count += 1;
                if *count <= MOST_ALIKE && input.len() + step.len() <= MOST {
                    input.extend(step);
                }
            }
            _ => {}
        }
    }
    input
}

/// An input of the NAT's with `frames` that the guest sent, of which TCP went to `port` of the host, or came
/// from the port that the host had connected to before.
pub fn nat(frames: &[Vec<u8>], port: u16, connected: bool) -> Vec<u8> {
    let mut input = if connected { vec![CONNECT, 0, 0, 0] } else { Vec::new() };
    for frame in frames {
        let mut frame = frame.clone();
        let tcp = frame.len() >= 54 && frame[12..15] == [8, 0, 0x45] && frame[23] == 6;
        let ours = tcp
            && (frame[36..38] == port.to_be_bytes() || connected && frame[34..36] == FORWARDED.to_be_bytes());
        if ours && frame[36..38] == port.to_be_bytes() {
            frame[36..38].copy_from_slice(&PORT);
        }
        let [low, high] = u16::try_from(frame.len()).unwrap().to_le_bytes();
        if input.len() + 4 + frame.len() <= MOST {
            input.extend([RAW, low, high, if ours { FOLLOW } else { 0 }]);
            input.extend(frame);
        }
    }
    input
}
